"""A step in two halves, by every backend, without other processes: what is found by domain, and what is made of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    HAS_EMULATOR,
    EmulatedBackend,
    EmulatedPair,
    backend_name,
    bits,
    each_backend,
    parameters,
    set_gradients,
)
from torch import nn

import fusedopt
from fusedopt.backends import StepRequest
from fusedopt.rules import NormClip
from fusedopt.shards import Domains, domains

each_kind = pytest.mark.parametrize("backend", [*each_backend.args[1], *([EmulatedPair.name] if HAS_EMULATOR else [])])
SHAPES = [(5,), (2100,), (3, 4), (0,), (40,), (17,)]
NORMS = [1.0, 2.0, 3.0, math.inf]


def name_of(backend: str) -> str:
    return backend if backend == EmulatedPair.name else backend_name(backend)


def make(backend: str, **settings: Any) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(SHAPES)
    return fusedopt.FusedAdamW(params, lr=0.1, backend=name_of(backend), **settings), params


@pytest.fixture
def in_domains(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], Domains]:
    """Lets the parameters be in these domains, whose processes are this one."""

    def put(numbers: list[int]) -> Domains:
        found = Domains([()] * (max(numbers) + 1))
        monkeypatch.setattr(domains, "find_domains", lambda groups, share_of=None: (found, numbers))
        monkeypatch.setattr("fusedopt.optimizers.base.agree_on_parameters", lambda *_, **__: None)
        return found

    return put


def total(params: list[nn.Parameter], norm_type: float) -> float:
    grads = [param.grad.double().abs() for param in params if param.grad is not None and param.numel()]
    if norm_type == math.inf:
        return max(float(grad.max()) for grad in grads)
    return math.fsum(float(grad.pow(norm_type).sum()) for grad in grads)


@pytest.mark.parametrize("norm_type", NORMS)
@each_kind
def test_a_first_half_finds_a_total_of_each_domain(backend, norm_type, in_domains):
    numbers = [0, 1, 2, 1, 0, 2]
    in_domains(numbers)
    optimizer, params = make(backend)
    set_gradients(params, 1)
    params[4].grad = None
    before = [bits(param) for param in params]
    request = StepRequest(check=True, clip=NormClip(0.5, norm_type))
    served = optimizer._chosen_backend()
    totals = served.begin(optimizer.param_groups, optimizer.state, request, optimizer._counts)
    here = served.shards.here(totals, params[0].device, norm_type)
    assert here.shape == (3, 2)
    for number in range(3):
        mine = [param for param, each in zip(params, numbers, strict=True) if each == number]
        assert float(here[number, 0]) == pytest.approx(total(mine, norm_type), rel=1e-7)
    assert here[:, 1].tolist() == [0, 0, 0]
    served.abandon()
    assert [bits(param) for param in params] == before
    assert all(
        not state or not any(bool(value.any()) for value in state.values()) for state in optimizer.state.values()
    )


@pytest.mark.parametrize("norm_type", NORMS)
@each_kind
def test_two_halves_are_a_step(backend, norm_type, in_domains, monkeypatch):
    clip = dict(max_norm=0.5, norm_type=norm_type)
    whole, params = make(backend, clip_grad=clip)
    for seed in range(3):
        set_gradients(params, seed)
        whole.step()
    in_domains([0, 1, 2, 1, 0, 2])
    halves, others = make(backend, clip_grad=clip)
    for seed in range(3):
        set_gradients(others, seed)
        halves.step()
    torch.testing.assert_close(others, params, rtol=1e-6, atol=1e-7)
    for one, other in zip(params, others, strict=True):
        assert float(whole.state[one]["step"]) == float(halves.state[other]["step"]) == 3
    torch.testing.assert_close(halves.last_step.grad_norm, whole.last_step.grad_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@each_kind
def test_what_is_not_finite_in_one_domain_is_told_in_all_and_skips(backend, value, in_domains):
    in_domains([0, 1, 2, 1, 0, 2])
    optimizer, params = make(backend, clip_grad=dict(max_norm=1.0))
    set_gradients(params, 1)
    params[2].grad[1, 1] = value
    before = [bits(param) for param in params]
    optimizer.step(grad_scale=2.0)
    assert float(optimizer.last_step.found_inf) == 1
    assert [bits(param) for param in params] == before
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())
    set_gradients(params, 1)
    optimizer.step(grad_scale=2.0)
    assert float(optimizer.last_step.found_inf) == 0
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


@each_kind
def test_a_process_without_gradients_reports_what_the_others_found(backend, in_domains):
    found = in_domains([0] * 6)
    optimizer, _ = make(backend, clip_grad=dict(max_norm=1.0))
    found.add_up = lambda totals, largest: totals + torch.tensor([[16.0, 0.0]])  # type: ignore[method-assign]
    optimizer.step(grad_scale=2.0)
    report = optimizer.last_step
    assert (float(report.grad_norm), float(report.clip_coef), float(report.found_inf)) == (2.0, pytest.approx(0.5), 0.0)
    assert not optimizer.state


@each_kind
def test_an_error_between_the_halves_leaves_everything_and_the_next_step_is_made(backend, in_domains):
    found = in_domains([0, 1, 0, 1, 0, 1])
    optimizer, params = make(backend, clip_grad=dict(max_norm=1.0))
    set_gradients(params, 1)
    before = [bits(param) for param in params]
    add_up = found.add_up

    def broken(totals: torch.Tensor, *, largest: bool) -> torch.Tensor:
        raise ConnectionError("gone")

    found.add_up = broken  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="gone"):
        optimizer.step()
    assert [bits(param) for param in params] == before
    found.add_up = add_up  # type: ignore[method-assign]
    optimizer.step()
    assert [bits(param) for param in params] != before


@each_kind
def test_a_plan_makes_one_step_at_a_time(backend):
    if backend == "reference":
        pytest.skip("it has no plan")
    optimizer, params = make(backend)
    set_gradients(params, 1)
    request = StepRequest(check=True)
    served = optimizer._chosen_backend()
    assert served.begin(optimizer.param_groups, optimizer.state, request, optimizer._counts) is not None
    with pytest.raises(RuntimeError, match="half done"):
        optimizer.step()
    plan = served._plan
    with pytest.raises(ValueError, match=r"pairs in float64, \(n, 2\)"):
        plan.finish(torch.zeros(2))
    with pytest.raises(TypeError, match="pairs must be a tensor"):
        plan.finish(1.0)
    served.abandon()
    with pytest.raises(RuntimeError, match="no first half"):
        plan.finish(torch.zeros((1, 2), dtype=torch.float64))
    optimizer.step()


@each_kind
def test_a_given_norm_is_clipped_by_without_being_found(backend):
    clip = dict(max_norm=0.5)
    whole, params = make(backend, clip_grad=clip)
    given, others = make(backend, clip_grad=clip)
    for seed in range(3):
        set_gradients(params, seed)
        set_gradients(others, seed)
        whole.step(grad_scale=4.0)
        given.step(grad_scale=4.0, grad_norm=whole.last_step.grad_norm)
    torch.testing.assert_close(others, params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(given.last_step.grad_norm, whole.last_step.grad_norm)
    torch.testing.assert_close(given.last_step.clip_coef, whole.last_step.clip_coef)
    before = [bits(param) for param in others]
    given.step(grad_scale=4.0, grad_norm=math.inf)
    assert float(given.last_step.found_inf) == 1
    assert [bits(param) for param in others] == before
    given.step(grad_norm=math.nan)  # without a loss scale, as torch
    assert all(bool(param.isnan().all()) for param in others)


def test_a_given_norm_tells_a_stock_scaler_of_an_overflow():
    optimizer, params = make("reference", clip_grad=dict(max_norm=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for norm, scale in ((2.0, 4.0), (math.inf, 2.0)):
        scaler.scale(torch.ones(()))
        set_gradients(params, 1)
        before = [bits(param) for param in params]
        scaler.step(optimizer, grad_norm=norm)
        scaler.update()
        assert scaler.get_scale() == scale
        assert ([bits(param) for param in params] == before) is math.isinf(norm)


@each_kind
def test_a_report_is_as_precise_as_the_parameters_with_and_without_gradients(backend):
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = fusedopt.FusedSGD(params, lr=0.1, clip_grad=dict(max_norm=1.0), backend=name_of(backend))
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert optimizer.last_step.grad_norm.dtype == torch.float64


@pytest.mark.parametrize(
    ("clip", "norm", "error", "message"),
    [
        (None, 1.0, ValueError, "grad_norm is given, and clip_grad is None; expected clip_grad with max_norm"),
        (dict(type="value", clip_value=1.0), 1.0, ValueError, "expected clip_grad with max_norm"),
        (dict(max_norm=1.0), -1.0, ValueError, "Invalid grad_norm: -1.0; expected a norm >= 0"),
        (dict(max_norm=1.0), "1", TypeError, "grad_norm must be a number or a 0-dim tensor, got '1'"),
        (dict(max_norm=1.0), torch.ones(2), ValueError, r"grad_norm is a tensor of shape \(2,\)"),
        (dict(max_norm=1.0, error_if_nonfinite=True), math.nan, RuntimeError, "grad_norm is nan"),
    ],
)
def test_what_is_no_norm_is_refused(clip, norm, error, message):
    optimizer, params = make("reference", clip_grad=clip)
    set_gradients(params, 1)
    before = [bits(param) for param in params]
    with pytest.raises(error, match=message):
        optimizer.step(grad_norm=norm)
    assert [bits(param) for param in params] == before


def test_a_norm_in_a_backward_pass_is_refused():
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.FusedSGD([param], lr=0.5, clip_grad=dict(max_norm=1.0))
    param.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(RuntimeError, match="inside a backward pass would clip by the norm of a part"):
        param.sum().backward()
    assert param.tolist() == [1.0] * 3
    optimizer.clip_grad = None
    param.sum().backward()
    assert param.tolist() == [0.0, 0.0, 0.0]  # 1 - 0.5 * (1 + 1)


@pytest.mark.skipif(not HAS_EMULATOR, reason="the emulator is not built")
@pytest.mark.parametrize("backend", [EmulatedBackend.name, EmulatedPair.name])
def test_a_group_of_optimizers_on_devices(backend):
    whole, params = make(backend, clip_grad=dict(max_norm=0.5))
    _, others = make(backend)
    group = fusedopt.ClipGroup(
        [fusedopt.FusedAdamW(part, lr=0.1, backend=name_of(backend)) for part in (others[:2], others[2:])], max_norm=0.5
    )
    for seed in range(3):
        set_gradients(params, seed)
        set_gradients(others, seed)
        whole.step()
        group.step()
    torch.testing.assert_close(others, params, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(group.last_step.grad_norm, whole.last_step.grad_norm)
