"""What an optimizer makes of a state dict from elsewhere: the right values, or an error that changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import backend_name as name_of
from cases import bits, each_backend, each_optimizer, parameters, set_gradients, state_bits, whole_state
from oracle import CheckedStep
from torch import nn

import fusedopt
from fusedopt.optimizers import FUSED_TWINS, FusedOptimizer

SHAPES = [(4,), (3, 5), ()]


def usual(cls: type[FusedOptimizer]) -> dict[str, Any]:
    """Settings with state."""
    return {"lr": 0.1, "momentum": 0.9} if cls is fusedopt.FusedSGD else {"lr": 0.01}


each_twin = pytest.mark.parametrize("cls", FUSED_TWINS.values(), ids=lambda cls: cls.__name__)
each_adam = pytest.mark.parametrize("cls", [fusedopt.FusedAdam, fusedopt.FusedAdamW], ids=lambda cls: cls.__name__)


def trained(cls: Any, steps: int = 3, **settings: Any) -> tuple[Any, list[nn.Parameter]]:
    """torch's for-loop optimizer after some steps, and its parameters."""
    params = parameters(SHAPES)
    optimizer = cls.stock(params, **{**usual(cls), **settings}, foreach=False)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return optimizer, params


def target(cls: Any, params: list[nn.Parameter], steps: int = 1, **settings: Any) -> tuple[Any, list[nn.Parameter]]:
    """A fused optimizer on copies of the parameters, with some state of its own that a load has to replace."""
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = cls(copies, **{**usual(cls), **settings})
    values = [param.detach().clone() for param in copies]
    for step in range(steps):
        set_gradients(copies, 50 + step)
        optimizer.step()
    for param, value in zip(copies, values, strict=True):
        param.data.copy_(value)
    return optimizer, copies


def assert_goes_on_as(stock: Any, params: list[nn.Parameter], fused: Any, copies: list[nn.Parameter]) -> None:
    for step in range(10, 13):
        set_gradients(params, step)
        set_gradients(copies, step)
        stock.step()
        check = CheckedStep(fused)
        fused.step()
        check.check()
    for param, copied in zip(params, copies, strict=True):
        torch.testing.assert_close(copied, param, rtol=1e-5, atol=1e-6)


def everything(optimizer: Any) -> Any:
    """All that a load may change, by value."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    states = [{key: bits([value]) for key, value in whole_state(optimizer, param).items()} for param in params]
    return bits(params), states, [list(map(id, group["params"])) for group in optimizer.param_groups], repr(groups)


def assert_refused(optimizer: Any, saved: Any, message: str) -> None:
    """The load is an error that says so, neither the optimizer nor the dict is changed, and the next step is right."""
    before, dict_before = everything(optimizer), repr(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    assert repr(saved) == dict_before
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_gradients(params, 99)
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


# --- What is missing in the state ------------------------------------------------------------------------------------


@each_adam
@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
def test_half_an_entry_is_an_error(cls: Any, key: str) -> None:
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    del saved["state"][1][key]
    there = " and ".join(repr(name) for name in ("step", "exp_avg", "exp_avg_sq") if name != key)
    message = (
        rf"state of parameter \(param_groups\[0\]\['params'\]\[1\].* has no '{key}'; there is {there}, and .* has "
    )
    assert_refused(optimizer, saved, message)
    saved["state"][1][key] = None
    assert_refused(optimizer, saved, f"has no '{key}'")


@each_adam
def test_moments_under_other_names_are_an_error(cls: Any) -> None:
    """As in 8-bit optimizers."""
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    for entry in saved["state"].values():
        entry["state1"], entry["state2"] = entry.pop("exp_avg"), entry.pop("exp_avg_sq")
    assert_refused(optimizer, saved, r"\[0\].* has no 'exp_avg'; there is 'step', 'state1' and 'state2'")
    for entry in saved["state"].values():
        del entry["step"]
    assert_refused(optimizer, saved, r"\[0\].* has no 'step'; there is 'state1' and 'state2'")


def test_sgds_own_half_is_an_error() -> None:
    stock, params = trained(fusedopt.FusedSGD)
    optimizer, _ = target(fusedopt.FusedSGD, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["state"][2]["buf"] = saved["state"][2].pop("momentum_buffer")
    assert_refused(optimizer, saved, r"\[2\].* has no 'momentum_buffer'; there is 'buf'")


@each_twin
def test_a_parameter_without_an_entry_has_not_stepped(cls: Any) -> None:
    stock, params = trained(cls)
    for empty in (None, {}, {"momentum_buffer": None}):
        optimizer, copies = target(cls, params)
        saved = copy.deepcopy(stock.state_dict())
        if empty is None:
            del saved["state"][1]
        else:
            saved["state"][1] = empty
        again = cls.stock(twins := [nn.Parameter(p.detach().clone()) for p in params], **usual(cls))
        again.load_state_dict({**saved, "state": {key: saved["state"][key] for key in (0, 2)}})
        optimizer.load_state_dict(saved)
        assert not optimizer.state.get(copies[1])
        assert_goes_on_as(again, twins, optimizer, copies)


@each_adam
def test_amsgrad_needs_its_maximum(cls: Any) -> None:
    stock, params = trained(cls, amsgrad=True)
    optimizer, copies = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    optimizer.load_state_dict(saved)
    assert_goes_on_as(stock, params, optimizer, copies)
    del saved["state"][0]["max_exp_avg_sq"]
    assert_refused(optimizer, saved, r"\[0\].* has no 'max_exp_avg_sq'; there is 'step', 'exp_avg' and 'exp_avg_sq'")


@each_twin
def test_state_of_another_optimizer_is_an_error(cls: Any) -> None:
    adam = cls is not fusedopt.FusedSGD
    other, params = trained(fusedopt.FusedSGD if adam else fusedopt.FusedAdam)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(other.state_dict())
    key = "betas" if adam else "momentum"
    assert_refused(
        optimizer, saved, rf"loaded param_groups\[0\] has no '{key}', which {cls.__name__} needs; it has 'lr'"
    )
    # The same where the groups were completed by hand.
    saved["param_groups"] = optimizer.state_dict()["param_groups"]
    there = "'momentum_buffer'" if adam else "'step', 'exp_avg' and 'exp_avg_sq'"
    assert_refused(optimizer, saved, rf"\[0\].* has no '{'step' if adam else 'momentum_buffer'}'; there is {there}")


def test_adams_state_in_an_sgd_without_state_is_an_error() -> None:
    other, params = trained(fusedopt.FusedAdam)
    optimizer, _ = target(fusedopt.FusedSGD, params, momentum=0)
    saved = {"state": other.state_dict()["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    assert_refused(optimizer, saved, r"\[0\].* has 'exp_avg' and 'exp_avg_sq', which is state of another optimizer")


@each_twin
def test_state_of_a_parameter_that_no_group_lists_is_an_error(cls: Any) -> None:
    """A dict that went through JSON, say: its parameters would start afresh."""
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["state"] = {str(key): value for key, value in saved["state"].items()}
    assert_refused(optimizer, saved, "loaded state has an entry '0' with .*no parameter group lists that parameter")
    saved = copy.deepcopy(stock.state_dict())
    saved["param_groups"][0]["params"] = [0, 1, 1]
    assert_refused(optimizer, saved, r"loaded param_groups\[0\] has parameter 1 that is in the state dict already")


@each_twin
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"is \{\}; expected a tensor"),
        ([0.0] * 4, "expected a tensor"),
        (np.zeros(4, np.float32), "expected a tensor"),
        (torch.zeros(5), r"has shape \(5,\), expected \(4,\)"),
        (torch.zeros(2, 2), r"has shape \(2, 2\), expected \(4,\)"),  # as many elements
        (torch.zeros(4, dtype=torch.int8), "has dtype torch.int8"),
        (torch.zeros(4, device="meta"), "is on the meta device"),
    ],
)
def test_a_moment_of_another_kind_is_an_error(cls: Any, value: Any, message: str) -> None:
    key = "momentum_buffer" if cls is fusedopt.FusedSGD else "exp_avg"
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["state"][0] = {**saved["state"][0], "more": 1, key: value}
    assert_refused(optimizer, saved, rf"loaded state '{key}' of parameter \(param_groups\[0\].* {message}")


# --- Step counts -----------------------------------------------------------------------------------------------------


@each_adam
@pytest.mark.parametrize(
    "step",
    [-1, -2.0, math.nan, math.inf, 2.5, True, "3", {}, [3], torch.tensor(math.nan), torch.tensor(-1), torch.ones(2)],
)
def test_a_step_that_is_no_count_is_an_error(cls: Any, step: Any) -> None:
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["state"][1]["step"] = step
    assert_refused(optimizer, saved, r"loaded state 'step' of parameter .*\[1\].* expected .*>= 0")
    for entry in saved["state"].values():
        del entry["step"]
    saved["param_groups"][0]["step"] = step
    assert_refused(optimizer, saved, r"loaded param_groups\[0\]\['step'\] .* expected .*>= 0")


@each_adam
@pytest.mark.parametrize("form", [int, float, np.float32, torch.tensor, lambda n: torch.tensor([n], dtype=torch.int32)])
def test_a_step_of_another_form_is_the_count(cls: Any, form: Callable[[int], Any]) -> None:
    for where in ("state", "group"):
        stock, params = trained(cls, steps=7)
        optimizer, copies = target(cls, params)
        saved = copy.deepcopy(stock.state_dict())
        for entry in saved["state"].values():
            entry.pop("step")
            if where == "state":
                entry["step"] = form(7)
        if where == "group":
            # apex, Transformer Engine and DeepSpeed keep it there.
            saved["param_groups"][0]["step"] = form(7)
        optimizer.load_state_dict(saved)
        assert [float(state["step"]) for state in optimizer.state.values()] == [7.0] * 3
        assert "step" not in optimizer.param_groups[0], "it would be a second count, which nobody counts up"
        assert_goes_on_as(stock, params, optimizer, copies)


@each_adam
def test_the_states_own_step_comes_before_the_groups(cls: Any) -> None:
    stock, params = trained(cls, steps=7)
    optimizer, copies = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["param_groups"][0]["step"] = 3
    del saved["state"][0]["step"]
    optimizer.load_state_dict(saved)
    assert [float(optimizer.state[param]["step"]) for param in copies] == [3, 7, 7]


def test_a_count_that_float32_cannot_count_on_is_float64() -> None:
    stock, params = trained(fusedopt.FusedAdam)
    optimizer, copies = target(fusedopt.FusedAdam, params)
    saved = copy.deepcopy(stock.state_dict())
    saved["state"][0]["step"] = 2**24
    optimizer.load_state_dict(saved)
    set_gradients(copies, 0)
    optimizer.step()
    assert float(optimizer.state[copies[0]]["step"]) == 2**24 + 1


def test_a_momentum_buffer_with_a_step_keeps_it_apart() -> None:
    """As earlier versions of fusedopt left it in a state dict made by walking ``optimizer.state``."""
    stock, params = trained(fusedopt.FusedSGD, dampening=0.5)
    for step in (3, torch.tensor(3.0), 0, torch.tensor(0)):
        optimizer, copies = target(fusedopt.FusedSGD, params)
        saved = copy.deepcopy(stock.state_dict())
        for entry in saved["state"].values():
            entry["step"] = step
        optimizer.load_state_dict(saved)
        assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())
        twin = [nn.Parameter(param.detach().clone()) for param in params]
        again = torch.optim.SGD(twin, lr=1)
        again.load_state_dict(copy.deepcopy(stock.state_dict()))
        assert_goes_on_as(again, twin, optimizer, copies)
    saved["state"][0]["step"] = "three"
    assert_refused(optimizer, saved, r"loaded state 'step' of parameter .*\[0\].* is 'three'; expected a number >= 0")


# --- Groups ----------------------------------------------------------------------------------------------------------

#: By rule.
FILLED_IN = {
    "sgd": ["nesterov", "maximize", "foreach", "differentiable", "fused"],
    "adam": [*("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")],
}


@each_twin
def test_what_newer_versions_of_torch_added_is_filled_in(cls: Any) -> None:
    stock, params = trained(cls)
    optimizer, copies = target(cls, params)
    saved = copy.deepcopy(stock.state_dict())
    for key in FILLED_IN[cls.rule.name]:
        saved["param_groups"][0].pop(key, None)
    optimizer.load_state_dict(saved)
    again = cls.stock(params, lr=1)
    again.load_state_dict(copy.deepcopy(saved))
    differing = {"foreach", "fused"}  # no two versions of torch agree here
    assert set(optimizer.param_groups[0]) == set(again.param_groups[0])
    for key in optimizer.param_groups[0].keys() - {"params"} - differing:
        assert optimizer.param_groups[0][key] == again.param_groups[0][key], key
    assert_goes_on_as(again, params, optimizer, copies)


@each_twin
def test_a_group_without_what_the_rule_needs_is_an_error(cls: Any) -> None:
    stock, params = trained(cls)
    optimizer, _ = target(cls, params)
    needed = stock.param_groups[0].keys() - {"params", *FILLED_IN[cls.rule.name]}
    assert {"lr", "weight_decay"} < needed
    for key in sorted(needed):
        saved = copy.deepcopy(stock.state_dict())
        del saved["param_groups"][0][key]
        message = rf"loaded param_groups\[0\] has no '{key}', which {cls.__name__} needs; it has '"
        assert_refused(optimizer, saved, message)
        for wrong in (None, "fast", {}):
            saved["param_groups"][0][key] = wrong
            message = rf"loaded param_groups\[0\]\['{key}'\] is .*; expected (a number|2 numbers)"
            assert_refused(optimizer, saved, message)


def test_not_a_group_not_a_state() -> None:
    stock, params = trained(fusedopt.FusedAdam)
    optimizer, _ = target(fusedopt.FusedAdam, params)
    saved = copy.deepcopy(stock.state_dict())
    del saved["param_groups"][0]["params"]
    assert_refused(optimizer, saved, r"loaded param_groups\[0\] has no 'params'")
    assert_refused(optimizer, {**stock.state_dict(), "state": []}, "loaded 'state' is a list; expected a dict")
    saved = copy.deepcopy(stock.state_dict())
    saved["state"][2] = saved["state"][2]["exp_avg"]
    assert_refused(optimizer, saved, r"loaded state of parameter .*\[2\].* is a Tensor; expected a dict")


# --- The same state on other ways in ---------------------------------------------------------------------------------


@each_twin
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step", "momentum_buffer"])
def test_fuse_refuses_half_a_state(cls: Any, key: str) -> None:
    stock, params = trained(cls)
    if key not in stock.state[params[1]]:
        return
    stock.state[params[1]]["other"] = stock.state[params[1]].pop(key)
    before, groups = state_bits(stock), copy.deepcopy(stock.param_groups)
    with pytest.raises(ValueError, match=rf"state of parameter \(param_groups\[0\].*\[1\].* has no '{key}'"):
        fusedopt.fuse(stock)
    assert state_bits(stock) == before
    assert repr(stock.param_groups) == repr(groups)


@each_backend
@each_optimizer
def test_half_a_state_at_a_step_is_an_error(cls: Any, backend: str) -> None:
    params = parameters(SHAPES)
    optimizer = cls(params, **usual(cls), backend=name_of(backend))
    set_gradients(params, 0)
    optimizer.step()
    for key in list(optimizer.state[params[1]]):
        mine = optimizer.state[params[1]]
        if cls.rule.hides_step:
            other = "momentum_buffer" if key == "exp_avg" else "exp_avg"
            whole, broken = dict(mine), {other: mine[key]}
            message = rf"state of parameter .*\[1\].* has '{other}', which is state of another optimizer"
        else:
            whole, broken = dict(mine), {name: value for name, value in mine.items() if name != key}
            message = rf"state of parameter \(param_groups\[0\]\['params'\]\[1\].* has no '{key}'"
        optimizer.state[params[1]] = broken
        set_gradients(params, 1)
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert everything(optimizer) == before
        for wrong in ({}, [1.0]):
            optimizer.state[params[1]] = {**whole, key: wrong}
            values = bits(params)
            with pytest.raises(RuntimeError, match=rf"state '{key}' of parameter .*\[1\].* is .*; expected a"):
                optimizer.step()
            assert bits(params) == values
        optimizer.state[params[1]] = whole


@each_optimizer
def test_unpickling_fills_in_no_setting_that_the_rule_needs(cls: Any) -> None:
    params = parameters(SHAPES)
    optimizer = cls(params, **usual(cls))
    set_gradients(params, 0)
    optimizer.step()
    del optimizer.param_groups[0]["lr"]
    for key in cls.rule.hyperparameters.filled_in:
        optimizer.param_groups[0].pop(key, None)
    again, twins = pickle.loads(pickle.dumps((optimizer, params)))
    set_gradients(twins, 1)
    with pytest.raises(KeyError, match="lr"):
        again.step()
    again.param_groups[0]["lr"] = 0.1
    check = CheckedStep(again)
    again.step()
    check.check()


# --- Names -----------------------------------------------------------------------------------------------------------

NAMES = ["w", "v", "u"]
SAME = [(4,), (4,), (4,)]


def named(cls: Any, order: list[int], groups: str, values: list[torch.Tensor], names: list[str] = NAMES) -> Any:
    """An optimizer of three parameters of one shape in an order: one group of pairs, or a group each, as MMEngine's."""
    params = [nn.Parameter(value.clone()) for value in values]
    if groups == "param_names":
        given: Any = [(names[i], params[i]) for i in order]
    elif groups == "param_name":
        given = [{"params": [params[i]], "param_name": names[i], "weight_decay": 0.01 * i} for i in order]
    else:
        given = [params[i] for i in order]
    return cls(given, **usual(cls)), params


@each_optimizer
@pytest.mark.parametrize("groups", ["param_names", "param_name"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_in_another_order_are_sorted(cls: Any, groups: str, prefix: str) -> None:
    values = [torch.randn(4) for _ in range(3)]
    donor, theirs = named(cls, [0, 1, 2], groups, values, [prefix + name for name in NAMES])
    for step in range(3):
        set_gradients(theirs, step)
        theirs[1].grad = None if step == 1 else theirs[1].grad
        donor.step()
    optimizer, params = named(cls, [2, 0, 1], groups, [param.detach() for param in theirs])
    saved = copy.deepcopy(donor.state_dict())
    before = repr(saved)
    optimizer.load_state_dict(saved)
    assert repr(saved) == before
    for mine, other in zip(params, theirs, strict=True):
        have, want = whole_state(optimizer, mine), whole_state(donor, other)
        assert have.keys() == want.keys()
        assert all(torch.equal(have[key], want[key]) for key in have if not cls.rule.hides_step or key != "step")
    if groups == "param_name":
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0, 0.01]
    for step in range(3, 5):
        set_gradients(theirs, step)
        set_gradients(params, step)
        donor.step()
        optimizer.step()
    assert bits(params) == bits(theirs)
    # And what is saved then goes by its own names.
    third, last = named(cls, [1, 2, 0], groups, [param.detach() for param in params])
    third.load_state_dict(optimizer.state_dict())
    for mine, other in zip(last, params, strict=True):
        first = third.rule.columns[0].name
        assert torch.equal(third.state[mine][first], optimizer.state[other][first])


@each_optimizer
def test_names_in_other_places_are_an_error_where_they_cannot_be_sorted(cls: Any) -> None:
    values = [torch.randn(4) for _ in range(3)]
    donor, theirs = named(cls, [0, 1, 2], "param_names", values)
    set_gradients(theirs, 0)
    donor.step()
    optimizer, params = named(cls, [0, 2, 1], "param_names", values, ["w", "v", "new"])
    set_gradients(params, 0)
    optimizer.step()
    # w, v, u for w, new, v: v's state would become new's.
    assert_refused(
        optimizer, donor.state_dict(), r"has parameter 'v' where this optimizer has 'new' \(param_groups\[0\]"
    )
    split = cls([{"params": [("w", nn.Parameter(values[0]))]}, {"params": [("u", nn.Parameter(values[2]))]}], lr=0.1)
    whole = cls([{"params": [("u", nn.Parameter(values[0]))]}, {"params": [("v", nn.Parameter(values[2]))]}], lr=0.1)
    with pytest.raises(ValueError, match="has parameter 'w' where this optimizer has 'u'"):
        whole.load_state_dict(split.state_dict())


def test_the_same_names_in_other_groups_are_an_error() -> None:
    values = [nn.Parameter(torch.randn(4)) for _ in range(4)]
    pairs = list(zip("abcd", values, strict=True))
    one = fusedopt.FusedAdam([{"params": pairs[:2]}, {"params": pairs[2:]}])
    two = fusedopt.FusedAdam([{"params": pairs[::2]}, {"params": pairs[1::2]}])
    with pytest.raises(ValueError, match=r"parameters of param_groups\[0\] \('a', 'c'\) in other groups"):
        two.load_state_dict(one.state_dict())
    three = fusedopt.FusedAdam([{"params": pairs[2:][::-1], "lr": 0.5}, {"params": pairs[:2], "lr": 0.25}])
    one.load_state_dict(three.state_dict())
    assert [(group["lr"], group["param_names"]) for group in one.param_groups] == [
        (0.25, ["a", "b"]),
        (0.5, ["c", "d"]),
    ]
    twice = fusedopt.FusedAdam([{"params": [("a", values[0]), ("a", values[1])]}, {"params": [("b", values[2])]}])
    swapped = fusedopt.FusedAdam([{"params": [("a", values[0]), ("b", values[2])]}, {"params": [("a", values[1])]}])
    twice.load_state_dict(twice.state_dict())
    swapped.load_state_dict(swapped.state_dict())
    other = fusedopt.FusedAdam([{"params": [("b", values[0]), ("a", values[2])]}, {"params": [("a", values[1])]}])
    with pytest.raises(ValueError, match="another order of parameters, of which two are called 'a'"):
        other.load_state_dict(swapped.state_dict())


@each_optimizer
@pytest.mark.parametrize("groups", ["param_names", "param_name"])
def test_names_that_one_side_lacks_say_nothing_and_are_kept(cls: Any, groups: str) -> None:
    values = [torch.randn(4) for _ in range(3)]
    donor, theirs = named(cls, [0, 1, 2], groups, values)
    set_gradients(theirs, 0)
    donor.step()
    optimizer, params = named(cls, [0, 1, 2], groups, values)
    saved = copy.deepcopy(donor.state_dict())
    for group in saved["param_groups"]:
        del group[groups]
    optimizer.load_state_dict(saved)
    names = [group[groups] for group in optimizer.param_groups]
    assert names == ([NAMES] if groups == "param_names" else NAMES)
    first = optimizer.rule.columns[0].name
    for mine, other in zip(params, theirs, strict=True):
        assert torch.equal(optimizer.state[mine][first], donor.state[other][first])
    # Other names are a renaming: torch goes by the order, and takes them.
    renamed, _ = named(cls, [0, 1, 2], groups, values, ["a", "b", "c"])
    renamed.load_state_dict(donor.state_dict())
    assert [group[groups] for group in renamed.param_groups] == names
