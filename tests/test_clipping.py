"""Norm and value clipping: torch's results, non-finite gradients, precision of the norm."""

from __future__ import annotations

import math

import pytest
import torch
from cases import backend_name, bits, each_backend, parameters, set_gradients, state_bits
from torch import nn

import fusedopt


def one(grad: torch.Tensor, backend: str, **clip: object) -> fusedopt.FusedSGD:
    param = nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    optimizer = fusedopt.FusedSGD([param], lr=1.0, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    return optimizer


def result(optimizer: fusedopt.FusedSGD) -> torch.Tensor:
    return optimizer.param_groups[0]["params"][0].detach()


@each_backend
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_the_norm_and_the_result_are_torchs(norm_type: float, backend: str) -> None:
    params = parameters([(5,), (33, 7), ()])
    set_gradients(params, 0)
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    for copied, param in zip(copies, params, strict=True):
        copied.grad = param.grad.clone()
    clip = {"max_norm": 0.7, "norm_type": norm_type}
    optimizer = fusedopt.FusedSGD(params, lr=1.0, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(copies, 0.7, norm_type)
    torch.optim.SGD(copies, lr=1.0, foreach=False).step()
    torch.testing.assert_close(optimizer.last_step.grad_norm, norm)
    torch.testing.assert_close(params, copies)


@each_backend
def test_gradients_below_the_bound_are_not_touched(backend: str) -> None:
    grad = torch.tensor([0.1, -0.2, 0.3])
    optimizer = one(grad, backend, max_norm=10.0)
    assert torch.equal(result(optimizer), -grad)
    assert float(optimizer.last_step.clip_coef) == 1.0


@each_backend
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_nan_reaches_every_gradient_as_in_torch(norm_type: float, backend: str) -> None:
    optimizer = one(torch.tensor([1.0, math.nan, 2.0]), backend, max_norm=1.0, norm_type=norm_type)
    assert result(optimizer).isnan().all()
    assert optimizer.last_step.grad_norm.isnan()
    assert optimizer.last_step.clip_coef.isnan()


@each_backend
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("place", [0, 20_000, 40_000, -1])
def test_nan_in_any_part_of_a_large_gradient_reaches_the_norm(place: int, norm_type: float, backend: str) -> None:
    grad = torch.ones(50_000)  # several chunks, whose norms are put together
    grad[place] = math.nan
    assert one(grad, backend, max_norm=1.0, norm_type=norm_type).last_step.grad_norm.isnan()


@each_backend
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_inf_makes_the_others_zero_as_in_torch(norm_type: float, backend: str) -> None:
    optimizer = one(torch.tensor([1.0, math.inf, 2.0]), backend, max_norm=1.0, norm_type=norm_type)
    assert optimizer.last_step.grad_norm == math.inf
    assert optimizer.last_step.clip_coef == 0
    got = result(optimizer)
    assert got[1].isnan()
    assert got[0] == 0
    assert got[2] == 0


@each_backend
def test_infinite_bound_only_reports(backend: str) -> None:
    grad = torch.tensor([3.0, 4.0])
    optimizer = one(grad, backend, max_norm=math.inf)
    assert float(optimizer.last_step.grad_norm) == 5.0
    assert torch.equal(result(optimizer), -grad)
    optimizer = one(torch.tensor([3.0, math.inf]), backend, max_norm=math.inf)
    assert result(optimizer).tolist() == [-3.0, -math.inf]


@each_backend
def test_max_norm_may_be_a_tensor_and_is_read_each_step(backend: str) -> None:
    param = nn.Parameter(torch.zeros(2))
    bound = torch.tensor(5.0)
    clip = {"max_norm": bound}
    optimizer = fusedopt.FusedSGD([param], lr=1.0, clip_grad=clip, backend=backend_name(backend))
    param.grad = torch.tensor([6.0, 8.0])
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-3.0, -4.0]))
    bound.fill_(10.0)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.tensor([-9.0, -12.0]))


@each_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_error_if_nonfinite_raises_before_anything_changed(bad: float, backend: str) -> None:
    params = parameters([(5,), (17,)])
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    optimizer = fusedopt.FusedAdamW(params, clip_grad=clip, backend=backend_name(backend))
    set_gradients(params, 0)
    optimizer.step()
    before, state = bits(params), state_bits(optimizer)
    params[1].grad[3] = bad
    with pytest.raises(RuntimeError, match="total norm"):
        optimizer.step()
    assert bits(params) == before
    assert state_bits(optimizer) == state
    # An overflow that the scaler handles is no error.
    optimizer.step(grad_scale=2.0)
    assert bits(params) == before
    assert float(optimizer.last_step.found_inf) == 1.0


@each_backend
def test_error_if_nonfinite_on_the_first_step_leaves_no_state(backend: str) -> None:
    params = parameters([(5,)])
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    optimizer = fusedopt.FusedAdamW(params, clip_grad=clip, backend=backend_name(backend))
    params[0].grad = torch.full((5,), math.nan)
    with pytest.raises(RuntimeError, match="total norm"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}


@each_backend
def test_squares_do_not_overflow(backend: str) -> None:
    """fairscale#263: the square of a large fp32 gradient is infinite in fp32."""
    optimizer = one(torch.full((1000,), 1e30), backend, max_norm=1.0)
    assert float(optimizer.last_step.grad_norm) == pytest.approx(1e30 * math.sqrt(1000), rel=1e-6)
    assert result(optimizer).norm() == pytest.approx(1.0, rel=1e-5)


@each_backend
def test_half_precision_norm_is_not_rounded(backend: str) -> None:
    """torchtitan#4135: a norm computed in bf16 gives 3.15625 here."""
    params = [nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16)) for _ in range(100)]
    for param in params:
        param.grad = torch.full((1000,), 0.01, dtype=torch.bfloat16)
    clip = {"max_norm": math.inf}
    optimizer = fusedopt.FusedSGD(params, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    assert float(optimizer.last_step.grad_norm) == pytest.approx(float(params[0].grad[0]) * math.sqrt(1e5), rel=1e-6)


@each_backend
def test_finite_fp64_values_whose_squares_overflow_are_not_reported_as_inf(backend: str) -> None:
    param = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    param.grad = torch.full((20,), 1e200, dtype=torch.float64)
    optimizer = fusedopt.FusedSGD([param], clip_grad={"max_norm": 1.0}, backend=backend_name(backend))
    optimizer.step(grad_scale=1.0)
    assert float(optimizer.last_step.found_inf) == 0.0
    assert optimizer.last_step.grad_norm == math.inf


@each_backend
def test_nothing_to_clip(backend: str) -> None:
    params = parameters([(5,), (0,)])
    clip = {"max_norm": 1.0}
    optimizer = fusedopt.FusedSGD(params, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    assert float(optimizer.last_step.grad_norm) == 0.0
    params[1].grad = torch.zeros(0)
    optimizer.step()
    assert float(optimizer.last_step.grad_norm) == 0.0


@each_backend
def test_nobody_asked_so_nothing_is_reported(backend: str) -> None:
    params = parameters([(5,)])
    optimizer = fusedopt.FusedSGD(params, backend=backend_name(backend))
    assert optimizer.last_step is None
    set_gradients(params, 0)
    optimizer.step()
    report = optimizer.last_step
    assert (report.grad_norm, report.clip_coef, report.found_inf) == (None, None, None)


def test_settings_are_validated_copied_and_kept() -> None:
    mine = {"max_norm": 1.0, "norm_type": 2, "foreach": True}
    optimizer = fusedopt.FusedAdamW(parameters([(5,)]), clip_grad=mine)
    assert mine == {"max_norm": 1.0, "norm_type": 2, "foreach": True}
    assert optimizer.clip_grad == {"type": "norm", "max_norm": 1.0, "norm_type": 2.0, "error_if_nonfinite": False}
    assert "clip_grad" not in optimizer.defaults
    optimizer.clip_grad = {"type": "value", "clip_value": 3.0}
    assert optimizer.clip_grad == {"type": "value", "clip_value": 3.0}
    optimizer.clip_grad = None
    assert optimizer.clip_grad is None


@each_backend
def test_a_norm_beyond_the_range_of_float_is_finite_all_the_same(backend: str) -> None:
    """What counts is the norm as it was found, in double, and not as it is reported."""
    params = [torch.nn.Parameter(torch.zeros(10)) for _ in range(10)]
    for param in params:
        param.grad = torch.full_like(param, 3e38)
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    optimizer = fusedopt.FusedSGD(params, lr=1.0, clip_grad=clip, backend=backend_name(backend))
    optimizer.step()
    assert float(params[0].detach()[0]) == pytest.approx(-0.1, rel=1e-4)
    assert optimizer.last_step.grad_norm.dtype == torch.float32
