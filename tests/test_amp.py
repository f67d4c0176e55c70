"""GradScaler: torch's own and ours, overflows, skipped steps, several optimizers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from cases import OPTIONS, bits, each_backend, each_short_option, parameters, set_gradients, state_bits
from cases import backend_name as name_of
from torch import nn

import fusedopt
from fusedopt.amp import GradScaler
from fusedopt.backends.native import update_scale

SCALERS = {"stock": torch.amp.GradScaler, "ours": GradScaler}
each_scaler = pytest.mark.parametrize("scaler_type", SCALERS)


def make(option: str, params: list[nn.Parameter], **extra: Any) -> Any:
    cls, settings = OPTIONS[option]
    return cls(params, **settings, **extra)


def small_scaler(scaler_type: str, scale: float = 4.0) -> torch.amp.GradScaler:
    scaler = SCALERS[scaler_type]("cpu", init_scale=scale, growth_interval=3)
    scaler.scale(torch.zeros(()))
    return scaler


@each_backend
@each_scaler
@each_short_option
def test_unscales_like_an_unscaled_step(option: str, scaler_type: str, backend: str) -> None:
    params, plain = parameters([(5,), (33,)]), parameters([(5,), (33,)])
    optimizer = make(option, params, backend=name_of(backend))
    expected = make(option, plain, backend=name_of(backend))
    scaler = small_scaler(scaler_type)
    for step in range(4):
        scale = scaler.get_scale()
        set_gradients(params, step, scale)
        set_gradients(plain, step)
        scaler.step(optimizer)
        scaler.update()
        expected.step()
    assert bits(params) == bits(plain), "the scale is a power of two, so nothing is lost"
    assert scaler.get_scale() == 8.0, "grown once after three good steps"
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@each_backend
@each_scaler
@each_short_option
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("when", ["first step", "later step"])
def test_a_skipped_step_changes_nothing(option: str, scaler_type: str, backend: str, bad: float, when: str) -> None:
    params = parameters([(5,), (33,), (16385,)])
    optimizer = make(option, params, backend=name_of(backend))
    scaler = small_scaler(scaler_type)
    if when == "later step":
        set_gradients(params, 0)
        scaler.step(optimizer)
        scaler.update()
    before, state_before = bits(params), state_bits(optimizer)
    scale = scaler.get_scale()
    set_gradients(params, 1)
    params[2].grad[16384] = bad
    scaler.step(optimizer)
    scaler.update()
    assert bits(params) == before
    assert state_bits(optimizer) == state_before
    assert float(optimizer.last_step.found_inf) == 1.0
    assert scaler.get_scale() == scale / 2

    set_gradients(params, 2)
    fresh = [nn.Parameter(param.detach().clone()) for param in params]
    expected = make(option, fresh)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(fresh, 2, 1 / scaler.get_scale())
    expected.step()
    scaler.step(optimizer)
    torch.testing.assert_close(params, fresh)
    assert float(optimizer.last_step.found_inf) == 0.0


@each_scaler
def test_dynamic_scale_moves_like_a_stock_optimizers(scaler_type: str) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    runs = []
    for make, scaler_class in (
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False), torch.amp.GradScaler),
        (lambda p: fusedopt.FusedSGD(p, lr=0.1, momentum=0.9), SCALERS[scaler_type]),
    ):
        twin = copy.deepcopy(model)
        optimizer = make(twin.parameters())
        scaler = scaler_class("cpu", init_scale=2.0**24, growth_interval=4)
        scales, losses = [], []
        for step in range(40):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.float16):
                loss = twin(x).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            losses.append(loss.item())
        runs.append((scales, losses, scaler.state_dict()))
    (stock_scales, stock_losses, stock_state), (scales, losses, state) = runs
    assert scales == stock_scales
    assert min(scales) < 2.0**24 < max(scales) * 1024, "the scale really fell"
    assert any(after > before for before, after in itertools.pairwise(scales)), "and really grew"
    assert state == stock_state
    assert losses == pytest.approx(stock_losses, rel=1e-4)


@each_scaler
def test_scaler_with_clipping_equals_the_stock_sequence(scaler_type: str) -> None:
    params, copies = parameters([(5,), (33,)]), parameters([(5,), (33,)])
    optimizer = make("adamw", params, clip_grad={"max_norm": 0.3})
    stock = torch.optim.AdamW(copies, **OPTIONS["adamw"][1], foreach=False)
    scaler, stock_scaler = small_scaler(scaler_type), small_scaler("stock")
    for step in range(6):
        for group, s in ((params, scaler), (copies, stock_scaler)):
            set_gradients(group, step, s.get_scale())
            if step == 3:
                group[1].grad[7] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        stock_scaler.unscale_(stock)
        norm = torch.nn.utils.clip_grad_norm_(copies, 0.3)
        stock_scaler.step(stock)
        stock_scaler.update()
        assert scaler.get_scale() == stock_scaler.get_scale()
        if step != 3:
            torch.testing.assert_close(optimizer.last_step.grad_norm, norm)
        torch.testing.assert_close(params, copies, rtol=1e-5, atol=1e-6)


@each_scaler
def test_explicit_unscale_is_not_repeated(scaler_type: str) -> None:
    """pytorch#90752, #94060: double unscale."""
    params, plain = parameters([(5,)]), parameters([(5,)])
    optimizer, expected = make("adamw", params), make("adamw", plain)
    scaler = small_scaler(scaler_type)
    set_gradients(params, 0, 4.0)
    set_gradients(plain, 0)
    scaler.unscale_(optimizer)
    assert bits([params[0].grad]) == bits([plain[0].grad])
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert bits(params) == bits(plain)


@each_scaler
def test_a_users_grad_scale_multiplies_the_scalers(scaler_type: str) -> None:
    params, plain = parameters([(5,)]), parameters([(5,)])
    optimizer, expected = make("adamw", params), make("adamw", plain)
    scaler = small_scaler(scaler_type)
    set_gradients(params, 0, 4.0 * 2.0)
    set_gradients(plain, 0)
    optimizer.grad_scale = torch.tensor(2.0)
    scaler.step(optimizer)
    expected.step()
    assert bits(params) == bits(plain)


def test_one_scaler_for_fused_and_stock_optimizers_together() -> None:
    fused_params, stock_params, other = parameters([(5,)]), parameters([(6,)]), parameters([(7,)])
    optimizers = [
        make("adamw", fused_params),
        torch.optim.AdamW(stock_params),
        make("sgd-momentum", other),
    ]
    scaler = small_scaler("ours")
    for params in (fused_params, stock_params, other):
        set_gradients(params, 0, 4.0)
    other[0].grad[0] = float("inf")
    before = bits(other)
    moved = bits([*fused_params, *stock_params])
    for optimizer in optimizers:
        scaler.step(optimizer)
    reports = [optimizers[0].last_step, optimizers[2].last_step]
    scaler.update()
    assert bits(other) == before
    assert all(a != b for a, b in zip(bits([*fused_params, *stock_params]), moved, strict=True))
    assert scaler.get_scale() == 2.0
    # The scaler adds the flags up in place: reports must have tensors of their own.
    assert [float(report.found_inf) for report in reports] == [0.0, 1.0]


def test_no_gradient_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the scaler walked the gradients")

    params = parameters([(5,)])
    optimizer = make("adamw", params, clip_grad={"max_norm": 1.0})
    scaler = small_scaler("ours")
    set_gradients(params, 0)
    before = bits([params[0].grad])
    monkeypatch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", refuse)
    scaler.step(optimizer)
    scaler.update()
    assert bits([params[0].grad]) == before


def test_half_precision_gradients_may_be_scaled() -> None:
    """pytorch#127176: the stock scaler refuses to unscale fp16 gradients."""
    for dtype in (torch.float16, torch.bfloat16):
        params, plain = parameters([(5,)], dtype), parameters([(5,)], dtype)
        optimizer, expected = make("adamw", params), make("adamw", plain)
        scaler = small_scaler("ours")
        set_gradients(params, 0, 4.0)
        set_gradients(plain, 0)
        scaler.step(optimizer)
        expected.step()
        assert bits(params) == bits(plain)


def test_scaler_misuse_is_refused_like_torchs() -> None:
    params = parameters([(5,)])
    optimizer = make("adamw", params)
    scaler = small_scaler("ours")
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=lambda: 0.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)


def test_disabled_scaler_steps_plainly() -> None:
    params, plain = parameters([(5,)]), parameters([(5,)])
    optimizer, expected = make("adamw", params), make("adamw", plain)
    set_gradients(params, 0)
    set_gradients(plain, 0)
    scaler = GradScaler("cpu", enabled=False)
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert bits(params) == bits(plain)


@each_backend
def test_found_inf_of_any_value_but_zero_skips(backend: str) -> None:
    """torch's kernels test for 1; two devices with an inf add up to 2."""
    params = parameters([(5,), (17,)])
    optimizer = make("adamw", params, backend=name_of(backend))
    set_gradients(params, 0)
    before = bits(params)
    optimizer.step(found_inf=torch.tensor(2.0))
    assert bits(params) == before
    assert optimizer.state_dict()["state"] == {}
    assert float(optimizer.last_step.found_inf) == 1.0
    optimizer.step(found_inf=torch.tensor(0.0))
    assert bits(params) != before
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


@each_backend
def test_found_inf_counts_without_a_grad_scale(backend: str) -> None:
    """pytorch#95781."""
    params = parameters([(5,)])
    optimizer = make("sgd-momentum", params, backend=name_of(backend))
    set_gradients(params, 0)
    before = bits(params)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert bits(params) == before


@each_backend
def test_grad_scale_attribute_alone_divides_without_searching(backend: str) -> None:
    params, plain = parameters([(5,)]), parameters([(5,)])
    optimizer = make("sgd-momentum", params, backend=name_of(backend))
    expected = make("sgd-momentum", plain)
    set_gradients(params, 0, 8.0)
    set_gradients(plain, 0)
    optimizer.grad_scale = torch.tensor(8.0)
    optimizer.step()
    expected.step()
    assert bits(params) == bits(plain)
    assert optimizer.last_step.found_inf is None


def test_the_flag_of_the_previous_step_is_not_used() -> None:
    """DeepSpeed used the overflow flag of the step before."""
    params = parameters([(5,)])
    optimizer = make("sgd-momentum", params)
    flags = []
    for bad in (False, True, False, True):
        set_gradients(params, 0)
        if bad:
            params[0].grad[0] = float("nan")
        before = bits(params)
        optimizer.step(grad_scale=2.0)
        flags.append((float(optimizer.last_step.found_inf), bits(params) == before))
    assert flags == [(0.0, False), (1.0, True), (0.0, False), (1.0, True)]


@each_scaler
def test_a_subclass_whose_step_takes_only_a_closure(scaler_type: str) -> None:
    class Mine(fusedopt.FusedAdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            Mine.calls += 1
            return super().step(closure)

    params, plain = parameters([(5,)]), parameters([(5,)])
    optimizer, expected = Mine(params, **OPTIONS["adamw"][1]), make("adamw", plain)
    scaler = small_scaler(scaler_type)
    set_gradients(params, 0, 4.0)
    set_gradients(plain, 0)
    scaler.step(optimizer)
    scaler.update()
    expected.step()
    assert Mine.calls == 1
    assert bits(params) == bits(plain)


def test_a_failed_step_leaves_nothing_behind_that_hides_the_next_overflow() -> None:
    params = parameters([(5,)])
    optimizer = make("adamw", params)
    scaler = small_scaler("ours")
    set_gradients(params, 0)

    def fail(*args: Any) -> None:
        raise RuntimeError("stop here")

    handle = optimizer.register_step_pre_hook(fail)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="stop here"):
        scaler.step(optimizer)
    handle.remove()
    scaler.update()
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
    optimizer.found_inf = torch.zeros(())  # what torch's scaler would have left
    params[0].grad[2] = float("inf")
    before = bits(params)
    scaler.step(optimizer)
    scaler.update()
    assert bits(params) == before
    assert scaler.get_scale() == 2.0


def test_the_scale_moves_like_torchs_over_any_sequence() -> None:
    generator = torch.Generator().manual_seed(0)
    for growth, backoff, interval, start in ((2.0, 0.5, 3, 2.0**15), (1.7, 0.3, 1, 3e38), (3.0, 0.9, 2, 1e-38)):
        tensors = [(torch.tensor(start), torch.tensor(0, dtype=torch.int32)) for _ in range(2)]
        for _ in range(40):
            found_inf = (torch.rand((), generator=generator) < 0.3).float()
            (scale, tracker), (expected_scale, expected_tracker) = tensors
            version = scale._version
            assert update_scale(scale, tracker, found_inf, growth, backoff, interval)
            torch._amp_update_scale_(expected_scale, expected_tracker, found_inf, growth, backoff, interval)
            assert bits([scale]) == bits([expected_scale])
            assert tracker.item() == expected_tracker.item()
            assert scale._version > version


@pytest.mark.parametrize("other", ["meta", "dtype", "shape"])
def test_a_scale_that_is_not_a_plain_cpu_float_is_left_to_torch(other: str) -> None:
    scale, tracker, found = torch.tensor(4.0), torch.tensor(2, dtype=torch.int32), torch.tensor(0.0)
    odd = {"meta": scale.to("meta"), "dtype": scale.double(), "shape": scale.expand(2)}[other]
    for arguments in ((odd, tracker, found), (scale, odd, found), (scale, tracker, odd)):
        assert not update_scale(*arguments, 2.0, 0.5, 3)
    assert (scale.item(), tracker.item()) == (4.0, 2)
