"""Reading a state dict: what of it an optimizer takes up, and what it refuses before anything was changed.

Note [Right or refused]: a state dict may come from another version, another package or another optimizer. What torch
has added to its layout over time is filled in, and what other packages mean is taken as they mean it; but what the rule
needs and is not there is an error. Zeros for moments that are missing, or a class default for a learning rate, would
train on without one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any, NamedTuple

from torch import Tensor

from ..messages import (
    check_state_kinds,
    deal_out_as,
    dealt_out,
    dealt_out_alike,
    is_number,
    local_of,
    parameter_name,
    warn_caller,
)
from ..rules import CARRIED, PLAIN, Precision, Rule, count_problem, counted_key, keys_of, new_count, state_problem
from ..rules.codes import marked_order
from ..shards import flat_state_being_loaded
from .conversion import Conversion
from .names import in_the_order_of

__all__ = ["Loaded", "check_state", "converted_state", "read_state_dict", "shallow_copy", "take_steps_out"]

_NAMES = ("param_names", "param_name")


class Loaded(NamedTuple):
    """What was read of a state dict, in memory of its own.

    Attributes:
        state: as ``optimizer.state``, with what belongs to no parameter under its own keys.
        param_groups: as ``optimizer.param_groups``.
        counts: hidden step counts by parameter.
    """

    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]
    counts: dict[Tensor, Tensor]


def shallow_copy(state_dict: Any) -> Any:
    """A copy of ``state_dict`` for hooks to change; TypeError unless it is a dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dict, as state_dict() returns, got {type(state_dict).__name__}")
    return copy(state_dict)


def read_state_dict(
    rule: Rule,
    param_groups: Sequence[dict[str, Any]],
    state_dict: Mapping[str, Any],
    who: str,
    precision: Precision = PLAIN,
) -> Loaded:
    """Read what ``load_state_dict`` was given for an optimizer with these groups; neither is changed.

    Args:
        rule: the optimizer's.
        param_groups: the optimizer's.
        state_dict: of this optimizer, or of another with torch's layout.
        who: the optimizer's class, for messages.
        precision: the optimizer's. State in another form is converted, which one warning says.

    Raises:
        ValueError: it does not fit, or something is missing; see :meth:`FusedOptimizer.load_state_dict`.
        KeyError: it is no optimizer state dict.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise KeyError(f"state_dict has no {key!r}; expected what an optimizer's state_dict() returns")
    groups = deepcopy(state_dict["param_groups"])
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"loaded 'param_groups' is a {type(groups).__name__}; expected a list")
    groups = list(groups)
    if len(groups) != len(param_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(groups)}, expected {len(param_groups)}"
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"loaded param_groups[{index}] has no 'params'")
        for key in ("params", "param_names"):
            listed = group.get(key)
            if listed is None and key == "param_names":
                continue
            if not isinstance(listed, (list, tuple)) or not all(isinstance(each, Hashable) for each in listed):
                raise ValueError(f"loaded param_groups[{index}][{key!r}] is {listed!r:.80}; expected a list")
    groups = in_the_order_of(param_groups, groups)

    owners: dict[Any, tuple[int, Tensor, str]] = {}
    for g, (group, saved) in enumerate(zip(param_groups, groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"param_groups[{g}] has {len(saved['params'])} parameters, expected {len(group['params'])}"
            )
        for i, key in enumerate(saved["params"]):
            if key in owners:
                raise ValueError(f"loaded param_groups[{g}] has parameter {key!r} that is in the state dict already")
            owners[key] = g, group["params"][i], parameter_name(group, g, i)
        for names in _NAMES:
            # What torch.distributed.checkpoint makes is in this optimizer's order already, but for these lists.
            if any(isinstance(key, str) for key in saved["params"]):
                saved.pop(names, None)
            if names in group:
                saved.setdefault(names, deepcopy(group[names]))
        _complete_group(rule, saved, f"loaded param_groups[{g}]", who)

    state: dict[Any, Any] = {}
    counts: dict[Tensor, Tensor] = {}
    taken = set()
    saved_state = state_dict["state"]
    if not isinstance(saved_state, Mapping):
        raise ValueError(f"loaded 'state' is a {type(saved_state).__name__}; expected a dict")
    columns = {key for column in rule.columns for key in keys_of(column.name)}
    saved_state = _with_other_forms(rule, saved_state)
    conversion = Conversion(rule, precision, saved_state.values())
    for key, value in saved_state.items():
        if key not in owners:
            if isinstance(value, Mapping) and columns & value.keys():
                raise ValueError(
                    f"loaded state has an entry {key!r} with {sorted(columns & value.keys())}, but no parameter group "
                    "lists that parameter"
                )
            state[key] = deepcopy(value)
            continue
        g, param, name = owners[key]
        entry = _without_what_says_nothing(value)
        stepped = isinstance(entry, Mapping) and not columns.isdisjoint(entry)
        if stepped and not rule.hides_step and "step" not in entry and "step" in groups[g]:
            # apex, Transformer Engine and DeepSpeed count in the group.
            if (problem := count_problem(groups[g]["step"])) is not None:
                raise ValueError(f"loaded param_groups[{g}]['step'] {problem}")
            entry = {"step": groups[g]["step"], **entry}
            taken.add(g)
        if isinstance(entry, Mapping):
            check_state_kinds(name, entry)
        hidden = rule.hides_step
        entry = conversion.converted(param, name, entry)
        problem = state_problem(
            rule, groups[g], param, name, entry, hidden_step=hidden, loading=True, precision=precision
        )
        if problem is None and hidden and precision.average is not None and "ema" in value and "step" not in value:
            problem = f"loaded state of {name} has 'ema' and no 'step', the number of steps that its average goes by"
        if problem is not None:
            raise ValueError(problem)
        if entry:
            state[param] = _copied(entry, param, name)
            if hidden:
                _hide_step(rule, state[param], param, counts)
    for g in taken:
        del groups[g]["step"]  # counted in the state from here on
    for group, saved in zip(param_groups, groups, strict=True):
        saved["params"] = group["params"]
    if (remark := conversion.remark()) is not None:
        warn_caller(remark)
    return Loaded(state, groups, counts)


def _with_other_forms(rule: Rule, saved: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The entries, with what torch.distributed.checkpoint has left behind of them.

    It reads its flattened form with the keys that the optimizer's state has, and puts an empty dict where the form has
    none: a state in another form, as the one that codes are decoded to, has another key.
    """
    flat = flat_state_being_loaded()
    if flat is None:
        return saved
    states = [*(keys_of(column.name) for column in rule.columns), CARRIED[:2], CARRIED[2:], ("step",)]
    completed = {}
    for name, entry in saved.items():
        completed[name] = dict(entry) if isinstance(entry, Mapping) else {}
        for keys in states:
            found = {key: flat[f"state.{name}.{key}"] for key in keys if f"state.{name}.{key}" in flat}
            if found:
                for key in keys:
                    completed[name].pop(key, None)
                completed[name].update(found)
    return completed


def check_state(rule: Rule, param_groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raise ValueError where the state of another optimizer, which is to be taken over, is half there."""
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            entry = {key: value for key, value in (state.get(param) or {}).items() if value is not None}
            name, hidden = parameter_name(group, g, i), rule.hides_step
            problem = state_problem(rule, group, param, name, entry, hidden_step=hidden, loading=True)
            if problem is not None:
                raise ValueError(problem)


def converted_state(
    rule: Rule, precision: Precision, param_groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]
) -> dict[Any, dict[Any, Any]]:
    """The state of another optimizer, which passed :func:`check_state`, in the form in which one keeps it.

    Entries that are kept so already are not in the result.
    """
    if precision.is_plain:
        return {}
    conversion, converted = Conversion(rule, precision, state.values(), "state"), {}
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            entry = {key: value for key, value in (state.get(param) or {}).items() if value is not None}
            if entry:
                converted[param] = conversion.converted(param, parameter_name(group, g, i), entry)
    return converted


def _complete_group(rule: Rule, group: dict[str, Any], name: str, who: str) -> None:
    """Fill in what torch fills in; what else is missing is an error."""
    for key, default in rule.hyperparameters().as_defaults().items():
        if key in rule.hyperparameters.filled_in:
            group.setdefault(key, default)
            continue
        if key not in group:
            there = ", ".join(repr(key) for key in group if key != "params")
            raise ValueError(f"{name} has no {key!r}, which {who} needs; it has {there or 'nothing'}")
        value = group[key]
        if isinstance(default, tuple):
            fits = isinstance(value, Sequence) and len(value) == len(default) and all(map(is_number, value))
            expected = f"{len(default)} numbers"
        else:
            fits, expected = is_number(value), "a number"
        if not fits:
            raise ValueError(f"{name}[{key!r}] is {value!r}; expected {expected}")
    without_effect = {"foreach": None, "fused": None, "differentiable": False}
    try:
        rule.hyperparameters.from_group(
            {**group, **{key: without_effect[key] for key in without_effect if key in group}}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _without_what_says_nothing(entry: Any) -> Any:
    """The entry of a parameter without values that are None, as torch's SGD once had them.

    torch's flattened form (``flatten_optimizer_state_dict``) makes an entry of empty dicts for a parameter that has
    none in the checkpoint.
    """
    if not isinstance(entry, Mapping):
        return entry
    entry = {key: value for key, value in entry.items() if value is not None}
    return {} if all(isinstance(value, Mapping) and not value for value in entry.values()) else entry


def _copied(entry: Mapping[Any, Any], param: Tensor, name: str) -> dict[Any, Any]:
    """A copy on the parameter's device, so that the optimizer and the dict share no memory."""
    copied = {}
    for key, value in entry.items():
        if key == "step":
            dtype = value.dtype if isinstance(value, Tensor) else None
            copied[key] = new_count(float(value), param.device, dtype)
        elif isinstance(value, Tensor):
            copied[key] = value.detach().to(device=param.device, copy=True)
            is_coded = isinstance(key, str) and key.endswith("_codes")
            if is_coded:
                marked_order(local_of(param), copied[key])
            if value.shape == param.shape and not is_coded and not dealt_out_alike(param, value):
                try:
                    copied[key] = deal_out_as(param, copied[key])
                except Exception as error:  # torch cannot cut some uneven shards, and says so in many ways
                    raise ValueError(
                        f"loaded state {key!r} of {name} is {dealt_out(value)} but the parameter is "
                        f"{dealt_out(param)}, and torch cannot make it that: {error}"
                    ) from error
        else:
            copied[key] = deepcopy(value)
    return copied


def take_steps_out(rule: Rule, state: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, Tensor]:
    """Take the step counts of a rule that hides them out of ``state``, as they are: those of its real columns."""
    counts: dict[Tensor, Tensor] = {}
    for param, entry in state.items():
        if isinstance(param, Tensor):
            _hide_step(rule, entry, param, counts)
    return counts


def _hide_step(rule: Rule, entry: dict[Any, Any], param: Tensor, counts: dict[Tensor, Tensor]) -> None:
    """Take the count of a rule that hides it out of a parameter's state: a column that was saved is real."""
    count = entry.pop("step", None)
    key = counted_key(rule, entry)
    if key is not None:
        if count is None or (not bool(count) and key not in CARRIED and bool(local_of(entry[key]).any())):
            count = 1
        counts[param] = count if isinstance(count, Tensor) else new_count(count, param.device)
