"""What runs first on a GPU: a few steps of each rule with each combination of dtypes, in each mode of the kernels.

And with state in fewer bits, whose kernels are others, compared as the self-test does.

`.ci/gpu` runs these before all else, each launch waited for, and ends when one fails. Without a GPU they run emulated.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import GPU, HAS_EMULATOR, INF, OPTIONS, SHORT, backend_name, bits, global_norm, parameters, set_gradients
from oracle import CheckedStep

from fusedopt import backends
from fusedopt.backends import selftest
from fusedopt.rules import RULES, Precision


def variants() -> list[str]:
    """The options that stand for each rule, and one for each number of states that is not among them."""
    found: dict[tuple[str, int], list[str]] = {}
    for option, (cls, settings) in OPTIONS.items():
        states = len(cls.rule.needed_columns(cls.rule.hyperparameters().as_defaults() | settings))
        found.setdefault((cls.rule.name, states), []).append(option)
    return [option for alike in found.values() for option in ([x for x in alike if x in SHORT] or alike[:1])]


#: Of the parameters, the gradients and the state.
DTYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64, torch.float64),
    "bf16-grads": (torch.float32, torch.bfloat16, torch.float32),
    "fp16-grads": (torch.float32, torch.float16, torch.float32),
    "fp32-states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bf16-states": (torch.float32, torch.float32, torch.bfloat16),
}
#: One element, less and more than a vector, and several chunks.
SHAPES = [(), (7,), (33, 5), (5003,)]
MODES = ("bare", "check", "full")
SCALE, MAX_NORM = 64.0, 0.5

BACKENDS = ["emulated"] * HAS_EMULATOR
BACKENDS += [pytest.param("native-cuda", marks=pytest.mark.gpu)] * GPU
if not BACKENDS:
    BACKENDS = [pytest.param("", marks=pytest.mark.skip(reason="neither a GPU nor an emulator"))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("option", variants())
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_follow_the_formula(backend: str, option: str, dtypes: str, mode: str) -> None:
    param_dtype, grad_dtype, state_dtype = DTYPES[dtypes]
    cls, settings = OPTIONS[option]
    params = parameters(SHAPES, param_dtype)
    if grad_dtype != param_dtype and not hasattr(params[0], "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype, so gradients always have their parameter's dtype")
    clip = {"max_norm": MAX_NORM} if mode == "full" else None
    optimizer = cls(params, **settings, clip_grad=clip, backend=backend_name(backend))
    arguments = {} if mode == "bare" else {"grad_scale": SCALE}

    def set_all(seed: int) -> None:
        set_gradients(params, seed, arguments.get("grad_scale", 1.0))
        if grad_dtype != param_dtype:
            for param in params:
                grad, param.grad = param.grad, None
                param.grad_dtype = None
                param.grad = grad.to(grad_dtype)

    for step in range(3):
        set_all(step)
        norm = global_norm(params) / arguments.get("grad_scale", 1.0)
        coefficient = min(1.0, MAX_NORM / (norm + 1e-6)) if clip else 1.0
        check = CheckedStep(optimizer, coefficient / arguments.get("grad_scale", 1.0))
        optimizer.step(**arguments)
        check.check()
        if clip:
            assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-6)
        for state in optimizer.state.values():
            state.update({name: value.to(state_dtype) for name, value in state.items() if name != "step"})
    if mode == "bare":
        return
    set_all(3)
    params[-1].grad[-1] = -INF
    before = bits([*params, *(value for state in optimizer.state.values() for value in state.values())])
    optimizer.step(**arguments)
    assert float(optimizer.last_step.found_inf) == 1
    assert bits([*params, *(value for state in optimizer.state.values() for value in state.values())]) == before
    assert not clip or not math.isfinite(float(optimizer.last_step.grad_norm))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", range(len(selftest._KEPT)), ids=lambda kept: str(selftest._KEPT[kept][1]))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_state_in_fewer_bits_are_the_reference_s(backend: str, rule: str, kept: int, mode: str) -> None:
    dtype, settings = selftest._KEPT[kept]
    precision = selftest.on_trial(Precision.parse(RULES[rule], **settings))
    kind, device = backends.BACKENDS[backend_name(backend)], torch.empty(()).device
    assert selftest.try_mode(kind, RULES[rule], device, dtype, mode, precision) is None
