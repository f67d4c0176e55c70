"""Schedulers against torch's, and torch's own driving our optimizers."""

from __future__ import annotations

import pytest
import torch
from schedules import OPTIMIZERS, assert_same, parameter_groups, values
from torch.optim import lr_scheduler

import fusedopt
from fusedopt.training import schedulers

#: Ours, torch's, and the arguments of both, for 12 steps.
TORCH_TWINS = {
    "StepLR": (dict(step_size=3, gamma=0.5), lr_scheduler.StepLR, dict(step_size=3, gamma=0.5)),
    "MultiStepLR": (dict(milestones=[2, 5, 5]), lr_scheduler.MultiStepLR, dict(milestones=[2, 5, 5])),
    "ConstantLR": (dict(factor=0.3, end=6), lr_scheduler.ConstantLR, dict(factor=0.3, total_iters=5)),
    "LinearLR": (
        dict(start_factor=0.1, end_factor=0.8, end=8),
        lr_scheduler.LinearLR,
        dict(start_factor=0.1, end_factor=0.8, total_iters=7),
    ),
    "ExponentialLR": (dict(gamma=0.9), lr_scheduler.ExponentialLR, dict(gamma=0.9)),
    "PolyLR": (dict(power=2.0, end=11), lr_scheduler.PolynomialLR, dict(power=2.0, total_iters=10)),
    "CosineAnnealingLR": (
        dict(T_max=5, eta_min=0.01),
        lr_scheduler.CosineAnnealingLR,
        dict(T_max=5, eta_min=0.01),
    ),
    "OneCycleLR": (
        dict(eta_max=[0.5, 0.7], total_steps=13, three_phase=True),
        lr_scheduler.OneCycleLR,
        dict(max_lr=[0.5, 0.7], total_steps=13, three_phase=True, cycle_momentum=False),
    ),
    "CyclicLR": (
        dict(base_lr=[0.15, 0.25], max_lr=0.5, step_size_up=3, mode="triangular2"),
        lr_scheduler.CyclicLR,
        dict(base_lr=[0.15, 0.25], max_lr=0.5, step_size_up=3, mode="triangular2"),
    ),
    "LambdaLR": (dict(lr_lambda=lambda t: 0.9**t), lr_scheduler.LambdaLR, dict(lr_lambda=lambda t: 0.9**t)),
    "MultiplicativeLR": (
        dict(lr_lambda=[lambda t: 0.9, lambda t: 0.8]),
        lr_scheduler.MultiplicativeLR,
        dict(lr_lambda=[lambda t: 0.9, lambda t: 0.8]),
    ),
    "CosineAnnealingWarmRestarts": (
        dict(T_0=2, T_mult=2, eta_min=0.01),
        lr_scheduler.CosineAnnealingWarmRestarts,
        dict(T_0=2, T_mult=2, eta_min=0.01),
    ),
    "SWALR": (
        dict(swa_lr=[0.01, 0.02], anneal_epochs=4, anneal_strategy="linear"),
        torch.optim.swa_utils.SWALR,
        dict(swa_lr=[0.01, 0.02], anneal_epochs=4, anneal_strategy="linear"),
    ),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "wrapped"])
@pytest.mark.parametrize("begin", [0, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", TORCH_TWINS)
def test_values_are_torchs(name, kind, begin, wrapped):
    ours_given, torchs, torchs_given = TORCH_TWINS[name]
    stock, fused, arguments = OPTIMIZERS[kind]
    theirs, ours = stock(parameter_groups(2)), fused(parameter_groups(2), lr=0.3, **arguments)
    driven = fusedopt.OptimWrapper(ours) if wrapped else ours
    given_ours = {**ours_given, "begin": begin}
    if "end" in given_ours:
        given_ours["end"] += begin
    scheduler = getattr(schedulers, name)(driven, **given_ours)
    reference = None
    for step in range(begin + 12):
        if step == begin:
            reference = torchs(theirs, **torchs_given)
        assert_same(values(ours), values(theirs), f"step {step}")
        theirs.step()
        driven.step()
        scheduler.step()
        if reference is not None:
            reference.step()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_reduce_lr_on_plateau_is_torchs(mode):
    arguments = dict(
        mode=mode, factor=0.5, patience=1, threshold=0.1, threshold_mode="abs", cooldown=1, min_lr=[0.01, 0.02]
    )
    theirs, ours = torch.optim.SGD(parameter_groups(2), lr=0.3), fusedopt.FusedSGD(parameter_groups(2), lr=0.3)
    reference = lr_scheduler.ReduceLROnPlateau(theirs, **arguments)
    scheduler = schedulers.ReduceLROnPlateau(ours, **arguments)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        metric = torch.rand((), generator=generator)
        reference.step(metric)
        scheduler.step({"loss": metric} if step % 2 else metric)
        assert_same(values(ours), values(theirs), f"step {step}")


TORCHS_OWN = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda t: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3]),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, total_iters=3),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=3),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, step_size_up=2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=8),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "SWALR": lambda optimizer: torch.optim.swa_utils.SWALR(optimizer, 0.05, anneal_epochs=3),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        milestones=[2],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
}


def test_every_scheduler_of_torch_is_in_the_list():
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert known <= set(TORCHS_OWN)


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")  # SequentialLR of torch 2.8 passes it
@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "wrapped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", TORCHS_OWN)
def test_torchs_own_schedulers_drive_ours(name, kind, wrapped):
    """Without a warning, which would be an error here, and to the same parameters as with torch's optimizer."""
    stock, fused, arguments = OPTIMIZERS[kind]
    generator = torch.Generator().manual_seed(0)
    theirs, ours = stock(parameter_groups(2)), fused(parameter_groups(2), lr=0.3, **arguments)
    wrapper = fusedopt.OptimWrapper(ours) if wrapped else None
    pairs = [(theirs, TORCHS_OWN[name](theirs)), (ours, TORCHS_OWN[name](ours))]
    for _ in range(6):
        grads = [torch.randn(2, generator=generator) for _ in range(2)]
        for optimizer, scheduler in pairs:
            parameters = [group["params"][0] for group in optimizer.param_groups]
            if optimizer is ours and wrapper is not None:
                wrapper.update_params(sum((p * g).sum() for p, g in zip(parameters, grads, strict=True)))
            else:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad.clone()
                optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert values(ours) == values(theirs)
    for our, their in zip(ours.param_groups, theirs.param_groups, strict=True):
        torch.testing.assert_close(our["params"][0], their["params"][0], rtol=1e-6, atol=1e-7)
