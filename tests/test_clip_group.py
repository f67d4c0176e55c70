"""ClipGroup and step(grad_norm=...) in one process; with several: test_sharded.py and test_sharded_meshes.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import HAS_EMULATOR, INF, bits, global_norm, on_cpu, parameters, set_gradients, state_bits
from torch import nn

import fusedopt

SHAPES = [(7,), (3, 5), (), (0,), (33,)]
CLIP = dict(max_norm=0.5)
BACKENDS = ["native", "reference", *(["emulated", "emulated-pair"] if HAS_EMULATOR else [])]
FUSED = (fusedopt.FusedAdamW, fusedopt.FusedSGD)
STOCK = (torch.optim.AdamW, torch.optim.SGD)


def members_of(params: list[nn.Parameter], kinds: Any = FUSED, **settings: Any) -> list[Any]:
    """Two optimizers, the second with momentum."""
    return [kinds[0](params[:2], lr=0.05, **settings), kinds[1](params[2:], lr=0.05, momentum=0.9, **settings)]


def make(backend: str = "auto", dtype: torch.dtype = torch.float64, **clip: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(SHAPES, dtype)
    return fusedopt.ClipGroup(members_of(params, backend=backend), **clip), params


def everything(group: Any) -> list[Any]:
    params = [param for each in group.param_groups for param in each["params"]]
    return [bits(params), [state_bits(member) for member in group.optimizers]]


def stepped_stock(steps: list[int], clip: dict[str, Any] | None, skip: int | None = None) -> list[nn.Parameter]:
    params = parameters(SHAPES, torch.float64)
    members = members_of(params, STOCK, foreach=False)
    for seed in steps:
        if seed == skip:
            continue
        set_gradients(params, seed)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([param for param in params if param.numel()], **clip)
        for member in members:
            member.step()
    return params


def assert_params(params: list[nn.Parameter], expected: list[nn.Parameter]) -> None:
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("clip", [None, CLIP, dict(max_norm=1.5, norm_type=1.0), dict(max_norm=0.2, norm_type=INF)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_as_torch_clips_all_parameters(backend: str, clip: dict[str, Any] | None) -> None:
    group, params = make(backend, **(clip or {}))
    for seed in range(3):
        set_gradients(params, seed)
        group.step()
        if clip is None:
            assert group.last_step.grad_norm is None
        else:
            norm = global_norm(params, clip.get("norm_type", 2.0))
            assert float(group.last_step.grad_norm) == pytest.approx(norm, rel=1e-12)
            assert float(group.last_step.clip_coef) == pytest.approx(clip["max_norm"] / (norm + 1e-6), rel=1e-12)
    assert_params(params, stepped_stock([0, 1, 2], clip))


@pytest.mark.parametrize("scaler", [fusedopt.amp.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("where", [0, 4])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_of_one_member_skips_all(
    backend: str, clip: dict[str, Any] | None, where: int, by_hand: bool, scaler: Any
) -> None:
    group, params = make(backend, **(clip or {}))
    amp = scaler("cpu", init_scale=8.0, growth_interval=100)
    amp.scale(torch.ones(()))
    for seed in range(3):
        set_gradients(params, seed)
        for param in params:
            param.grad *= 8.0 if seed < 2 else 4.0
        if seed == 1:
            params[where].grad.view(-1)[0] = INF
        before = everything(group)
        if by_hand:
            amp.unscale_(group)
        amp.step(group)
        amp.update()
        assert (everything(group) == before) == (seed == 1)
        assert float(group.last_step.found_inf) == (seed == 1)
        assert amp.get_scale() == (8.0 if seed < 1 else 4.0)
    assert_params(params, stepped_stock([0, 1, 2], clip, skip=1))


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("backend", BACKENDS)
def test_found_inf_that_is_handed_in_skips_all(backend: str, clip: dict[str, Any] | None) -> None:
    group, params = make(backend, **(clip or {}))
    set_gradients(params, 0)
    group.step()
    before = everything(group)
    group.step(found_inf=torch.tensor(1.0))
    assert everything(group) == before
    assert float(group.last_step.found_inf) == 1.0
    group.step(found_inf=torch.tensor(0.0), grad_scale=torch.tensor(2.0))
    assert everything(group) != before
    assert float(group.last_step.found_inf) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [0, 1])
def test_a_member_without_gradients_stays_and_the_other_is_clipped(backend: str, without: int) -> None:
    group, params = make(backend, **CLIP)
    set_gradients(params, 0)
    group.optimizers[without].zero_grad()
    kept = bits(params[:2] if without == 0 else params[2:])
    group.step(grad_scale=2.0)
    assert bits(params[:2] if without == 0 else params[2:]) == kept
    assert float(group.last_step.grad_norm) == pytest.approx(global_norm(params) / 2, rel=1e-12)
    assert float(group.last_step.found_inf) == 0.0
    group.zero_grad()
    group.step(grad_scale=2.0)
    assert float(group.last_step.grad_norm) == 0.0


HOW = {
    "clipped": (CLIP, {}),
    "scaled": ({}, {"grad_scale": 2.0}),
    "bare": ({}, {}),
    "given-norm": (CLIP, {"grad_norm": 3.0}),
    "given-found-inf": ({}, {"found_inf": torch.tensor(0.0)}),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HOW)
def test_a_member_that_fails_leaves_all_as_they_were(backend: str, how: str) -> None:
    clip, arguments = HOW[how]
    group, params = make(backend, **clip)
    set_gradients(params, 0)
    group.step(**arguments)
    broken = group.optimizers[1].state[params[4]]
    kept = broken.pop("momentum_buffer")
    broken["other"] = kept
    broken["exp_avg"] = kept  # of another optimizer
    before = bits(params), state_bits(group.optimizers[0])
    with pytest.raises(RuntimeError, match=r"shape \(33,\)"):
        group.step(**arguments)
    assert (bits(params), state_bits(group.optimizers[0])) == before
    del broken["exp_avg"], broken["other"]
    broken["momentum_buffer"] = kept
    group.step(**arguments)
    assert bits(params) != before[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [{}, CLIP])
def test_members_write_back_gradients_as_each_is_set(backend: str, clip: dict[str, Any]) -> None:
    group, params = make(backend, **clip)
    group.optimizers[1].write_back_grads = True
    set_gradients(params, 0)
    grads = [param.grad.clone() for param in params]
    group.step(grad_scale=2.0)
    factor = float(group.last_step.clip_coef if clip else 1.0) / 2
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        torch.testing.assert_close(param.grad, grad if index < 2 else grad * factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_is_not_finite_is_an_error_on_request(backend: str) -> None:
    group, params = make(backend, **CLIP, error_if_nonfinite=True)
    set_gradients(params, 0)
    group.step()
    before = everything(group)
    params[4].grad[3] = float("nan")
    with pytest.raises(RuntimeError, match=r"total norm .* is nan, so it cannot be clipped"):
        group.step()
    assert everything(group) == before
    set_gradients(params, 1)
    group.step()
    assert everything(group) != before


def test_hooks_schedules_and_closures_of_members() -> None:
    group, params = make(**CLIP)
    called: list[str] = []
    for number, member in enumerate(group.optimizers):
        member.register_step_pre_hook(lambda *_, number=number: called.append(f"before {number}"))
        member.register_step_post_hook(lambda *_, number=number: called.append(f"after {number}"))
    group.optimizers[1].register_step_pre_hook(lambda *_: [param.grad.mul_(2) for param in params[2:]])
    schedules = [torch.optim.lr_scheduler.StepLR(member, 1, gamma=0.5) for member in group.optimizers]

    def closure() -> torch.Tensor:
        set_gradients(params, 0)
        called.append("closure")
        return torch.tensor(3.0)

    assert float(group.step(closure)) == 3.0
    assert called == ["closure", "before 0", "before 1", "after 0", "after 1"]
    assert float(group.last_step.grad_norm) == pytest.approx(global_norm(params), rel=1e-12)
    for schedule in schedules:
        schedule.step()  # warns if it thinks that no step came before
    assert [each["lr"] for each in group.param_groups] == [0.025, 0.025]


def test_members_of_several_dtypes_and_backends() -> None:
    params = [
        *parameters([(5,)], torch.float32),
        *parameters([(6,)], torch.float64),
        *parameters([(7,)], torch.bfloat16),
    ]
    backends = ["native", "reference", "native"]
    members = [fusedopt.FusedSGD([param], lr=0.0, backend=name) for param, name in zip(params, backends, strict=True)]
    group = fusedopt.ClipGroup(members, **CLIP, norm_type=3.0)
    set_gradients(params, 0)
    group.step()
    assert float(group.last_step.grad_norm) == pytest.approx(global_norm(params, 3.0), rel=1e-6)


def test_what_is_no_group_is_refused() -> None:
    params = parameters([(2,), (3,)])
    first, second = fusedopt.FusedSGD(params[:1]), fusedopt.FusedSGD(params[1:])
    for members, error, message in (
        ([], ValueError, "got no optimizers"),
        ([first, torch.optim.SGD(params[1:])], TypeError, r"optimizers\[1\] is a SGD; expected a fused optimizer"),
        ([first, first], ValueError, r"optimizers\[1\] is in optimizers\[0\], too"),
        ([first, fusedopt.FusedSGD(params)], ValueError, r"shape \(2,\)\) of optimizers\[1\] is in optimizers\[0\]"),
        ([fusedopt.FusedSGD(params, clip_grad=CLIP)], ValueError, r"optimizers\[0\] has clip_grad=.* of its own"),
    ):
        with pytest.raises(error, match=message):
            fusedopt.ClipGroup(members, **CLIP)
    for settings, message in ((dict(max_norm=-1.0), "max_norm"), (dict(max_norm=1.0, norm_type=0), "norm_type")):
        with pytest.raises(ValueError, match=message):
            fusedopt.ClipGroup([first, second], **settings)
    group = fusedopt.ClipGroup([first, second], **CLIP)
    with pytest.raises(ValueError, match="max_norm"):
        group.clip_grad = dict(max_norm=0.0)
    assert group.clip_grad == {"type": "norm", "max_norm": 0.5, "norm_type": 2.0, "error_if_nonfinite": False}


def test_what_a_member_gets_later_counts() -> None:
    """Its own clip_grad would clip twice; its new parameters belong to the norm."""
    group, params = make(**CLIP)
    more = parameters([(4,)], torch.float64, seed=5)
    set_gradients([*params, *more], 0)
    group.step()
    group.optimizers[0].add_param_group({"params": more})
    group.step()
    assert float(group.last_step.grad_norm) == pytest.approx(global_norm([*params, *more]), rel=1e-12)
    group.optimizers[0].clip_grad = CLIP
    before = everything(group)
    with pytest.raises(ValueError, match=r"optimizers\[0\] has clip_grad=.* of its own"):
        group.step()
    assert everything(group) == before


def test_a_step_of_a_group_in_a_backward_pass_is_refused() -> None:
    param = nn.Parameter(torch.ones(3))
    group = fusedopt.ClipGroup([fusedopt.FusedSGD([param])], **CLIP)
    param.register_post_accumulate_grad_hook(lambda _: group.step())
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        param.sum().backward()
    assert param.tolist() == [1.0] * 3


# step(grad_norm=...) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_given_norm_clips_as_a_found_one(backend: str, norm_type: float, as_tensor: bool) -> None:
    several = [parameters(SHAPES, torch.float64) for _ in range(2)]
    clip = dict(max_norm=0.3, norm_type=norm_type)
    given, finds = (
        fusedopt.FusedAdamW(params, clip_grad=clip, write_back_grads=True, backend=backend) for params in several
    )
    for seed in range(3):
        for params in several:
            set_gradients(params, seed, scale=4.0)
        norm = global_norm(several[0], norm_type) / 4
        given.step(grad_norm=torch.tensor(norm, dtype=torch.float64) if as_tensor else norm, grad_scale=4.0)
        finds.step(grad_scale=4.0)
        assert float(given.last_step.grad_norm) == pytest.approx(float(finds.last_step.grad_norm), rel=1e-12)
        assert float(given.last_step.clip_coef) == pytest.approx(float(finds.last_step.clip_coef), rel=1e-12)
        assert float(given.last_step.found_inf) == 0.0
        for one, other in zip(*several, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0)
    assert_params(*several)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [INF, float("nan")])
def test_a_given_norm_that_is_not_finite(backend: str, norm: float) -> None:
    params = parameters([(5,)], torch.float64)
    optimizer = fusedopt.FusedSGD(params, lr=0.1, clip_grad=CLIP, backend=backend)
    set_gradients(params, 0)
    before = bits(params)
    optimizer.step(grad_norm=norm, grad_scale=2.0)
    assert bits(params) == before
    assert float(optimizer.last_step.found_inf) == 1.0
    optimizer.clip_grad = {**CLIP, "error_if_nonfinite": True}
    with pytest.raises(RuntimeError, match="so the gradients cannot be clipped to it"):
        optimizer.step(grad_norm=norm)
    assert bits(params) == before
    optimizer.clip_grad = CLIP
    expected = copy.deepcopy(params)
    for want, param in zip(expected, params, strict=True):
        want.grad = param.grad.clone()
    torch.nn.utils.clip_grads_with_norm_(expected, 0.5, torch.tensor(norm))
    torch.optim.SGD(expected, lr=0.1).step()
    optimizer.step(grad_norm=norm)  # as torch, which multiplies with 0 or NaN
    for want, param in zip(expected, params, strict=True):
        assert on_cpu(want).tolist() == pytest.approx(on_cpu(param).tolist(), nan_ok=True)


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (-1.0, ValueError, "Invalid grad_norm: -1.0"),
        ("2", TypeError, "grad_norm must be a number or a 0-dim tensor"),
        (True, TypeError, "grad_norm must be a number"),
        (torch.ones(2), ValueError, r"grad_norm is a tensor of shape \(2,\)"),
        (torch.ones((), dtype=torch.int64), ValueError, "torch.int64"),
    ],
)
def test_what_is_no_norm_is_refused(norm: Any, error: type[Exception], message: str) -> None:
    params = parameters([(5,)])
    set_gradients(params, 0)
    for stepped in (
        fusedopt.FusedSGD(params, clip_grad=CLIP),
        fusedopt.ClipGroup([fusedopt.FusedSGD(params)], **CLIP),
    ):
        before = bits(params)
        with pytest.raises(error, match=message):
            stepped.step(grad_norm=norm)
        assert bits(params) == before


@pytest.mark.parametrize("clip", [None, dict(type="value", clip_value=1.0)])
def test_a_norm_that_nobody_clips_by_is_refused(clip: dict[str, Any] | None) -> None:
    params = parameters([(5,)])
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="grad_norm is given, and clip_grad is"):
        fusedopt.FusedSGD(params, clip_grad=clip).step(grad_norm=1.0)
    with pytest.raises(ValueError, match="grad_norm is given, and clip_grad is"):
        fusedopt.ClipGroup([fusedopt.FusedSGD(params)]).step(grad_norm=1.0)
