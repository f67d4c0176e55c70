"""Lengths in epochs that are no whole number of iterations: MMEngine's values, whatever the data."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.training.schedulers import CosineAnnealingLR, StepLR, build_param_schedulers

mmengine_optim = pytest.importorskip("mmengine.optim", reason="mmengine is not installed")
mmengine_registry = pytest.importorskip("mmengine.registry", reason="mmengine is not installed")

#: What takes a length in epochs, and whether something of it lies between two iterations there.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "CosineAnnealingLR": (dict(T_max=4.5, eta_min=0.01), False),
    "CosineAnnealingLR-up": (dict(T_max=1.5), False),
    "CosineAnnealingLR-span": (dict(begin=0.5, end=3.3), False),
    "CosineAnnealingMomentum": (dict(T_max=4.5), False),
    "CosineAnnealingParamScheduler": (dict(param_name="weight_decay", T_max=2.25), False),
    "CosineRestartLR": (dict(periods=[1.5, 2.5], restart_weights=[1, 0.5], eta_min=0.01), True),
    "CosineRestartMomentum": (dict(periods=[3.5], restart_weights=[0.5], eta_min=0.01), False),
    "StepLR": (dict(step_size=0.5, gamma=0.5), False),
    "StepLR-long": (dict(step_size=1.5, gamma=0.5), False),
    "StepMomentum": (dict(step_size=1.25, gamma=0.5), False),
    "MultiStepLR": (dict(milestones=[1, 2.5, 4.5], gamma=0.5), True),
    "MultiStepMomentum": (dict(milestones=[0.5, 2], gamma=0.5), True),
    "LinearLR": (dict(start_factor=0.1, begin=0.3, end=2.7), False),
    "LinearMomentum": (dict(start_factor=0.1, end=2.7), False),
    "PolyLR": (dict(power=2.0, eta_min=0.01, begin=0.5, end=4.5), False),
    "PolyMomentum": (dict(power=0.5, end=4.9), False),
    "ConstantLR": (dict(factor=0.5, begin=0.5, end=2.5), False),
    "ConstantMomentum": (dict(factor=0.5, end=2.5), False),
    "ExponentialLR": (dict(gamma=0.9, begin=0.7, end=2.6), False),
    "ExponentialMomentum": (dict(gamma=0.9, begin=0.7, end=2.6), False),
}


def values(build: Any, steps: int) -> list[tuple[float, float, float]]:
    param = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([param], lr=0.5, momentum=0.9, weight_decay=0.25)
    scheduler = build(optimizer)
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((group["lr"], group["momentum"], group["weight_decay"]))
        optimizer.step()
        scheduler.step()
    return found


def ours(cfg: dict[str, Any], epoch_length: int) -> Any:
    def build(optimizer: torch.optim.Optimizer) -> Any:
        [scheduler] = build_param_schedulers({**cfg, "convert_to_iter_based": True}, optimizer, epoch_length)
        return scheduler

    return build


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("epoch_length", [1, 2, 4, 7, 8, 10, 25])
def test_values_are_mmengines(case, epoch_length):
    settings, may_lie_between = CASES[case]
    kind = case.partition("-")[0]
    lengths = [each for key in ("T_max", "step_size", "periods") for each in _listed(settings.get(key))]
    cfg = dict(type=kind, **settings)
    if any(each * epoch_length < 1 for each in lengths):
        with pytest.raises(ValueError, match=r"expected a number >= 1"):
            values(ours(cfg, epoch_length), 1)
        return
    fractions = [each * epoch_length % 1 for key in ("milestones", "periods") for each in _listed(settings.get(key))]
    expects_warning = may_lie_between and any(fractions[: len(fractions) if "milestones" in settings else -1])
    span = {key: settings[key] for key in ("begin", "end") if key in settings}
    if int(span.get("end", 9) * epoch_length) - int(span.get("begin", 0) * epoch_length) < 3:
        pytest.skip("a span of so few steps is refused, or divides by 0 there")
    steps = 6 * epoch_length + 3
    warned = pytest.warns(UserWarning, match="lies between two iterations")
    with warned if expects_warning else contextlib.nullcontext():
        found = values(ours(cfg, epoch_length), steps)
    cls = mmengine_registry.PARAM_SCHEDULERS.get(kind)
    expected = values(partial(cls.build_iter_from_epoch, epoch_length=epoch_length, **settings), steps)
    assert torch.tensor(found, dtype=torch.float64).allclose(
        torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def test_the_config_that_was_refused():
    """mmaction2 has a cosine of 4.5 epochs; with 7 iterations in one it is 31.5 of them."""
    found = values(ours(dict(type="CosineAnnealingLR", T_max=4.5, eta_min=0.0), 7), 32)
    for step, (lr, _, _) in enumerate(found):
        assert math.isclose(lr, 0.5 * (1 + math.cos(math.pi * step / 31.5)) / 2, abs_tol=1e-12)


def test_without_iterations_a_cosine_may_be_a_fraction_too():
    settings = dict(T_max=4.5, eta_min=0.01)
    assert torch.tensor(values(lambda optimizer: CosineAnnealingLR(optimizer, **settings), 12)).allclose(
        torch.tensor(values(lambda optimizer: mmengine_optim.CosineAnnealingLR(optimizer, **settings), 12))
    )


@pytest.mark.parametrize("epoch_length", [7, 8])
@pytest.mark.parametrize(
    ("cfg", "name"),
    [
        (dict(type="OneCycleLR", eta_max=0.5, total_steps=4.5), "total_steps"),
        (dict(type="CosineAnnealingWarmRestarts", T_0=4.5), "T_0"),
        (dict(type="SWALR", swa_lr=0.1, anneal_epochs=4.5), "anneal_epochs"),
    ],
)
def test_what_takes_no_fraction_takes_none_whatever_the_data(cfg, name, epoch_length):
    with pytest.raises(ValueError, match=rf"Invalid {name}: 4\.5; expected a whole number of epochs"):
        values(ours(cfg, epoch_length), 1)


@pytest.mark.parametrize("epoch_length", [7, 8])
def test_a_cycle_of_torchs_may_be_a_fraction(epoch_length):
    cfg = dict(type="CyclicLR", base_lr=0.1, max_lr=0.5, step_size_up=1.5, step_size_down=2.5, cycle_momentum=False)
    up, down = 1.5 * epoch_length, 2.5 * epoch_length
    for step, (lr, _, _) in enumerate(values(ours(cfg, epoch_length), 30)):
        share = step % (up + down)
        share = share / up if share <= up else (up + down - share) / down
        assert math.isclose(lr, 0.1 + 0.4 * share, abs_tol=1e-9)


def test_rounding_errors_are_no_fractions():
    """1.1 times 10 is 11.000000000000002; MMEngine's StepLR is then never due."""
    found = [lr for lr, _, _ in values(ours(dict(type="StepLR", step_size=1.1, gamma=0.5), 10), 23)]
    assert found == [0.5] * 11 + [0.25] * 11 + [0.125]


@pytest.mark.parametrize("value", [1.5, "2", None])
def test_steps_that_are_given_as_such_are_whole(value):
    optimizer = fusedopt.FusedSGD([nn.Parameter(torch.ones(1))])
    with pytest.raises((TypeError, ValueError), match="Invalid step_size"):
        StepLR(optimizer, step_size=value)
