"""Every optimizer, option, dtype and backend against the formula in float64, on ragged shapes over several steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    ISAS,
    OPTIONS,
    SMALL,
    backend_name,
    bits,
    each_backend,
    each_dtype,
    each_optimizer,
    each_option,
    each_short_option,
    global_norm,
    parameters,
    set_gradients,
    shapes_for,
)
from optimizers import TESTED
from oracle import CheckedStep

import fusedopt


def make(option: str, backend: str, dtype: torch.dtype, **extra: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    cls, settings = OPTIONS[option]
    name = backend_name(backend)
    params = parameters(shapes_for(backend), dtype)
    return cls(params, **settings, **extra, backend=name), params


@each_dtype
@each_backend
@each_option
def test_step_follows_the_formula(option: str, backend: str, dtype: torch.dtype) -> None:
    optimizer, params = make(option, backend, dtype)
    for step in range(4):
        set_gradients(params, step)
        if step == 2:
            params[3].grad = None
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()


@each_dtype
@each_backend
@each_short_option
def test_unscale_and_norm_clip_happen_inside_the_step(option: str, backend: str, dtype: torch.dtype) -> None:
    optimizer, params = make(option, backend, dtype, clip_grad={"max_norm": 0.5})
    for step in range(3):
        set_gradients(params, step, scale=64.0)
        norm = global_norm(params) / 64
        coefficient = min(1.0, 0.5 / (norm + 1e-6))
        before = bits(param.grad for param in params)
        check = CheckedStep(optimizer, coefficient / 64)
        optimizer.step(grad_scale=torch.tensor(64.0))
        check.check()
        report = optimizer.last_step
        assert float(report.grad_norm) == pytest.approx(norm, rel=1e-6)
        assert float(report.clip_coef) == pytest.approx(coefficient, rel=1e-6)
        assert float(report.found_inf) == 0
        assert bits(param.grad for param in params) == before, "gradients are not written"


@each_backend
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, 0.5, math.inf])
def test_every_norm(norm_type: float, backend: str) -> None:
    optimizer, params = make("adamw", backend, torch.float32, clip_grad={"max_norm": 0.1, "norm_type": norm_type})
    set_gradients(params, 0)
    norm = global_norm(params, norm_type)
    check = CheckedStep(optimizer, 0.1 / (norm + 1e-6))
    optimizer.step()
    check.check()
    assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)


@each_dtype
@each_backend
def test_value_clip(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = make("adamw", backend, dtype, clip_grad={"type": "value", "clip_value": 0.25})
    set_gradients(params, 0, scale=8.0)
    check = CheckedStep(optimizer, 1 / 8, clip_value=0.25)
    optimizer.step(grad_scale=8.0)
    check.check()
    assert optimizer.last_step.grad_norm is None
    assert optimizer.last_step.clip_coef is None


@each_backend
def test_value_clip_keeps_nan_and_bounds_inf(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.tensor([math.nan, math.inf, -math.inf, 0.5])
    clip = {"type": "value", "clip_value": 2.0}
    optimizer = fusedopt.FusedSGD([param], lr=1.0, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    assert param.detach()[0].isnan()
    assert param[1:].tolist() == [-2.0, 2.0, -0.5]


@each_dtype
@each_backend
def test_write_back_leaves_the_clipped_gradient(backend: str, dtype: torch.dtype) -> None:
    optimizer, params = make("adamw", backend, dtype, clip_grad={"max_norm": 0.5}, write_back_grads=True)
    set_gradients(params, 0, scale=4.0)
    multiplier = 0.5 / (global_norm(params) / 4 + 1e-6) / 4
    want = [(param.grad.double() * multiplier).to(dtype) for param in params]
    check = CheckedStep(optimizer, multiplier)
    optimizer.step(grad_scale=4.0)
    check.check()
    for param, grad in zip(params, want, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=torch.finfo(dtype).eps, atol=1e-7)


@each_backend
def test_write_back_leaves_gradients_of_a_skipped_step(backend: str) -> None:
    optimizer, params = make("adamw", backend, torch.float32, write_back_grads=True)
    set_gradients(params, 0)
    params[5].grad[3] = math.inf
    before = bits(param.grad for param in params)
    optimizer.step(grad_scale=4.0)
    assert bits(param.grad for param in params) == before


@each_backend
@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_of_param_and_state_may_differ(param_dtype: torch.dtype, grad_dtype: torch.dtype, backend: str) -> None:
    optimizer, params = make("adam-amsgrad", backend, param_dtype)
    set_gradients(params, 0)
    optimizer.step()
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state[name] = state[name].to(grad_dtype)
    for step in range(1, 3):
        set_gradients(params, step)
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()
        assert all(state["exp_avg"].dtype == grad_dtype for state in optimizer.state.values())


@each_backend
def test_dtype_of_the_gradient_may_differ_where_torch_allows_it(backend: str) -> None:
    params = parameters(SMALL, torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, clip_grad={"max_norm": 1.0}, backend=backend_name(backend))
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype, so gradients always have their parameter's dtype")
    for index, param in enumerate(params):
        param.grad_dtype = (torch.bfloat16, torch.float16, torch.float32)[index % 3]
        param.grad = torch.randn(param.shape).to(param.grad_dtype)
    check = CheckedStep(optimizer, min(1.0, 1.0 / (global_norm(params) + 1e-6)))
    optimizer.step()
    check.check()


@each_backend
def test_mixed_dtypes_and_hyperparameters_in_one_optimizer(backend: str) -> None:
    groups = []
    for index, dtype in enumerate([torch.float32, torch.bfloat16, torch.float64, torch.float16] * 2):
        groups.append({"params": parameters(SMALL, dtype, seed=index), "lr": 0.01 * (index + 1), "amsgrad": index > 3})
    optimizer = fusedopt.FusedAdam(groups, weight_decay=0.1, clip_grad={"max_norm": 1.0}, backend=backend_name(backend))
    params = [param for group in groups for param in group["params"]]
    for step in range(3):
        set_gradients(params, step)
        check = CheckedStep(optimizer, min(1.0, 1.0 / (global_norm(params) + 1e-6)))
        optimizer.step()
        check.check()
    assert optimizer.last_step.grad_norm.dtype == torch.float64


@each_short_option
def test_all_instruction_sets_give_the_same_bits(option: str) -> None:
    if len(ISAS) < 2:
        pytest.skip(f"this processor and build have fewer than two instruction sets: {ISAS}")
    results = []
    for backend in [f"native-{isa}" for isa in ISAS]:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            optimizer, params = make(option, backend, dtype, clip_grad={"max_norm": 0.5})
            for step in range(3):
                set_gradients(params, step)
                optimizer.step(grad_scale=2.0)
            results.append((dtype, bits(params), bits([optimizer.last_step.grad_norm])))
    for dtype, *result in results[4:]:
        assert result == next(list(first[1:]) for first in results if first[0] == dtype)


@each_backend
@each_optimizer
def test_every_hyperparameter_is_taken_for_what_it_is(cls: Any, backend: str) -> None:
    base, others = TESTED[cls.rule.name].matters
    ignored = {"foreach", "fused", "capturable", "differentiable"}
    assert {key for key, _ in others} == set(cls.rule.hyperparameters().as_defaults()) - ignored
    for key, value in base.items():
        if isinstance(value, tuple):
            varied = [{i for i in range(len(value)) if value[i] != other[i]} for name, other in others if name == key]
            assert sorted(varied, key=min) == [{i} for i in range(len(value))], f"{key}: one number at a time"
    values = torch.randn(16)
    params = [torch.nn.Parameter(values.clone()) for _ in range(len(others) + 1)]
    optimizer = cls([{"params": [param], **base} for param in params], backend=backend_name(backend))
    for group, (key, value) in zip(optimizer.param_groups[1:], others, strict=True):
        group[key] = not value if group[key] is value else value  # a flag may be set in this class
    for _ in range(4):
        grad = torch.randn(16)  # of either sign, and so that moments and gradients do not agree
        for param in params:
            param.grad = grad
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()
    assert len(set(bits(params))) == len(params), "each made a difference"


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_any_number_of_threads_gives_the_same_bits(norm_type: float) -> None:
    def run(threads: int) -> list[bytes]:
        torch.set_num_threads(threads)
        params = parameters([(300_001,), (17,), (64, 999)])
        optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 0.5, "norm_type": norm_type})
        for step in range(2):
            set_gradients(params, step)
            optimizer.step(grad_scale=2.0)
        return bits([*params, optimizer.last_step.grad_norm])

    assert run(1) == run(2) == run(3)


def test_a_second_thread_takes_part_of_the_chunks() -> None:
    """Without -fopenmp at::parallel_for is silently serial; seen from the processor time that each thread used."""
    import os

    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor only")
    params = parameters([(4_000_000,)])
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)

    def times() -> dict[str, int]:
        ticks = {}
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/schedstat") as file:
                ticks[thread] = int(file.read().split()[0])
        return ticks

    torch.set_num_threads(2)
    optimizer.step()
    before = times()
    for _ in range(10):
        optimizer.step()
    after = times()
    used = sorted((after[thread] - before.get(thread, 0) for thread in after), reverse=True)
    assert used[1] > 0.1 * used[0], f"threads used {used} ns"
