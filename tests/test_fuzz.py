"""Hypothesis: random shapes, dtypes, groups, missing gradients, skips and edits against the formula and torch."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from cases import BACKENDS, DTYPES, OPTIMIZERS, backend_name, bits, global_norm, lacks, state_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizers import TESTED
from oracle import CheckedStep
from torch import nn

import fusedopt
from fusedopt.rules import Rule

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 511, 513, 16383, 16384, 16385]))
SHAPES = st.one_of(st.just(()), st.tuples(SIZES), st.tuples(st.integers(0, 5), st.integers(1, 30), st.integers(1, 9)))

GROUPS = st.lists(
    st.fixed_dictionaries(
        {
            "shapes": st.lists(SHAPES, min_size=1, max_size=4),
            "dtype": st.sampled_from(DTYPES),
            "lr": st.sampled_from([0.0, 1e-3, 0.1]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


def settings_of(rule: Rule) -> st.SearchStrategy[dict[str, Any]]:
    """What else a group of a rule may have: each setting its default, or a value with which it matters."""
    base, others = TESTED[rule.name].matters
    choices = {key: [value] for key, value in rule.hyperparameters().as_defaults().items()}
    for key, value in (*base.items(), *others):
        choices[key].append(value)
    drawn_already = ("lr", "weight_decay", "maximize")
    strategies = {key: st.sampled_from(values) for key, values in choices.items() if key not in drawn_already}
    return st.fixed_dictionaries(strategies).filter(lambda settings: is_valid(rule, settings))


def is_valid(rule: Rule, settings: dict[str, Any]) -> bool:
    try:
        rule.hyperparameters(**settings)
    except ValueError:
        return False
    return True


STEP = st.fixed_dictionaries(
    {
        "missing": st.sets(st.integers(0, 15)),
        "scale": st.sampled_from([None, 1.0, 1024.0]),
        "overflow": st.one_of(st.none(), st.integers(0, 15)),
        "strided": st.booleans(),
        "reload": st.booleans(),
        "lr_factor": st.sampled_from([1.0, 0.5]),
    }
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_sequence_of_steps_follows_the_formula(data: st.DataObject) -> None:
    cls = data.draw(st.sampled_from(OPTIMIZERS))
    backend = data.draw(st.sampled_from([name for name in BACKENDS if lacks(name, cls.rule) is None]))
    max_norm = data.draw(st.sampled_from([None, 0.5, 1e6]))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    groups = []
    for drawn in data.draw(GROUPS):
        options = {key: value for key, value in drawn.items() if key not in ("shapes", "dtype")}
        params = [nn.Parameter(torch.randn(shape).to(drawn["dtype"])) for shape in drawn["shapes"]]
        groups.append({"params": params, **options, **data.draw(settings_of(cls.rule))})
    optimizer = cls(
        groups,
        lr=0.1,
        clip_grad=None if max_norm is None else {"max_norm": max_norm},
        backend=backend_name(backend),
    )
    params = [param for group in optimizer.param_groups for param in group["params"]]

    for drawn in data.draw(st.lists(STEP, min_size=1, max_size=5)):
        scale = drawn["scale"] or 1.0
        for index, param in enumerate(params):
            param.grad = None
            if index not in drawn["missing"]:
                grad = torch.randn(param.shape) * scale
                if drawn["strided"] and grad.dim() == 3:
                    grad = grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
                param.grad = grad.to(param.dtype)
        overflows = False
        with_grad = [param for param in params if param.grad is not None and param.numel()]
        if drawn["overflow"] is not None and with_grad and drawn["scale"]:
            victim = with_grad[drawn["overflow"] % len(with_grad)]
            victim.grad.view(-1)[-1:].fill_(float("inf")) if victim.grad.is_contiguous() else victim.grad.fill_(
                float("nan")
            )
            overflows = True
        for group in optimizer.param_groups:
            group["lr"] *= drawn["lr_factor"]

        before, state_before = bits(params), state_bits(optimizer)
        multiplier = 1.0
        if not overflows:
            norm = global_norm(params) / scale
            multiplier = (1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))) / scale
            check = CheckedStep(optimizer, multiplier)
        optimizer.step(grad_scale=drawn["scale"])
        if overflows:
            assert bits(params) == before
            assert state_bits(optimizer) == state_before
            assert float(optimizer.last_step.found_inf) == 1
        else:
            check.check()
        if drawn["reload"]:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@settings(max_examples=40, deadline=None)
@given(
    grads=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    norm_type=st.sampled_from([1.0, 2.0, float("inf")]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_gradient_gives_torchs_norm_and_finiteness(grads: list[float], norm_type: float, backend: str) -> None:
    param = nn.Parameter(torch.zeros(len(grads)))
    param.grad = torch.tensor(grads)
    clip = {"max_norm": 1.0, "norm_type": norm_type}
    optimizer = fusedopt.FusedSGD([param], lr=0.1, clip_grad=clip, backend=backend_name(backend))
    want = torch.linalg.vector_norm(param.grad.double(), norm_type).float()
    optimizer.step(grad_scale=1.0)
    torch.testing.assert_close(optimizer.last_step.grad_norm, want, equal_nan=True, rtol=1e-6, atol=0)
    assert bool(optimizer.last_step.found_inf) != bool(param.grad.isfinite().all())


#: Numbers of every size; and near the halfway points of float16, where rounding to float32 first would go wrong.
TO_ROUND = st.one_of(
    st.floats(width=64, allow_nan=True, allow_infinity=True),
    st.builds(
        lambda half, nudge: float(np.float16(half)) * (1 + 2**-11) + nudge * 2**-40,
        st.floats(0.5, 1),
        st.integers(-1, 1),
    ),
)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(TO_ROUND, min_size=1, max_size=80),
    backend=st.sampled_from([name for name in BACKENDS if name != "reference"]),
    source=st.sampled_from([torch.float32, torch.float64]),
)
def test_stores_round_once_to_nearest_even(values: list[float], backend: str, source: torch.dtype) -> None:
    """The first step of SGD with momentum copies the gradient into the buffer: it is converted and nothing else."""
    param = nn.Parameter(torch.zeros(len(values), dtype=source))
    optimizer = fusedopt.FusedSGD([param], lr=0.0, momentum=0.5, backend=backend_name(backend))
    grad = torch.tensor(values, dtype=torch.float64).to(source)
    for dtype in (torch.float16, torch.bfloat16):
        optimizer.state[param] = {"momentum_buffer": torch.zeros(len(values), dtype=dtype)}
        optimizer._counts.put(param, optimizer.state[param]["momentum_buffer"], torch.tensor(0.0))
        param.grad = grad.clone()
        optimizer.step()
        got = optimizer.state[param]["momentum_buffer"]
        for exact, stored in zip(grad.tolist(), got.tolist(), strict=True):
            if dtype == torch.float16:
                with np.errstate(over="ignore"):
                    want = float(np.float64(exact).astype(np.float16))  # numpy rounds once
            else:
                want = nearest_bfloat16(exact)
            assert stored == want or (math.isnan(stored) and math.isnan(want)), exact


def nearest_bfloat16(value: float) -> float:
    """The bfloat16 nearest to a float64, ties to even, from exact rational arithmetic."""
    if not math.isfinite(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 8, -133)
    scaled = Fraction(value) / Fraction(2) ** exponent
    rounded = round(scaled) * Fraction(2) ** exponent  # round() takes ties to even
    return (
        math.copysign(math.inf, value) if abs(rounded) > Fraction(torch.finfo(torch.bfloat16).max) else float(rounded)
    )
