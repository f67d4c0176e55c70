"""Schedulers: spans, per-group values, wrappers, resuming, tensors, building from configs, and bad input."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from schedules import OPTIMIZERS, parameter_groups
from torch import nn

import fusedopt
from fusedopt import FusedAdamW, FusedSGD, OptimWrapper, OptimWrapperDict, SkipAwareScheduler
from fusedopt.training import schedulers
from fusedopt.training.registry import PARAM_SCHEDULERS
from fusedopt.training.schedulers import build_param_schedulers

#: A config of every registered scheduler, for a span of 12 steps.
CONFIGS = {
    "Constant": dict(factor=0.5),
    "CosineAnnealing": dict(T_max=5, eta_min=0.01),
    "CosineRestart": dict(periods=[3, 6], restart_weights=[1.0, 0.5], eta_min_ratio=0.1),
    "Exponential": dict(gamma=0.9),
    "Linear": dict(start_factor=0.2),
    "MultiStep": dict(milestones=[2, 5], gamma=0.5),
    "Poly": dict(power=2.0, eta_min=0.001),
    "ReduceOnPlateau": dict(patience=0, factor=0.5),
    "Step": dict(step_size=3, gamma=0.5),
}
ALL = {
    **{
        f"{rule}{kind}": {**cfg, **({"param_name": "weight_decay"} if kind == "ParamScheduler" else {})}
        for rule, cfg in CONFIGS.items()
        for kind in ("LR", "Momentum", "ParamScheduler")
    },
    "CosineAnnealingWeightDecay": dict(T_max=5, eta_min=0.01),
    "OneCycleLR": dict(eta_max=0.5),
    "OneCycleParamScheduler": dict(eta_max=0.5, param_name="lr"),
    "CosineAnnealingWarmRestarts": dict(T_0=3),
    "CyclicLR": dict(base_lr=0.1, max_lr=0.5, step_size_up=2),
    "LambdaLR": dict(lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": dict(lr_lambda=lambda step: 0.9),
    "ReduceLROnPlateau": dict(patience=0, factor=0.5),
    "SWALR": dict(swa_lr=0.01, anneal_epochs=4),
}

#: What torch makes of ``last_epoch`` is torch's.
FROM_TORCH = schedulers.TorchParamScheduler


def build(name, optimizer, **changes):
    settings = {"end": 12, **ALL[name], **changes}
    return PARAM_SCHEDULERS.build(dict(type=name, **settings), optimizer=optimizer)


def advance(scheduler, optimizer):
    optimizer.step()
    if getattr(scheduler, "need_val_args", False):
        scheduler.step()
        scheduler.step({"loss": 1.0})
    else:
        scheduler.step()


def sgd(groups=1):
    return FusedSGD(parameter_groups(groups), lr=0.3, momentum=0.8)


def test_the_list_is_whole() -> None:
    assert set(ALL) == set(PARAM_SCHEDULERS)
    assert set(PARAM_SCHEDULERS) <= set(schedulers.__all__)


def test_mmengines_names_are_exported() -> None:
    optim = pytest.importorskip("mmengine.optim")
    for name in set(optim.__all__) - {"ApexOptimWrapper"}:
        assert hasattr(fusedopt, name) or hasattr(schedulers, name), name


@pytest.mark.parametrize("name", ALL)
def test_outside_its_span_it_leaves_the_value_alone(name) -> None:
    optimizer = sgd()
    group = optimizer.param_groups[0]
    scheduler = build(name, optimizer, begin=3, end=6)
    key = scheduler.param_name
    seen, left_at = [group[key]], None
    for step in range(1, 10):
        group[key] = group[key] if 3 <= step < 6 else 1.0 + step
        before = group[key]
        advance(scheduler, optimizer)
        seen.append(group[key])
        if not 3 <= step < 6:
            assert group[key] == before, f"step {step}"
        left_at = step
    assert left_at == 9
    assert scheduler.last_step == 2


@pytest.mark.parametrize("name", ALL)
def test_a_state_dict_resumes_at_any_step(name) -> None:
    """Through a file that only plain values may be in, into a new optimizer."""
    optimizer = FusedAdamW(parameter_groups(2), lr=0.3)
    wrapper = OptimWrapper(optimizer)
    scheduler = build(name, wrapper, begin=2)
    for step in range(12):
        file = io.BytesIO()
        torch.save((wrapper.state_dict(), scheduler.state_dict()), file)
        file.seek(0)
        other = OptimWrapper(FusedAdamW(parameter_groups(2), lr=0.3))
        resumed = build(name, other, begin=2)
        states = torch.load(file, weights_only=True)
        other.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
        assert resumed.get_last_value() == scheduler.get_last_value()
        for _ in range(2):
            advance(resumed, other)
        reference = copy.deepcopy([(group["lr"], group["betas"]) for group in other.param_groups])
        advance(scheduler, wrapper)
        if step < 11:
            ahead, driven = build(name, OptimWrapper(FusedAdamW(parameter_groups(2), lr=0.3)), begin=2), None
            driven = ahead.optimizer
            for _ in range(step + 2):
                advance(ahead, driven)
            assert reference == [(group["lr"], group["betas"]) for group in driven.param_groups]


@pytest.mark.parametrize("name", [name for name in ALL if not issubclass(PARAM_SCHEDULERS.get(name), FROM_TORCH)])
def test_it_resumes_without_a_state_dict(name) -> None:
    """From ``last_step``, with the span counted on."""
    optimizer, other = sgd(2), sgd(2)
    scheduler = build(name, optimizer, begin=2, end=8)
    for _ in range(5):
        advance(scheduler, optimizer)
    for group, source in zip(other.param_groups, optimizer.param_groups, strict=True):
        group.update({key: value for key, value in source.items() if key != "params"})
    advance(scheduler, optimizer)
    resumed = build(name, other, begin=2, end=8, last_step=3)
    for _ in range(6):
        for group, source in zip(other.param_groups, optimizer.param_groups, strict=True):
            assert group[scheduler.param_name] == pytest.approx(source[scheduler.param_name], rel=1e-12)
        advance(scheduler, optimizer)
        advance(resumed, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ALL)
def test_a_tensor_is_updated_in_place(name, kind) -> None:
    """To the values that a float takes, within float32: what a captured CUDA graph reads is the tensor."""
    _, fused, arguments = OPTIMIZERS[kind]
    floats = fused(parameter_groups(1), lr=0.3, **arguments)
    tensors = fused(parameter_groups(1), lr=0.3, **arguments)
    [group], [reference] = tensors.param_groups, floats.param_groups
    for key in ("lr", "weight_decay", "momentum"):
        reference[key] = 0.25
        if key in group:
            group[key] = torch.tensor(0.25)
        else:
            del reference[key]
    if "betas" in group:
        group["betas"] = tuple(torch.tensor(beta) for beta in group["betas"])
    scheduler, twin = build(name, tensors), build(name, floats)
    key = scheduler.param_name
    held = group[key]
    assert isinstance(held, torch.Tensor) == isinstance(reference[key], float)
    beta = group["betas"][0] if "betas" in group else None
    for _ in range(6):
        assert float(held) == pytest.approx(reference[key], rel=1e-5)
        if beta is not None and scheduler.param_name == "momentum":
            assert float(beta) == pytest.approx(reference["betas"][0], rel=1e-5)
            assert group["betas"][0] is beta
        assert group[key] is held
        assert scheduler.get_last_value()[0] is not held
        advance(scheduler, tensors)
        advance(twin, floats)
    assert float(scheduler.base_values[0]) in (0.25, pytest.approx(0.9), pytest.approx(0.5 / 25))


def test_the_base_settings_of_a_wrapper_move_too() -> None:
    wrapper = OptimWrapper(sgd(2))
    scheduler = schedulers.ExponentialLR(wrapper, gamma=0.5)
    wrapper.step()
    scheduler.step()
    assert wrapper.get_lr() == {"base_lr": [0.15], "lr": [0.05, 0.1]}


@pytest.mark.parametrize(("key", "values"), [("weight_decay", (0.5, 0.05)), ("lr", (0.1, 0.01))])
def test_scheduled_values_reach_the_kernel(key, values) -> None:
    """The step after the milestone is that of an optimizer that was built with the new value."""
    weights = torch.linspace(-1, 1, 7)
    scheduled = nn.Parameter(weights.clone())
    optimizer = FusedAdamW([scheduled], **{"lr": 0.1, "weight_decay": 0.5, key: values[0]})
    scheduler = schedulers.MultiStepParamScheduler(optimizer, key, milestones=[1], gamma=0.1)
    reference = nn.Parameter(weights.clone())
    twin = torch.optim.AdamW([reference], **{"lr": 0.1, "weight_decay": 0.5, key: values[0]}, foreach=False)
    for step in range(3):
        twin.param_groups[0][key] = values[step > 0]
        for parameter, each in ((scheduled, optimizer), (reference, twin)):
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
            each.step()
        scheduler.step()
        torch.testing.assert_close(scheduled, reference, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0][key] == pytest.approx(values[1])


@pytest.mark.parametrize("convert", [float, torch.tensor])
def test_no_weight_decay_stays_none(convert) -> None:
    optimizer = sgd(2)
    for group in optimizer.param_groups:
        group["weight_decay"] = convert(group["weight_decay"])
    scheduler = schedulers.CosineAnnealingWeightDecay(optimizer, T_max=2, eta_min=0.5)
    for expected in (0.01, 0.255, 0.5, 0.255):
        assert [float(group["weight_decay"]) for group in optimizer.param_groups] == pytest.approx([0.0, expected])
        optimizer.step()
        scheduler.step()


def test_scheduled_momentum_reaches_the_kernel_through_betas() -> None:
    scheduled, reference = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizer, twin = FusedAdamW([scheduled], lr=0.1), torch.optim.AdamW([reference], lr=0.1, foreach=False)
    scheduler = schedulers.LinearMomentum(optimizer, start_factor=0.5, end=4)
    for step in range(4):
        twin.param_groups[0]["betas"] = (0.9 * (0.5 + 0.5 * step / 3), 0.999)
        for parameter, each in ((scheduled, optimizer), (reference, twin)):
            parameter.grad = torch.full_like(parameter, (-1.0) ** step)
            each.step()
        torch.testing.assert_close(scheduled, reference, rtol=1e-6, atol=1e-7)
        scheduler.step()
    assert optimizer.param_groups[0]["initial_momentum"] == 0.9
    assert optimizer.param_groups[0]["betas"][1] == 0.999


def test_overlapping_schedulers_multiply_in_their_order() -> None:
    optimizer = sgd()
    warmup, decay = build_param_schedulers(
        [dict(type="LinearLR", start_factor=0.5, by_epoch=False, end=3), dict(type="StepLR", step_size=1, gamma=0.1)],
        optimizer,
        max_epochs=4,
        max_iters=8,
    )
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
        decay.step()
    assert seen == pytest.approx([0.05, 0.0075, 0.001, 0.0001])


def test_a_missing_end_is_the_length_of_the_training() -> None:
    wrapper = OptimWrapper(sgd())
    by_epoch, by_iteration, converted, own = build_param_schedulers(
        [
            dict(type="CosineAnnealingLR"),
            dict(type="LinearLR", by_epoch=False, begin=2),
            dict(type="PolyLR", convert_to_iter_based=True, begin=1),
            dict(type="CosineAnnealingMomentum", T_max=3, end=7, by_epoch=False),
        ],
        wrapper,
        epoch_length=5,
        max_epochs=10,
        max_iters=50,
    )
    assert (by_epoch.T_max, by_epoch.end) == (10, 10)
    assert (by_iteration.begin, by_iteration.end, by_iteration.total_iters) == (2, 50, 47)
    assert (converted.begin, converted.end, converted.by_epoch) == (5, 50, False)
    assert (own.T_max, own.end) == (3, 7)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("StepLR", dict(step_size=2), dict(step_size=8)),
        ("MultiStepLR", dict(milestones=[1, 2.5]), dict(milestones={4: 1, 10: 1})),
        ("CosineAnnealingLR", dict(T_max=3), dict(T_max=12)),
        ("CosineRestartLR", dict(periods=[1, 2], restart_weights=[1, 1]), dict(periods=[4, 8])),
        ("OneCycleLR", dict(eta_max=1.0, total_steps=5), dict(total_steps=20)),
        ("ExponentialLR", dict(gamma=0.9, begin=0.5, end=2.6), dict(begin=2, end=10)),
    ],
)
def test_epochs_become_iterations(name, given, expected) -> None:
    scheduler = getattr(schedulers, name).build_iter_from_epoch(sgd(), epoch_length=4, **given)
    assert not scheduler.by_epoch
    assert {key: getattr(scheduler, key) for key in expected} == expected


def test_torchs_lengths_become_iterations_too() -> None:
    optimizer, other = sgd(), sgd()
    converted = PARAM_SCHEDULERS.build(
        dict(type="CyclicLR", base_lr=0.1, max_lr=0.5, step_size_up=2, convert_to_iter_based=True),
        optimizer=optimizer,
        epoch_length=3,
    )
    reference = torch.optim.lr_scheduler.CyclicLR(other, 0.1, 0.5, step_size_up=6)
    for _ in range(15):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(other.param_groups[0]["lr"], rel=1e-12)
        for each, scheduler in ((optimizer, converted), (other, reference)):
            each.step()
            scheduler.step()


def test_wrappers_in_a_dict_have_schedulers_of_their_own() -> None:
    wrappers = OptimWrapperDict(gen=OptimWrapper(sgd()), disc=OptimWrapper(sgd(2)))
    shared = build_param_schedulers(dict(type="ExponentialLR", gamma=0.5), wrappers)
    assert {name: [type(each).__name__ for each in built] for name, built in shared.items()} == {
        "gen": ["ExponentialLR"],
        "disc": ["ExponentialLR"],
    }
    own = build_param_schedulers(dict(gen=[dict(type="StepLR", step_size=1)], disc=[]), wrappers)
    assert isinstance(own["gen"][0], schedulers.StepLR) and own["disc"] == []
    assert own["gen"][0].optimizer is wrappers["gen"]


def test_a_scheduler_that_exists_is_taken_as_it_is() -> None:
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, step_size=2)
    assert build_param_schedulers([scheduler], optimizer) == [scheduler]
    wrapper = OptimWrapper(optimizer)
    aware = SkipAwareScheduler(schedulers.StepLR(wrapper, step_size=1), wrapper)
    assert build_param_schedulers(aware, wrapper) == [aware]
    wrapper.step()
    aware.step()
    assert aware.get_last_value() == [pytest.approx(0.01)]
    assert build_param_schedulers(None, optimizer) == []


def test_mmengine_states_load_and_ours_load_there() -> None:
    optim = pytest.importorskip("mmengine.optim")
    pairs = [(name, kind) for name in CONFIGS if name != "ReduceOnPlateau" for kind in ("LR", "Momentum")]
    for rule, kind in pairs:
        name = rule + kind
        ours, theirs = sgd(), torch.optim.SGD(parameter_groups(1), lr=0.3, momentum=0.8)
        scheduler, reference = build(name, ours), getattr(optim, name, None)
        if reference is None:  # CosineRestart is there, and not exported
            reference = getattr(optim.scheduler, name)
        reference = reference(theirs, end=12, **ALL[name])
        for _ in range(4):
            theirs.step()
            reference.step()
        scheduler.load_state_dict(reference.state_dict())
        for group, source in zip(ours.param_groups, theirs.param_groups, strict=True):
            group.update({key: source[key] for key in ("lr", "momentum")})
        reference.load_state_dict(scheduler.state_dict())
        for _ in range(5):
            ours.step(), scheduler.step()
            theirs.step(), reference.step()
            assert scheduler.get_last_value() == pytest.approx(reference.get_last_value(), rel=1e-12)


def test_schedulers_go_on_with_the_fused_twin() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(2), lr=0.1)
    scheduler = schedulers.StepMomentum(optimizer, step_size=1, gamma=0.5)
    twin = fusedopt.fuse(optimizer)
    twin.step()
    scheduler.step()
    assert [group["betas"][0] for group in twin.param_groups] == [0.45, 0.45]


def test_verbose_prints_the_values(capsys) -> None:
    optimizer = sgd(2)
    scheduler = schedulers.StepLR(optimizer, step_size=1, gamma=0.1, verbose=True)
    optimizer.step()
    scheduler.step()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "StepLR: lr of group 0 is now 1.0000e-02",
        "StepLR: lr of group 1 is now 2.0000e-02",
    ]


def test_a_step_before_the_optimizers_is_a_warning_at_the_callers_line() -> None:
    optimizer = sgd()
    scheduler = schedulers.StepLR(optimizer, step_size=1)
    with pytest.warns(UserWarning, match=r"before optimizer\.step\(\)") as caught:
        scheduler.step()
    assert caught[0].filename == __file__
    scheduler.step()
    assert not optimizer._optimizer_step_post_hooks


def test_it_is_one_with_last_step_too_as_in_torch() -> None:
    found = []
    for make in (
        lambda optimizer: schedulers.StepLR(optimizer, step_size=2, last_step=4),
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, last_epoch=4),
    ):
        for steps in (False, True):
            optimizer = sgd()
            optimizer.param_groups[0]["initial_lr"] = 0.1
            scheduler = make(optimizer)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if steps:
                    optimizer.step()
                scheduler.step()
                scheduler.step()
            found.append(len(caught))
    assert found == [1, 0, 1, 0]


def test_a_second_scheduler_is_no_reason_to_warn() -> None:
    optimizer = sgd()
    schedulers.StepLR(optimizer, step_size=2)
    schedulers.ExponentialLR(optimizer, gamma=0.5, last_step=3)


def test_the_iterations_of_an_accumulation_are_no_reason_to_warn() -> None:
    parameter = nn.Parameter(torch.ones(1))
    wrapper = OptimWrapper(FusedSGD([parameter], lr=0.1), accumulative_counts=4)
    scheduler = schedulers.LinearLR(wrapper, by_epoch=False, end=5)
    wrapper.update_params(parameter.sum())
    scheduler.step()
    assert wrapper.step_count == 0 and wrapper.inner_count == 1
    assert scheduler.last_step == 1


@pytest.mark.parametrize("name", ALL)
def test_copies_and_pickles_go_on_by_themselves(name) -> None:
    if name in ("LambdaLR", "MultiplicativeLR"):
        copying = [copy.deepcopy]  # a lambda has no pickle
    else:
        copying = [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
    for copied in copying:
        scheduler = build(name, sgd(2), begin=1)
        advance(scheduler, scheduler.optimizer)
        twin = copied(scheduler)
        assert twin.optimizer is not scheduler.optimizer
        before = copy.deepcopy(scheduler.state_dict())
        for _ in range(3):
            advance(twin, twin.optimizer)
        assert scheduler.state_dict() == before
        for _ in range(3):
            advance(scheduler, scheduler.optimizer)
        assert twin.get_last_value() == scheduler.get_last_value()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "name", ["StepLR", "CosineAnnealingMomentum", "LinearParamScheduler", "CyclicLR", "OneCycleLR"]
)
def test_a_group_that_is_added_takes_part(name, wrapped) -> None:
    """From its own value on; where a rule cannot take it in, an error says so before anything has changed."""
    optimizer = FusedAdamW(parameter_groups(2), lr=0.1)
    driven = OptimWrapper(optimizer) if wrapped else optimizer
    scheduler = build(name, driven)
    advance(scheduler, driven)
    optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(2))], lr=5.0, weight_decay=3.0, betas=(0.5, 0.9)))
    if name in ("CyclicLR", "OneCycleLR"):
        before = copy.deepcopy(scheduler.state_dict())
        with pytest.raises(ValueError, match=r"had \d parameter groups when this .* was built, and now has \d"):
            scheduler.step()
        assert scheduler.state_dict() == before
        return
    advance(scheduler, driven)
    group = optimizer.param_groups[2]
    base = {"lr": 5.0, "momentum": 0.5, "weight_decay": 3.0}[scheduler.param_name]
    assert group[f"initial_{scheduler.param_name}"] == base
    assert len(scheduler.get_last_value()) == len(driven.param_groups)
    if name == "CosineAnnealingMomentum":
        assert group["betas"] == (group["momentum"], 0.9) and group["momentum"] != 0.5


def test_hooks_are_not_left_behind() -> None:
    optimizer = sgd()
    first, second = schedulers.StepLR(optimizer, 3), schedulers.StepMomentum(optimizer, 3)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    for each in (first, second):
        optimizer.step()
        each.step()
    assert not optimizer._optimizer_step_post_hooks
    resumed = sgd()
    schedulers.StepLR(resumed, 3).load_state_dict(first.state_dict())
    assert not resumed._optimizer_step_post_hooks
    plateau = sgd()
    schedulers.ReduceOnPlateauLR(plateau)
    assert not plateau._optimizer_step_post_hooks
    gone = sgd()
    schedulers.StepLR(gone, 3)
    reference = weakref.ref(gone)
    del gone
    gc.collect()
    assert reference() is None


def test_the_optimizer_of_a_wrapper_may_wait_for_its_step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    wrapper = OptimWrapper(FusedSGD([parameter], lr=0.1), accumulative_counts=4)
    scheduler = schedulers.StepLR(wrapper.optimizer, step_size=2)
    wrapper.update_params(parameter.sum())
    scheduler.step()
    assert wrapper.step_count == 0


@pytest.mark.parametrize(
    ("name", "given", "reference"),
    [
        ("CosineAnnealingWarmRestarts", dict(T_0=2, T_mult=2), dict(T_0=6, T_mult=2)),
        ("SWALR", dict(swa_lr=0.01), dict(swa_lr=0.01, anneal_epochs=30)),
        (
            "CyclicLR",
            dict(base_lr=0.2, max_lr=0.5, step_size_up=2, step_size_down=1),
            dict(base_lr=0.2, max_lr=0.5, step_size_up=6, step_size_down=3),
        ),
        ("CyclicLR", dict(base_lr=0.2, max_lr=0.5), dict(base_lr=0.2, max_lr=0.5, step_size_up=6000)),
    ],
)
def test_lengths_of_torchs_schedulers_become_iterations(name, given, reference) -> None:
    optimizer, other = sgd(), sgd()
    converted = getattr(schedulers, name).build_iter_from_epoch(optimizer, epoch_length=3, **given)
    direct = getattr(schedulers, name)(other, **reference)
    for _ in range(12):
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        for each in (converted, direct):
            each.optimizer.step()
            each.step()


@pytest.mark.parametrize("name", ["CyclicLR", "SWALR", "CosineAnnealingWarmRestarts", "LambdaLR", "MultiplicativeLR"])
def test_torchs_schedulers_move_any_parameter(name) -> None:
    """As they move the learning rate; two of them on one optimizer keep apart."""
    optimizer, other = sgd(2), sgd(2)
    for group, reference in zip(optimizer.param_groups, other.param_groups, strict=True):
        group["weight_decay"] = reference["lr"] = 0.4 + group["lr"]
    momenta = [group["momentum"] for group in optimizer.param_groups]
    settings = {**ALL[name], **({"cycle_momentum": False} if name == "CyclicLR" else {})}
    moved = getattr(schedulers, name)(optimizer, param_name="weight_decay", **ALL[name])
    beside = schedulers.SWALR(optimizer, swa_lr=0.07, anneal_epochs=1)
    reference = getattr(schedulers, name)(other, **settings)
    for _ in range(7):
        assert [group["weight_decay"] for group in optimizer.param_groups] == [
            group["lr"] for group in other.param_groups
        ]
        assert [group["momentum"] for group in optimizer.param_groups] == momenta
        for each in (optimizer, other, moved, beside, reference):
            each.step()
    assert beside.get_last_value() == pytest.approx([0.07, 0.07])


@pytest.mark.parametrize("where", ["last_step", "last_epoch"])
@pytest.mark.parametrize("name", ["CyclicLR", "LambdaLR"])
def test_torchs_schedulers_resume_without_a_state_dict(name, where) -> None:
    optimizer, other = sgd(), sgd()
    scheduler = build(name, optimizer)
    for _ in range(3):
        advance(scheduler, optimizer)
    other.param_groups[0]["initial_lr"] = 0.1
    resumed = build(name, other, **{where: 2})
    for _ in range(4):
        assert resumed.last_step == scheduler.last_step
        assert resumed.get_last_value() == pytest.approx(scheduler.get_last_value())
        advance(scheduler, optimizer)
        advance(resumed, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_cycled_momentum_stays_the_tensor_it_is(kind) -> None:
    _, fused, arguments = OPTIMIZERS[kind]
    optimizer, other = fused(parameter_groups(1), lr=0.3, **arguments), fused(parameter_groups(1), lr=0.3, **arguments)
    [group], [reference] = optimizer.param_groups, other.param_groups
    if "betas" in group:
        held = group["betas"][0] if isinstance(group["betas"][0], torch.Tensor) else torch.tensor(0.9)
        group["betas"] = (held, torch.tensor(0.999))
    else:
        held = group["momentum"] = torch.tensor(0.8)
    cycles = [schedulers.CyclicLR(each, base_lr=0.2, max_lr=0.5, step_size_up=2) for each in (optimizer, other)]
    for _ in range(5):
        now = group["betas"][0] if "betas" in group else group["momentum"]
        expected = reference["betas"][0] if "betas" in reference else reference["momentum"]
        assert now is held and float(held) == pytest.approx(expected)
        for each in cycles:
            each.optimizer.step()
            each.step()


def test_the_registry_knows_them_without_an_import() -> None:
    code = "from fusedopt.training.registry import PARAM_SCHEDULERS; assert 'StepLR' in PARAM_SCHEDULERS"
    subprocess.run([sys.executable, "-c", code], check=True)


class Remembering(schedulers._ParamScheduler):
    """A subclass with a memory that only some instances have, printing as subclasses in MMEngine do."""

    def _get_value(self):
        self._cache = self.last_step
        self.print_value(self.verbose, 0, 1.0)
        return [1.0 for _ in self.base_values]


def test_private_memories_of_a_subclass_are_no_other_kind() -> None:
    scheduler = Remembering(sgd(), "lr", begin=2)
    other = Remembering(sgd(), "lr")
    scheduler.load_state_dict(other.state_dict())
    assert scheduler._cache == 0


def test_base_values_are_copies() -> None:
    optimizer = FusedAdamW(parameter_groups(1), lr=torch.tensor(0.5))
    [group] = optimizer.param_groups
    group["lr"] = torch.tensor(0.5)
    group["betas"] = (torch.tensor(0.9), torch.tensor(0.999))
    step, momentum = schedulers.StepLR(optimizer, 1), schedulers.StepMomentum(optimizer, 1)
    group["lr"].fill_(3.0)
    group["initial_lr"].fill_(4.0)
    assert float(step.base_values[0]) == 0.5
    assert group["momentum"] is not group["betas"][0]
    assert float(momentum.base_values[0]) == pytest.approx(0.9)


def test_an_infinite_end_is_none() -> None:
    assert schedulers.StepLR(sgd(), 2, end=math.inf).end == schedulers.INF
    converted = schedulers.StepLR.build_iter_from_epoch(sgd(), step_size=2, end=schedulers.INF, epoch_length=3)
    assert converted.end == schedulers.INF


def test_fractions_of_epochs_are_cut_off() -> None:
    scheduler = schedulers.StepLR.build_iter_from_epoch(sgd(), step_size=2, begin=0.45, end=1.99, epoch_length=10)
    assert (scheduler.begin, scheduler.end) == (4, 19)


class Squared(schedulers._ParamScheduler):
    """A scheduler as written for MMEngine: all groups at once."""

    def _get_value(self):
        return [base / (1 + self.last_step) ** 2 for base in self.base_values]


def test_a_scheduler_of_ones_own() -> None:
    optimizer = sgd(2)
    scheduler = Squared(optimizer, "lr")
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_value() == [0.025, 0.05]


BAD = [
    (dict(type="StepLR", step_size=2, begin=3, end=3), ValueError, "begin=3, end=3; expected begin < end"),
    (dict(type="StepLR", step_size=2, begin=-1), ValueError, "Invalid begin: -1"),
    (dict(type="StepLR", step_size=2, begin="1"), TypeError, "Invalid begin: '1'"),
    (dict(type="StepLR", step_size=0), ValueError, "Invalid step_size: 0"),
    (dict(type="StepLR", step_size=1.5), ValueError, "Invalid step_size: 1.5"),
    (dict(type="StepLR", step_size=2, gamma=-0.1), ValueError, "Invalid gamma: -0.1"),
    (dict(type="StepLR", step_size=2, gamma="0.1"), TypeError, "Invalid gamma: '0.1'"),
    (dict(type="StepLR", step_size=2, last_step=-2), ValueError, "Invalid last_step: -2"),
    (dict(type="StepLR", step_size=2, last_step=3), KeyError, "'initial_lr', which last_step=3 needs"),
    (dict(type="StepLR", stepsize=2), TypeError, "did you mean 'step_size'"),
    (dict(type="StepLr", step_size=2), KeyError, "did you mean 'StepLR'"),
    (dict(step_size=2), KeyError, "needs the key 'type'"),
    (dict(type="StepParamScheduler", step_size=2, param_name="weight_decoy"), KeyError, "did you mean 'weight_decay'"),
    (dict(type="MultiStepLR", milestones=[3, -1]), ValueError, r"Invalid milestones\[1\]: -1"),
    (dict(type="MultiStepLR", milestones=3), TypeError, "Invalid milestones: 3"),
    (dict(type="StepLR", step_size=2, by_epoch="no"), TypeError, "Invalid by_epoch: 'no'"),
    (
        dict(type="StepParamScheduler", step_size=2, param_name="params"),
        TypeError,
        r"\['params'\] is a list; a scheduler moves numbers",
    ),
    (dict(type="StepParamScheduler", step_size=2, param_name="nesterov"), TypeError, r"\['nesterov'\] is a bool"),
    (dict(type="CosineRestartLR", periods=3), TypeError, "Invalid periods: 3"),
    (dict(type="ConstantLR", factor=0, begin=2, end=4), ValueError, "the last step divides by it"),
    (dict(type="OneCycleLR", eta_max=1.0, total_steps=3, end=4), ValueError, "Invalid total_steps: 3"),
    (dict(type="StepLR", step_size=0.2, convert_to_iter_based=True, epoch_length=4), ValueError, "Invalid step_size"),
    (dict(type="StepLR", step_size=2, convert_to_iter_based=True, epoch_length=0), ValueError, "Invalid epoch_length"),
    (dict(type="CosineAnnealingLR"), ValueError, "expected T_max or end"),
    (dict(type="CosineAnnealingLR", T_max=0), ValueError, "Invalid T_max: 0"),
    (dict(type="CosineAnnealingLR", T_max=3, eta_min=0.1, eta_min_ratio=0.1), ValueError, "eta_min=0.1 and eta_min_r"),
    (dict(type="CosineRestartLR", periods=[1, 2]), ValueError, "periods has 2 entries and restart_weights 1"),
    (dict(type="CosineRestartLR", periods=[0]), ValueError, r"Invalid periods\[0\]: 0"),
    (dict(type="OneCycleLR", eta_max=1.0), ValueError, "expected total_steps or end"),
    (dict(type="OneCycleLR", eta_max=1.0, total_steps=5, end=9), ValueError, "Invalid total_steps: 5"),
    (dict(type="OneCycleLR", eta_max=[1.0, 2.0], end=9), ValueError, "eta_max has 2 entries"),
    (dict(type="OneCycleLR", eta_max=1.0, end=9, anneal_strategy="cosine"), ValueError, "Invalid anneal_strategy"),
    (dict(type="OneCycleLR", eta_max=1.0, end=9, pct_start=30), ValueError, "Invalid pct_start: 30"),
    (dict(type="OneCycleParamScheduler", eta_max=1.0, end=9, param_name="momentum"), ValueError, "schedules only 'lr'"),
    (dict(type="LinearLR", start_factor=0), ValueError, "Invalid start_factor: 0"),
    (dict(type="LinearLR", end_factor=2), ValueError, "Invalid end_factor: 2"),
    (dict(type="ConstantLR", factor=1.5), ValueError, "Invalid factor: 1.5"),
    (dict(type="ConstantLR", factor=0, end=4), ValueError, "the last step divides by it"),
    (dict(type="PolyLR", power=-1, end=4), ValueError, "Invalid power: -1"),
    (dict(type="ReduceOnPlateauLR", by_epoch=False), ValueError, "Invalid by_epoch: False"),
    (dict(type="ReduceOnPlateauLR", factor=1.0), ValueError, "Invalid factor: 1.0"),
    (dict(type="ReduceOnPlateauLR", rule="min"), ValueError, "Invalid rule: 'min'"),
    (dict(type="ReduceOnPlateauLR", threshold_rule="relative"), ValueError, "Invalid threshold_rule"),
    (dict(type="ReduceOnPlateauLR", min_value=[0.1, 0.2]), ValueError, "min_lr has 2 entries"),
    (dict(type="ReduceLROnPlateau", mode="less"), ValueError, "Invalid mode: 'less'"),
    (dict(type="CyclicLR", base_lr=0.1), TypeError, "'max_lr'"),
    (dict(type="CyclicLR", base_lr=0.1, max_l=0.2), TypeError, "did you mean 'max_lr'"),
    (dict(type="LambdaLR", lr_lambda=[abs, abs, abs]), ValueError, "lr_lambda has 3 entries"),
    (dict(type="StepLR", step_size=2, convert_to_iter_based=True), ValueError, "needs epoch_length"),
    (
        dict(type="StepLR", step_size=2, convert_to_iter_based=True, by_epoch=False, epoch_length=4),
        ValueError,
        "takes by_epoch=True",
    ),
    (dict(type="SWALR", swa_lr=1, anneal_epochs=0.3, convert_to_iter_based=True, epoch_length=4), ValueError, "0.3"),
    (
        dict(type="StepLR", stepsize=3, convert_to_iter_based=True, epoch_length=4),
        TypeError,
        "did you mean 'step_size'",
    ),
    (dict(type="ReduceOnPlateauLR", convert_to_iter_based=True, epoch_length=4), ValueError, "convert_to_iter_based"),
    (dict(type="LambdaLR", lr_lambda=abs, convert_to_iter_based=True, epoch_length=4), ValueError, "by_epoch=False"),
]


@pytest.mark.parametrize(("cfg", "error", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_arguments_are_named_and_nothing_changes(cfg, error, message) -> None:
    optimizer = sgd()
    before = dict(optimizer.param_groups[0])
    with pytest.raises(error, match=message):
        PARAM_SCHEDULERS.build(cfg, optimizer=optimizer)
    assert optimizer.param_groups[0] == before


def test_a_momentum_scheduler_needs_a_momentum() -> None:
    optimizer = torch.optim.Adagrad(parameter_groups(1), lr=0.1)
    with pytest.raises(
        ValueError, match=r"StepMomentum schedules 'momentum' or betas\[0\], but param_groups\[0\] has n"
    ):
        schedulers.StepMomentum(optimizer, step_size=2)
    adam = FusedAdamW(parameter_groups(1), lr=0.1)
    before = dict(adam.param_groups[0])
    with pytest.raises(ValueError, match="Invalid step_size"):
        schedulers.StepMomentum(adam, step_size=0)
    assert adam.param_groups[0] == before


@pytest.mark.parametrize("metrics", [{}, {"Loss": 1.0}])
def test_a_plateau_needs_the_metric_it_monitors(metrics) -> None:
    scheduler = schedulers.ReduceOnPlateauLR(sgd(), monitor="loss")
    state = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(KeyError, match="has no 'loss', which ReduceOnPlateauLR monitors"):
        scheduler.step(metrics)
    with pytest.raises(TypeError, match="a dict or a number, got 'low'"):
        scheduler.step({"loss": "low"})
    with pytest.raises(TypeError, match="a dict or a number, got True"):
        scheduler.step(True)
    with pytest.raises(TypeError, match="a dict or a number, got tensor"):
        scheduler.step(torch.ones(2))
    assert scheduler.state_dict() == state


@pytest.mark.parametrize("one", [torch.tensor([[2.0]]), np.array([2.0]), np.float32(2.0), np.array(2)])
def test_a_plateau_takes_one_element_arrays_and_tensors(one) -> None:
    optimizer = sgd()
    scheduler = schedulers.ReduceOnPlateauLR(optimizer, monitor="loss", patience=0, factor=0.5)
    before = optimizer.param_groups[0]["lr"]
    scheduler.step({"loss": one})
    scheduler.step({"loss": one})
    assert optimizer.param_groups[0]["lr"] == before / 2


def test_positional_arguments_of_torchs_schedulers_are_checked() -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        schedulers.CosineAnnealingWarmRestarts(sgd(), 10, 2, 0.0, -1, "more")
    with pytest.raises(TypeError, match="multiple values for argument 'base_lr'"):
        schedulers.CyclicLR(sgd(), 0.1, 0.5, base_lr=0.2)
    with pytest.raises(TypeError, match="positional argument"):
        schedulers.StepLR.build_iter_from_epoch(sgd(), 3, epoch_length=10)


def test_what_needs_no_end_may_multiply_by_nothing() -> None:
    optimizer = sgd()
    schedulers.ConstantLR(optimizer, factor=0)
    schedulers.ConstantMomentum(optimizer, factor=0, end=1)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.0, 0.0)


def test_a_scheduler_that_exists_is_not_for_several_optimizers() -> None:
    wrappers = OptimWrapperDict(gen=OptimWrapper(sgd()), disc=OptimWrapper(sgd()))
    with pytest.raises(TypeError, match=r"drives one optimizer; expected a dict .* 'gen', 'disc'"):
        build_param_schedulers(schedulers.StepLR(wrappers["gen"], 2), wrappers)


def test_a_scheduler_drives_one_optimizer() -> None:
    with pytest.raises(TypeError, match=r"an OptimWrapperDict of 'gen'; build_param_schedulers makes"):
        schedulers.StepLR(OptimWrapperDict(gen=OptimWrapper(sgd())), step_size=2)
    with pytest.raises(TypeError, match="must be an optimizer or a wrapper of one, got Linear"):
        schedulers.StepMomentum(nn.Linear(1, 1), step_size=2)


@pytest.mark.parametrize(
    ("name", "state_of", "message"),
    [
        ("StepLR", "CosineAnnealingLR", "does not fit a StepLR: it lacks 'step_size', 'gamma' and has 'T_max'"),
        ("StepLR", "StepMomentum", "'momentum'; this StepLR schedules 'lr'"),
        ("CyclicLR", "SWALR", "is from a SWALR, not from a CyclicLR"),
        ("LinearLR", "LambdaLR", "has 'kind', 'torch_state'"),
    ],
)
def test_the_state_of_another_kind_is_refused(name, state_of, message) -> None:
    scheduler = build(name, sgd())
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(ValueError, match=message):
        scheduler.load_state_dict(build(state_of, sgd()).state_dict())
    assert scheduler.state_dict() == before


def test_a_state_of_the_optimizer_without_the_scheduler_is_told() -> None:
    saved = FusedAdamW(parameter_groups(1), lr=0.1).state_dict()
    optimizer = FusedAdamW(parameter_groups(1), lr=0.1)
    scheduler = schedulers.StepMomentum(optimizer, step_size=2)
    optimizer.load_state_dict(saved)
    optimizer.step()
    before = copy.deepcopy(scheduler.state_dict())
    with pytest.raises(KeyError, match=r"has no 'momentum' any more: .* saved without this StepMomentum"):
        scheduler.step()
    assert scheduler.state_dict() == before


def test_the_state_for_other_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="base_values for 2 parameter groups; this StepLR drives 1"):
        build("StepLR", sgd(1)).load_state_dict(build("StepLR", sgd(2)).state_dict())
    with pytest.raises(ValueError, match="base_values for 3 parameter groups"):
        build("StepLR", sgd(1)).load_state_dict({**build("StepLR", sgd(1)).state_dict(), "base_values": 3})
    cyclic = build("CyclicLR", sgd())
    with pytest.raises(ValueError, match=r"torch_state'\] does not fit this torch's CyclicLR: it lacks"):
        cyclic.load_state_dict({**cyclic.state_dict(), "torch_state": {}})
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        build("StepLR", sgd(1)).load_state_dict([])


@pytest.mark.parametrize(
    ("cfg", "error", "message"),
    [
        ("StepLR", TypeError, "param_scheduler must be a dict, got str"),
        ([dict(type="StepLR", step_size=1), 3], TypeError, r"param_scheduler\[1\] must be a dict, got int"),
        ((dict(type="StepLR", step_size=1),), None, None),
        (
            [dict(type="StepLR", step_size=1), dict(type="StepLR", step_size=0)],
            ValueError,
            r"^scheduler 1 \(StepLR\): Invalid step_size: 0",
        ),
        ([dict(type="StepLR", step_size=1), dict(step_size=0)], KeyError, r"scheduler 1 \(None\): .* needs the key"),
        (dict(gen=dict(type="StepLR", step_size=1)), ValueError, "has entries for 'gen' and no 'type'"),
    ],
)
def test_bad_configs_are_named(cfg, error, message) -> None:
    if error is None:  # a tuple of several is a list; of one too
        assert len(build_param_schedulers(cfg, sgd())) == 1
        return
    with pytest.raises(error, match=message):
        build_param_schedulers(cfg, sgd())


def test_names_that_do_not_fit_the_wrappers_are_named() -> None:
    wrappers = OptimWrapperDict(gen=OptimWrapper(sgd()), disc=OptimWrapper(sgd()))
    with pytest.raises(KeyError, match=r"nothing for 'disc'; expected disc=\[\]"):
        build_param_schedulers(dict(gen=[]), wrappers)
    with pytest.raises(ValueError, match="'dics', which is not an optimizer wrapper; did you mean 'disc'"):
        build_param_schedulers(dict(gen=[], dics=[]), wrappers)


def test_one_step_more_than_a_cycle_has_is_an_error() -> None:
    optimizer = sgd()
    scheduler = schedulers.OneCycleLR(optimizer, eta_max=1.0, total_steps=2)
    optimizer.step()
    scheduler.step()
    scheduler.step()
    with pytest.raises(ValueError, match="was stepped more than total_steps=2 times"):
        scheduler.step()


def test_a_cycle_whose_way_up_is_one_step_begins_at_its_maximum() -> None:
    optimizer = sgd()
    schedulers.OneCycleLR(optimizer, eta_max=1.0, total_steps=10, pct_start=0.1)
    assert math.isclose(optimizer.param_groups[0]["lr"], 1.0)
