"""unfuse(): back to torch's optimizer, at any point."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cases import INF, bits, parameters, set_gradients, state_bits

import fusedopt
from fusedopt.amp import GradScaler
from fusedopt.optimizers.next_step import clip_next_step
from fusedopt.rules import NormClip

SHAPES = [(7,), (3, 5), (), (33,)]
FUSED = {
    torch.optim.SGD: fusedopt.FusedSGD,
    torch.optim.Adam: fusedopt.FusedAdam,
    torch.optim.AdamW: fusedopt.FusedAdamW,
}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, dict(momentum=0.9, dampening=0.3)),
    (torch.optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    (torch.optim.Adam, dict(weight_decay=0.1)),
    (torch.optim.Adam, dict(decoupled_weight_decay=True, weight_decay=0.1)),
    (torch.optim.AdamW, dict(amsgrad=True)),
    (torch.optim.AdamW, dict(fused=True)),
    (torch.optim.AdamW, dict(maximize=True, foreach=False)),
]


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    return [dict(params=params[:2]), dict(params=params[2:], lr=0.02, mine="kept")]


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_there_and_back_is_torch_all_along(cls: Any, settings: dict[str, Any]) -> None:
    params, copies = parameters(SHAPES, torch.float64), parameters(SHAPES, torch.float64)
    optimizer, stock = cls(groups_of(params), lr=0.05, **settings), cls(groups_of(copies), lr=0.05, **settings)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (optimizer, stock)]
    groups, lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    called: list[int] = []
    for seed in range(9):
        called.clear()
        if seed in (0, 4):
            optimizer = fusedopt.fuse(optimizer)
            optimizer.register_step_post_hook(lambda *_, seed=seed: called.append(seed))
        elif seed in (2, 7):
            optimizer = fusedopt.unfuse(optimizer)
            assert type(optimizer) is cls
        for each, own in ((optimizer, params), (stock, copies)):
            set_gradients(own, seed)
            each.step()
        assert called == ([0] if seed < 4 else [0, 4])
        for scheduler in schedulers:
            scheduler.step()
    for param, want in zip(params, copies, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-12, atol=1e-13)
    assert optimizer.param_groups is groups
    assert all(group["params"] is own for group, own in zip(groups, lists, strict=True))
    ours, theirs = optimizer.state_dict(), stock.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert {key: value.keys() for key, value in ours["state"].items()} == {
        key: value.keys() for key, value in theirs["state"].items()
    }
    for key, value in theirs["state"].items():
        for name, want in value.items():
            got = ours["state"][key][name]
            if isinstance(want, torch.Tensor):
                torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
                assert (got.dtype, got.device, got.shape) == (want.dtype, want.device, want.shape)
            else:
                assert got == want
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == getattr(
        stock, "_step_supports_amp_scaling", False
    )


@pytest.mark.parametrize(("cls", "settings"), CASES)
def test_after_nothing_but_a_skipped_step_it_has_not_stepped(cls: Any, settings: dict[str, Any]) -> None:
    """A momentum buffer of zeros would be blended with the first gradient."""
    params, copies = parameters(SHAPES), parameters(SHAPES)
    fused = FUSED[cls](params, lr=0.05, **{key: value for key, value in settings.items() if key != "fused"})
    set_gradients(params, 0)
    params[0].grad[0] = INF
    fused.step(grad_scale=1.0)
    assert fused.last_step.found_inf
    optimizer, stock = fusedopt.unfuse(fused), cls(copies, lr=0.05, **settings)
    assert not optimizer.state_dict()["state"]
    for seed in range(2):
        for each, own in ((optimizer, params), (stock, copies)):
            set_gradients(own, seed)
            each.step()
    for param, want in zip(params, copies, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)


def test_state_that_torch_would_trip_over() -> None:
    params = parameters(SHAPES, torch.bfloat16)
    fused = fusedopt.FusedAdamW(params, lr=0.05)
    set_gradients(params, 0)
    fused.step()
    for param in params:  # as loaded from elsewhere
        for name in ("exp_avg", "exp_avg_sq"):
            fused.state[param][name] = fused.state[param][name].float()
        fused.state[param]["step"] = torch.tensor([1])
    fused.param_groups[0]["amsgrad"] = True
    del fused.param_groups[0]["foreach"]
    stock = fusedopt.unfuse(fused)
    set_gradients(params, 1)
    stock.step()
    for state in stock.state.values():
        assert {name: value.dtype for name, value in state.items()} == {
            "step": torch.float32,
            "exp_avg": torch.bfloat16,
            "exp_avg_sq": torch.bfloat16,
            "max_exp_avg_sq": torch.bfloat16,
        }
        assert state["step"].shape == () and state["step"] == 2


def test_tensors_that_will_do_are_the_same() -> None:
    params = parameters(SHAPES)
    fused = fusedopt.FusedAdamW(params, lr=0.05)
    set_gradients(params, 0)
    fused.step()
    before = {(param, name): value for param, own in fused.state.items() for name, value in own.items()}
    stock = fusedopt.unfuse(fused)
    assert stock.state is fused.state
    assert all(stock.state[param][name] is value for (param, name), value in before.items())


@pytest.mark.parametrize("scale", [None, 8.0])
def test_what_a_trainer_has_told_it_is_done_first(scale: float | None) -> None:
    params, copies = parameters(SHAPES), parameters(SHAPES)
    fused = fusedopt.FusedSGD(params, lr=0.05)
    set_gradients(params, 0)
    set_gradients(copies, 0)
    want = torch.nn.utils.clip_grad_norm_(copies, 0.5)
    if scale is not None:
        for param in params:
            param.grad.mul_(scale)
    norm = clip_next_step(fused, NormClip(0.5), None if scale is None else torch.tensor(scale))
    stock = fusedopt.unfuse(fused)
    for param, other in zip(params, copies, strict=True):
        torch.testing.assert_close(param.grad / (scale or 1.0), other.grad)
    torch.testing.assert_close(norm.clone(), want)
    stock.step()
    fused.zero_grad()


def test_a_scaler_unscales_for_the_twin() -> None:
    params, copies = parameters(SHAPES), parameters(SHAPES)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    stock = fusedopt.unfuse(fusedopt.FusedSGD(params, lr=0.05))
    set_gradients(params, 0)
    set_gradients(copies, 0)
    for param in params:
        param.grad.mul_(8.0)
    scaler.step(stock)
    torch.optim.SGD(copies, lr=0.05).step()
    for param, want in zip(params, copies, strict=True):
        torch.testing.assert_close(param, want)


def test_the_schedulers_warning_is_spared_before_the_first_step() -> None:
    params = parameters([(3,)])
    fused = fusedopt.FusedAdamW(params)
    scheduler = torch.optim.lr_scheduler.StepLR(fused, 1)
    stock = fusedopt.unfuse(fused)
    set_gradients(params, 0)
    stock.step()
    scheduler.step()
    assert stock.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_schedulers_follow_through_a_loaded_state_dict() -> None:
    """It gives an optimizer other group dicts than those that were handed over."""
    params = parameters([(3,)])
    stock = torch.optim.AdamW(params, lr=1.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(stock, 1, 0.5)]
    seen: list[Any] = []
    stock.register_load_state_dict_post_hook(seen.append)
    optimizer: Any = stock
    rate = 1.0
    for change in (fusedopt.fuse, fusedopt.unfuse, fusedopt.fuse):
        optimizer = change(optimizer)
        schedulers.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen.pop() is optimizer and not seen
        for scheduler in schedulers:
            set_gradients(params, 0)
            optimizer.step()
            scheduler.step()
            rate /= 2
            assert optimizer.param_groups[0]["lr"] == rate


def test_nothing_follows_for_optimizers_that_nobody_has() -> None:
    optimizer: Any = torch.optim.AdamW(parameters([(3,)]))
    for _ in range(3):
        optimizer = fusedopt.unfuse(fusedopt.fuse(optimizer))
    gc.collect()
    assert not optimizer._optimizer_load_state_dict_post_hooks


class Mine(fusedopt.FusedAdamW):
    pass


class TestRefused:
    @pytest.mark.parametrize("make", [Mine, torch.optim.AdamW, lambda params: params], ids=["own", "stock", "none"])
    def test_other_classes(self, make: Any) -> None:
        with pytest.raises(TypeError, match="takes exactly one of FusedAdam, FusedAdamW, FusedSGD; got "):
            fusedopt.unfuse(make(parameters(SHAPES)))

    @pytest.mark.parametrize("clip", [dict(max_norm=1.0), dict(type="value", clip_value=1.0)])
    def test_clipping_of_its_own(self, clip: Any) -> None:
        fused = fusedopt.FusedAdamW(parameters(SHAPES), clip_grad=clip)
        with pytest.raises(ValueError, match=r"torch.optim.AdamW does not clip, and this FusedAdamW has clip_grad="):
            fusedopt.unfuse(fused)

    def test_a_scale_of_its_own(self) -> None:
        fused = fusedopt.FusedAdamW(parameters(SHAPES))
        fused.grad_scale = torch.tensor(2.0)
        with pytest.raises(ValueError, match="would ignore the grad_scale of this FusedAdamW"):
            fusedopt.unfuse(fused)

    def test_settings_that_torch_refuses_change_nothing(self) -> None:
        params = parameters(SHAPES)
        fused = fusedopt.FusedAdamW(groups_of(params), lr=torch.tensor(0.05))
        set_gradients(params, 0)
        fused.step()
        fused.defaults["foreach"] = True
        before = bits(params), state_bits(fused), [dict(group) for group in fused.param_groups]
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            fusedopt.unfuse(fused)
        assert (bits(params), state_bits(fused), [dict(group) for group in fused.param_groups]) == before
        fused.step()
