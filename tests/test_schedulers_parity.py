"""Schedulers against MMEngine's, over random configurations."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import OPTIMIZERS, assert_same, parameter_groups, values

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and torch warn of while MMEngine is imported is not ours
    pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
    from mmengine.optim import OptimWrapper as MMEngineWrapper
    from mmengine.registry import PARAM_SCHEDULERS

import fusedopt
from fusedopt.training.schedulers import build_param_schedulers


def fractions(least=0.05, most=0.95):
    return st.floats(least, most)


RULES = {
    "Constant": lambda: st.fixed_dictionaries(dict(factor=fractions())),
    "CosineAnnealing": lambda: st.one_of(
        st.fixed_dictionaries({}, optional=dict(T_max=st.integers(1, 12), eta_min=fractions(0.0, 0.05))),
        st.fixed_dictionaries(dict(eta_min_ratio=fractions()), optional=dict(T_max=st.integers(1, 12))),
    ),
    "CosineRestart": lambda: st.integers(1, 3).flatmap(
        lambda count: st.fixed_dictionaries(
            dict(
                periods=st.lists(st.integers(1, 6), min_size=count, max_size=count),
                restart_weights=st.lists(fractions(), min_size=count, max_size=count),
                eta_min=fractions(0.0, 0.05),
            )
        )
    ),
    "Exponential": lambda: st.fixed_dictionaries(dict(gamma=fractions())),
    "Linear": lambda: st.fixed_dictionaries(dict(start_factor=fractions()), optional=dict(end_factor=fractions())),
    "MultiStep": lambda: st.fixed_dictionaries(
        dict(milestones=st.lists(st.integers(0, 12), max_size=4)), optional=dict(gamma=fractions())
    ),
    "Poly": lambda: st.fixed_dictionaries(dict(power=fractions(0.3, 3.0)), optional=dict(eta_min=fractions(0, 0.05))),
    "Step": lambda: st.fixed_dictionaries(dict(step_size=st.integers(1, 5)), optional=dict(gamma=fractions())),
    "OneCycle": lambda: st.fixed_dictionaries(
        dict(eta_max=fractions(), pct_start=fractions(0.31, 0.69), anneal_strategy=st.sampled_from(["cos", "linear"])),
        optional=dict(three_phase=st.booleans(), div_factor=st.floats(2, 30)),
    ),
}


@st.composite
def configs(draw):
    """One scheduler of a training of 8 epochs of 3 iterations."""
    rule = draw(st.sampled_from(sorted(RULES)))
    cfg = draw(RULES[rule]())
    kind = draw(
        st.sampled_from(["LR", "ParamScheduler"] if rule == "OneCycle" else ["LR", "Momentum", "ParamScheduler"])
    )
    cfg["type"] = rule + kind
    if kind == "ParamScheduler":
        cfg["param_name"] = "lr" if rule == "OneCycle" else draw(st.sampled_from(["lr", "weight_decay"]))
    cfg["by_epoch"] = by_epoch = draw(st.booleans())
    if by_epoch:
        cfg["convert_to_iter_based"] = draw(st.booleans())
    last = 8 if by_epoch else 24
    if rule == "OneCycle":  # neither MMEngine nor torch has one of a single step
        cfg["begin"] = draw(st.integers(0, last - 4))
        cfg["total_steps"] = last - cfg["begin"]
    elif draw(st.booleans()):
        cfg["begin"] = draw(st.integers(0, last - 1))
        if draw(st.booleans()):
            cfg["end"] = draw(st.integers(cfg["begin"] + 1, last + 2))
    return cfg


def mmengine_schedulers(cfgs, optimizer, epoch_length, max_epochs):
    """As MMEngine's Runner builds them."""
    built = []
    for cfg in cfgs:
        cfg = dict(copy.deepcopy(cfg))
        cfg.setdefault("end", max_epochs if cfg.get("by_epoch", True) else max_epochs * epoch_length)
        built.append(
            PARAM_SCHEDULERS.build(
                cfg, default_args=dict(optimizer=optimizer, epoch_length=epoch_length, _scope_="mmengine")
            )
        )
    return built


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "wrapped"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@settings(max_examples=120, deadline=None)
@given(cfgs=st.lists(configs(), min_size=1, max_size=3), groups=st.integers(1, 3))
def test_values_are_mmengines_in_every_iteration(kind, wrapped, cfgs, groups):
    stock, fused, arguments = OPTIMIZERS[kind]
    theirs, ours = stock(parameter_groups(groups)), fused(parameter_groups(groups), lr=0.3, **arguments)
    if wrapped:
        theirs, ours = MMEngineWrapper(theirs), fusedopt.OptimWrapper(ours)
    before = copy.deepcopy(cfgs)
    reference = mmengine_schedulers(cfgs, theirs, 3, 8)
    built = build_param_schedulers(cfgs, ours, epoch_length=3, max_epochs=8, max_iters=24)
    assert cfgs == before
    for epoch in range(8):
        for iteration in range(3):
            assert_same(values(ours), values(theirs), f"epoch {epoch}, iteration {iteration}")
            ours.step()
            theirs.step()
            for each in (*built, *reference):
                if not each.by_epoch:
                    each.step()
        for each in (*built, *reference):
            if each.by_epoch:
                each.step()
    assert_same(values(ours), values(theirs), "at the end")


@pytest.mark.parametrize("wrapped", [False, True], ids=["raw", "wrapped"])
@pytest.mark.parametrize("kind", ["LR", "Momentum", "ParamScheduler"])
@settings(max_examples=60, deadline=None)
@given(
    metrics=st.lists(st.floats(0.1, 2.0), min_size=12, max_size=12),
    arguments=st.fixed_dictionaries(
        {},
        optional=dict(
            rule=st.sampled_from(["less", "greater"]),
            threshold_rule=st.sampled_from(["rel", "abs"]),
            patience=st.integers(0, 3),
            cooldown=st.integers(0, 3),
            factor=fractions(),
            min_value=st.one_of(fractions(0.0, 0.2), st.lists(fractions(0.0, 0.2), min_size=2, max_size=2)),
            threshold=fractions(0.0, 0.3),
            begin=st.integers(0, 5),
            end=st.integers(6, 13),
        ),
    ),
)
def test_plateaus_are_mmengines(kind, wrapped, metrics, arguments):
    theirs = torch.optim.AdamW(parameter_groups(2), lr=0.3)
    ours = fusedopt.FusedAdamW(parameter_groups(2), lr=0.3)
    if wrapped:
        theirs, ours = MMEngineWrapper(theirs), fusedopt.OptimWrapper(ours)
    cfg = dict(type=f"ReduceOnPlateau{kind}", monitor="loss", **arguments)
    if kind == "ParamScheduler":
        cfg["param_name"] = "weight_decay"
    [reference] = mmengine_schedulers([cfg], theirs, 3, 12)
    [built] = build_param_schedulers(cfg, ours, epoch_length=3, max_epochs=12)
    for epoch, metric in enumerate(metrics):
        for each in (built, reference):
            each.step()
            each.step({"accuracy": 1.0, "loss": metric})
        assert_same(values(ours), values(theirs), f"epoch {epoch}")
