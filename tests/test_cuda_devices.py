"""The CUDA kernels as host code: two devices, numbers as tensors, found_inf, nothing to do, and anything at random."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    HAS_EMULATOR,
    INF,
    OPTIONS,
    RAGGED,
    bits,
    each_option,
    global_norm,
    parameters,
    set_gradients,
)
from cuda_cases import (
    CLIPS,
    LAYOUTS,
    LOOSE,
    NORMS,
    _code,  # noqa: F401  for every test here
    contents,
    each_clip,
    each_emulated,
    emulator,
    launches_of,
    make,
    placed,
    reported,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fusedopt

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

# --- Two devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_that_of_all_devices(norm_type: float) -> None:
    clip = {"max_norm": 0.5, "norm_type": norm_type}
    pair, one = (make("adamw", name, RAGGED, torch.float64, clip_grad=clip) for name in ("emulated-pair", "emulated"))
    for step in range(2):
        for optimizer, params in (pair, one):
            set_gradients(params, step, scale=4.0)
            optimizer.step(grad_scale=4.0)
        exact = global_norm(pair[1], norm_type) / 4
        assert float(pair[0].last_step.grad_norm) == pytest.approx(exact, rel=1e-12)
        assert float(pair[0].last_step.clip_coef) == pytest.approx(0.5 / (exact + 1e-6), rel=1e-12)
        assert float(pair[0].last_step.found_inf) == 0
        torch.testing.assert_close(pair[1], one[1], rtol=1e-12, atol=1e-14)


@each_option
def test_two_devices_give_the_same_bits_without_clipping(option: str) -> None:
    pair, native = (make(option, name, RAGGED) for name in ("emulated-pair", "native"))
    for step, scale in enumerate([None, 2.0, None]):
        for optimizer, params in (pair, native):
            set_gradients(params, step, scale=scale or 1.0)
            optimizer.step(grad_scale=scale)
        assert contents(pair[0]) == contents(native[0])
        assert reported(pair[0]) == reported(native[0])


def test_value_clip_on_two_devices() -> None:
    pair, native = (make("adamw", name, RAGGED, clip_grad=CLIPS["value"]) for name in ("emulated-pair", "native"))
    for optimizer, params in (pair, native):
        set_gradients(params, 0)
        optimizer.step()
    assert contents(pair[0]) == contents(native[0])


@pytest.mark.parametrize("victim", [4, 5])
@pytest.mark.parametrize("bad", [math.nan, INF])
@each_clip
def test_an_overflow_on_one_device_skips_the_step_on_both(clip: str, bad: float, victim: int) -> None:
    optimizer, params = make("adamw", "emulated-pair", clip_grad=CLIPS[clip])
    for step in range(2):
        set_gradients(params, step)
        optimizer.step(grad_scale=2.0)
    before = contents(optimizer)
    params[victim].grad.view(-1)[77] = bad
    optimizer.step(grad_scale=2.0)
    assert contents(optimizer) == before
    assert float(optimizer.last_step.found_inf) == 1
    set_gradients(params, 3)
    optimizer.step(grad_scale=2.0)
    assert float(optimizer.last_step.found_inf) == 0
    assert all(float(optimizer.state[param]["step"]) == 3 for param in params)


@each_clip
def test_one_device_may_have_no_gradient(clip: str) -> None:
    settings = CLIPS[clip] and {**CLIPS[clip], **({"max_norm": 1e9} if clip == "norm" else {})}  # type: ignore[dict-item]
    pair, native = (make("adamw", name, clip_grad=settings) for name in ("emulated-pair", "native"))
    for step, missing in enumerate([(1, 3, 5), (0, 2, 4), (), (0, 1, 2, 3, 4, 5), (0, 2, 4)]):
        for optimizer, params in (pair, native):
            set_gradients(params, step)
            for index in missing:
                params[index].grad = None
            optimizer.step(grad_scale=2.0)
        assert contents(pair[0]) == contents(native[0])
        reports = [optimizer.last_step for optimizer in (pair[0], native[0])]
        if clip == "norm":
            assert float(reports[0].grad_norm) == pytest.approx(float(reports[1].grad_norm), rel=1e-6)
        assert (reports[0].found_inf is None) == (reports[1].found_inf is None) == (len(missing) == 6)


@pytest.mark.parametrize("wide", [0, 1])
def test_a_float64_parameter_on_one_device_makes_the_report_float64(wide: int) -> None:
    params = parameters([(33,), (17,), (9,), (5,)])
    params[wide].data = params[wide].data.double()
    optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 0.5}, backend="emulated-pair")
    set_gradients(params, 0)
    optimizer.step(grad_scale=2.0)
    report = optimizer.last_step
    assert report.grad_norm.dtype == report.clip_coef.dtype == torch.float64
    assert report.found_inf.dtype == torch.float32
    assert float(report.grad_norm) == pytest.approx(global_norm(params) / 2, rel=1e-12)
    params[wide].grad = None  # which a sharded parameter may have in another process
    optimizer.step(grad_scale=2.0)
    assert optimizer.last_step.grad_norm.dtype == torch.float64


@pytest.mark.parametrize("norm_type", NORMS)
def test_nan_and_inf_on_one_device_reach_the_other(norm_type: float) -> None:
    for victim in range(2):
        params = parameters([(33,), (17,)])
        clip = {"max_norm": 1.0, "norm_type": norm_type}
        optimizer = fusedopt.FusedSGD(params, lr=1.0, clip_grad=clip, backend="emulated-pair")
        set_gradients(params, 0)
        params[victim].grad[3] = INF
        before = bits(params)
        optimizer.step()
        assert optimizer.last_step.grad_norm == INF
        assert optimizer.last_step.clip_coef == 0
        assert bits(params)[1 - victim] == before[1 - victim], "gradients are multiplied with 0"
        params[victim].grad[3] = math.nan
        optimizer.step()
        assert optimizer.last_step.grad_norm.isnan()
        assert all(param.isnan().all() for param in params)


@each_emulated
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("victim", [2, 3])
def test_error_if_nonfinite_changes_nothing_on_any_device(victim: int, bad: float, backend: str) -> None:
    optimizer, params = make("adamw", backend, clip_grad={"max_norm": 1.0, "error_if_nonfinite": True})
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    params[victim].grad[0] = bad
    grads = bits(param.grad for param in params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="total norm"):
            optimizer.step()
        assert contents(optimizer) == before
    assert bits(param.grad for param in params) == grads
    set_gradients(params, 1)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * len(params)


# --- Numbers as tensors ------------------------------------------------------------------------------------------


@each_emulated
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_hyperparameters_may_be_tensors_of_any_dtype(dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    def number(value: float) -> torch.Tensor:
        return torch.full(shape, value).to(dtype)

    results = []
    for name in (backend, "native"):
        optimizer, params = make("adam-decay", name, lr=number(1.0), weight_decay=number(1.0))
        for step, value in enumerate((1.0, 0.0, 1.0)):
            set_gradients(params, step, 2.0)
            optimizer.param_groups[0]["weight_decay"].fill_(value)
            optimizer.step(grad_scale=torch.full(shape, 2.0), found_inf=number(0.0))
        results.append(contents(optimizer))
    assert results[0] == results[1]


@each_emulated
def test_a_scale_and_a_bound_of_any_dtype(backend: str) -> None:
    for dtype in (*DTYPES, torch.int64):
        scale, bound = torch.tensor([2]).to(dtype), torch.tensor(1).to(dtype)
        optimizer, params = make("sgd", backend, dtype=torch.float64, clip_grad={"max_norm": bound})
        set_gradients(params, 0)
        optimizer.step(grad_scale=scale)
        norm = global_norm(params) / 2
        assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-12)
        assert float(optimizer.last_step.clip_coef) == pytest.approx(1 / (norm + 1e-6), rel=1e-12)


@each_emulated
@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_tensor_of_two_elements_is_refused_by_name(key: str, backend: str) -> None:
    optimizer, params = make("adamw", backend)
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    known = optimizer.param_groups[0][key]
    two = torch.tensor([0.1, 0.2])
    optimizer.param_groups[0][key] = (0.9, two) if key == "betas" else two
    with pytest.raises(TypeError, match=rf"param_groups\[0\]\['{key}'\] is"):
        optimizer.step()
    assert contents(optimizer) == before
    optimizer.param_groups[0][key] = known
    optimizer.step()
    assert contents(optimizer) != before


def test_a_frozen_parameter_that_no_kernel_knows_takes_no_part() -> None:
    """As one that was quantized, or that left the device, between making the optimizer and its first step."""
    optimizer, params = make("adamw", "emulated-pair", clip_grad={"max_norm": 1.0})
    plain, others = make("adamw", "emulated-pair", clip_grad={"max_norm": 1.0})
    for frozen in (params[0], others[0]):
        frozen.requires_grad_(False)
    params[0].data = torch.zeros(params[0].shape, dtype=torch.int8)
    for step in range(2):
        for opt, these in ((optimizer, params[1:]), (plain, others[1:])):
            set_gradients(these, step)
            opt.step()
        assert bits(params[1:]) == bits(others[1:])


def test_momentum_as_a_tensor_may_be_zero() -> None:
    """Whether it is cannot be known on the host, so there is a buffer in any case."""
    optimizer, params = make("sgd-momentum", "emulated", momentum=torch.tensor(0.0))
    plain, others = make("sgd", "native")
    for step in range(3):
        for opt, these in ((optimizer, params), (plain, others)):
            set_gradients(these, step)
            opt.step()
        assert bits(params) == bits(others)


def test_numbers_may_turn_into_tensors_and_back() -> None:
    optimizer, params = make("adamw", "emulated")
    other, others = make("adamw", "native")
    for step, lr in enumerate([0.1, torch.tensor(0.2), 0.3, torch.tensor(0.4), torch.tensor(0.5), 0.1]):
        for opt, these in ((optimizer, params), (other, others)):
            opt.param_groups[0]["lr"] = lr
            set_gradients(these, step)
            opt.step()
        assert contents(optimizer) == contents(other)


# --- found_inf ---------------------------------------------------------------------------------------------------


@each_emulated
@each_clip
@pytest.mark.parametrize("state", ["first step", "later step"])
@pytest.mark.parametrize("scaled", [False, True])
def test_found_inf_handed_in_skips_when_it_is_not_zero(scaled: bool, state: str, clip: str, backend: str) -> None:
    optimizer, params = make("adamw", backend, clip_grad=CLIPS[clip])
    set_gradients(params, 0)
    asked = {"grad_scale": torch.tensor(2.0)} if scaled else {}
    if state == "later step":
        optimizer.step(**asked)
    before, steps = contents(optimizer), 1.0 if state == "later step" else 0.0
    params[2].grad[0] = math.nan  # found elsewhere, and not looked for here
    for found in (torch.tensor(1.0), torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(1e-40), torch.tensor(3)):
        optimizer.step(**asked, found_inf=found)
        assert bits(params) == [param for param, _ in before]
        assert [float(optimizer.state[param]["step"]) for param in params] == [steps] * len(params)
        assert state == "first step" or contents(optimizer) == before
        assert optimizer.last_step.found_inf.shape == ()
        assert float(optimizer.last_step.found_inf) == 1
    set_gradients(params, 1)
    optimizer.step(**asked, found_inf=torch.tensor(0.0))
    assert float(optimizer.last_step.found_inf) == 0
    assert [float(optimizer.state[param]["step"]) for param in params] == [steps + 1] * len(params)


# --- Nothing to do -----------------------------------------------------------------------------------------------


@each_emulated
@each_clip
@pytest.mark.parametrize("scale", [None, 2.0])
def test_empty_gradients_count_as_steps(scale: float | None, clip: str, backend: str) -> None:
    results = []
    for name in (backend, "native"):
        optimizer, params = make("adamw", name, [(0,), (3, 0), (0,)], clip_grad=CLIPS[clip])
        for step in range(3):
            set_gradients(params, step)
            if step == 1:
                params[1].grad = None
            optimizer.step(grad_scale=scale)
            results.append((contents(optimizer), reported(optimizer)))
        assert [float(optimizer.state[param]["step"]) for param in params] == [3, 2, 3]
        if clip == "norm":
            assert (float(optimizer.last_step.grad_norm), float(optimizer.last_step.clip_coef)) == (0, 1)
        assert (optimizer.last_step.found_inf is None) == (scale is None)
    assert results[:3] == results[3:]


@each_emulated
@each_clip
def test_no_gradient_at_all_makes_no_launch(clip: str, backend: str) -> None:
    optimizer, _ = make("adamw", backend, clip_grad=CLIPS[clip])
    assert launches_of(optimizer.step) == 0
    for found in (0.0, 2.0):
        assert launches_of(lambda found=found: optimizer.step(found_inf=torch.tensor(found))) == 0  # type: ignore[misc]
        assert float(optimizer.last_step.found_inf) == (found != 0)
        if clip == "norm":
            assert (float(optimizer.last_step.grad_norm), float(optimizer.last_step.clip_coef)) == (0, 1)
    assert not optimizer.state


# --- Anything ----------------------------------------------------------------------------------------------------

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([255, 511, 513, 2047, 2048, 2049, 4099]))
PARAMETER = st.fixed_dictionaries(
    {
        "shape": st.one_of(st.just(()), st.tuples(LENGTHS), st.tuples(*[st.integers(1, 9)] * 4)),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from([*sorted(set(LAYOUTS) - {"expanded"}), "misaligned"]),
        "group": st.integers(0, 3),
    }
)
ASKED = st.fixed_dictionaries(
    {
        "missing": st.sets(st.integers(0, 7)),
        "scale": st.sampled_from([None, 1.0, 1024.0, 3.0]),
        "found_inf": st.sampled_from([None, None, 0.0, 1.0]),
        "overflow": st.one_of(st.none(), st.none(), st.integers(0, 7)),
        "layouts": st.lists(st.sampled_from([*LAYOUTS, "misaligned"]), min_size=8, max_size=8),
        "lr": st.sampled_from([0.1, 0.01]),
        "seed": st.integers(0, 99),
    }
)


def laid_out(tensor: torch.Tensor, layout: str, seed: int) -> torch.Tensor:
    if layout == "misaligned":
        return placed(tensor, seed % 9)
    fits = tensor.dim() == 4 or (layout in ("with holes", "expanded") and tensor.dim() and tensor.numel())
    return LAYOUTS[layout](tensor) if fits else tensor


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    option=st.sampled_from(sorted(OPTIONS)),
    drawn=st.lists(PARAMETER, min_size=1, max_size=8),
    clip=st.sampled_from([None, CLIPS["value"], LOOSE, {**LOOSE, "norm_type": 1.0}, {**LOOSE, "norm_type": INF}]),
    steps=st.lists(ASKED, min_size=1, max_size=4),
    order=st.integers(0, 9),
    slow_double=st.booleans(),
    write_back=st.booleans(),
)
def test_any_sequence_of_steps_has_the_bits_of_the_cpu_kernels(
    option: str,
    drawn: list[dict[str, Any]],
    clip: dict[str, Any] | None,
    steps: list[dict[str, Any]],
    order: int,
    slow_double: bool,
    write_back: bool,
) -> None:
    emulator.configure(order=order, slow_double=slow_double)
    cls, options = OPTIONS[option]
    optimizers = []
    for backend in ("native", "emulated", "emulated-pair"):
        generator = torch.Generator().manual_seed(0)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.1 * g} for g in range(4)]
        for one in drawn:
            values = torch.randn(one["shape"], generator=generator).to(one["dtype"])
            groups[one["group"]]["params"].append(nn.Parameter(laid_out(values, one["layout"], one["group"])))
        chosen = [group for group in groups if group["params"]]
        extra = {"clip_grad": clip, "write_back_grads": write_back, "backend": backend}
        optimizers.append(cls(chosen, **{**options, "weight_decay": 0.0}, **extra))
    for asked in steps:
        found_inf = None if asked["found_inf"] is None else torch.tensor(asked["found_inf"])
        for optimizer in optimizers:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            set_gradients(params, asked["seed"], asked["scale"] or 1.0)
            for index, param in enumerate(params):
                if index == asked["overflow"] and asked["scale"] and param.numel():
                    param.grad.view(-1)[-1] = INF
                layout = asked["layouts"][index]
                if not (layout == "expanded" and write_back):
                    param.grad = laid_out(param.grad, layout, asked["seed"] + index)
                if index in asked["missing"]:
                    param.grad = None
            for group in optimizer.param_groups:
                group["lr"] = asked["lr"]
            optimizer.step(grad_scale=asked["scale"], found_inf=found_inf)
        want, *others = optimizers
        for optimizer in others:
            assert contents(optimizer) == contents(want)
            assert (optimizer.last_step.found_inf is None) == (want.last_step.found_inf is None)
            if want.last_step.found_inf is not None:
                assert float(optimizer.last_step.found_inf) == float(want.last_step.found_inf)
            if want.last_step.grad_norm is not None:
                torch.testing.assert_close(
                    optimizer.last_step.grad_norm, want.last_step.grad_norm, equal_nan=True, rtol=1e-6, atol=1e-12
                )
            if write_back:
                grads = [
                    [param.grad for group in opt.param_groups for param in group["params"] if param.grad is not None]
                    for opt in (optimizer, want)
                ]
                assert bits(grads[0]) == bits(grads[1])
