"""Whether the state of one parameter is all there. What is missing in it is never taken for fresh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages.dtensors import dealt_out, dealt_out_alike, is_dtensor, local_of
from ..messages.tensors import unsupported_kind
from .counts import count_problem
from .masters import low_of
from .precision import CARRIED, PLAIN, Precision, keys_of

if TYPE_CHECKING:
    from .rule import Rule

__all__ = ["state_problem"]


def _columns_of_others(rule: Rule) -> set[str]:
    from . import RULES  # which is complete when this module has been imported

    def keys(rule: Rule) -> set[str]:
        return {key for column in rule.columns for key in keys_of(column.name)}

    return {key for each in RULES.values() for key in keys(each)} - keys(rule)


def _in_another_form(wanted: str, there: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The key of what is there in place of a key that is wanted and not there: the same in another form."""
    alike = [keys_of(name) for name in names] + [CARRIED[:2]]
    for keys in alike:
        if wanted in keys:
            return next((key for key in keys if key in there), None)
    return None


def _lies_as(param: Tensor, key: str, value: Any) -> bool:
    """Whether a state lies in the processes as its parameter does. Codes are those of the part in this one."""
    return not is_dtensor(value) if key.endswith("_codes") else dealt_out_alike(param, value)


def _problem_of_master(param: Tensor, wanted: str, key: str, stored: Tensor) -> str | None:
    """Why a master in another form cannot be kept as is wanted, as the end of a sentence, or None."""
    if stored.shape != param.shape or not dealt_out_alike(param, stored) or stored.device != param.device:
        return f"is {stored.dtype} of shape {tuple(stored.shape)} on {stored.device}; expected the parameter's"
    if wanted == "master" or low_of(local_of(param), key, local_of(stored), torch.int16) is not None:
        return None
    return (
        "rounds to other values than the parameter has, and master='split' or 'split8', whose bits lie in both, cannot "
        "hold it; expected the weights of the same checkpoint in the model"
    )


def _listed(keys: Iterable[Any]) -> str:
    quoted = [repr(key) for key in keys]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted) or "nothing"


def state_problem(
    rule: Rule,
    group: Mapping[str, Any],
    param: Tensor,
    name: str,
    entry: Any,
    *,
    hidden_step: bool,
    loading: bool = False,
    precision: Precision = PLAIN,
) -> str | None:
    """Why ``entry`` is not the state of a parameter, in a sentence, or None.

    Note [Half a state]: no entry, or an empty one, says that the parameter has not stepped. An entry with something in
    it was written by steps, and what is missing there is missing: zeros in its place would be other moments without an
    error. Only what a group may switch on between steps (amsgrad) starts when it is first needed, and when loading not
    even that. An average that is None begins with the next step: nothing of what was loaded had one. A state in another
    form than the optimizer keeps it in is not what a step can use, either; it is converted when it is loaded, but for
    a master, which is when the weights are there.

    Args:
        rule: the optimizer's.
        group: the parameter's group.
        param: the parameter.
        name: what messages call it.
        entry: its state; entries that are None count as absent.
        hidden_step: whether the step count is elsewhere.
        loading: also read the step count, and the kinds and shapes of columns, which a step looks at itself.
        precision: in what form the optimizer keeps its state.
    """
    if entry is None:
        return None
    what = "loaded state" if loading else "state"
    if not isinstance(entry, Mapping if loading else dict):
        return f"{what} of {name} is a {type(entry).__name__}; expected a dict"
    there = {key: value for key, value in entry.items() if value is not None}
    names = [column.name for column in rule.columns]
    carried = precision.carried_keys(param)
    own = [*(precision.key_of(rule, column) for column in names), *carried]
    needed = rule.needed_keys(group, param, precision)
    wanted = ["step", *needed] if needed and not hidden_step else list(needed)
    ours = {key for column in names for key in keys_of(column)}.union(CARRIED if carried else ())
    if not needed or not there or (hidden_step and not loading and ours.isdisjoint(there)):
        others = [key for key in there if key in _columns_of_others(rule)]
        if others:
            return f"{what} of {name} has {_listed(others)}, which is state of another optimizer"
        wanted = []
    late = [] if loading else [precision.key_of(rule, each.name) for each in rule.columns if each.may_start_late]
    if "ema" in entry and entry["ema"] is None:
        late.append("ema")
    if hidden_step and not loading and not there.keys() & {key for name in names for key in keys_of(name)}:
        # Momentum that a group switches on is zeros as well as absent, but for dampening, which the first step has not.
        late += [] if group.get("dampening") else own[: len(names)]
    for key in wanted:
        if key in there:
            continue
        if (instead := _in_another_form(key, there, names)) is not None:
            if key in CARRIED and loading:
                continue  # converted at the first step, when the weights are there
            if key in CARRIED and isinstance(there[instead], Tensor):
                if (problem := _problem_of_master(param, key, instead, there[instead])) is not None:
                    return f"{what} {instead!r} of {name} {problem}"
                continue
            return (
                f"{what} of {name} has {instead!r} where this optimizer keeps {key!r}, by its state_dtype and master; "
                "expected a state dict to load_state_dict, which converts"
            )
        if key not in late:
            return (
                f"{what} of {name} has no {key!r}; there is {_listed(there)}, and a parameter that has stepped has "
                f"{_listed(wanted)} (one that has not has no entry)"
            )
    for key in ("step", *own):
        if key not in there or (not loading and key not in wanted):
            continue
        value, problem = there[key], None
        if key == "step":
            problem = count_problem(value, read=loading)
        elif not isinstance(value, Tensor):
            problem = f"is {value!s:.80}; expected a tensor"
        elif loading and key in names:
            problem = unsupported_kind(value)
            if value.shape != param.shape:
                problem = f"has shape {tuple(value.shape)}, expected {tuple(param.shape)}"
        else:
            problem = precision.problem_at(param, key, value)
        if problem is None and not loading and key in own and not _lies_as(param, key, value):
            problem = f"is {dealt_out(value)} but the parameter is {dealt_out(param)}"
        if problem is not None:
            return f"{what} {key!r} of {name} {problem}"
    return None
