"""Whether the state of one parameter is all there. What is missing in it is never taken for fresh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..messages.dtensors import dealt_out, dealt_out_alike
from ..messages.tensors import unsupported_kind
from .counts import count_problem

if TYPE_CHECKING:
    from .rule import Rule

__all__ = ["state_problem"]


def _columns_of_others(rule: Rule) -> set[str]:
    from . import RULES  # which is complete when this module has been imported

    columns = {column.name for each in RULES.values() for column in each.columns}
    return columns - {column.name for column in rule.columns}


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
) -> str | None:
    """Why ``entry`` is not the state of a parameter, in a sentence, or None.

    Note [Half a state]: no entry, or an empty one, says that the parameter has not stepped. An entry with something in
    it was written by steps, and what is missing there is missing: zeros in its place would be other moments without an
    error. Only what a group may switch on between steps (amsgrad) starts when it is first needed, and when loading not
    even that.

    Args:
        rule: the optimizer's.
        group: the parameter's group.
        param: the parameter.
        name: what messages call it.
        entry: its state; entries that are None count as absent.
        hidden_step: whether the step count is elsewhere.
        loading: also read the step count, and the kinds and shapes of columns, which a step looks at itself.
    """
    if entry is None:
        return None
    what = "loaded state" if loading else "state"
    if not isinstance(entry, Mapping if loading else dict):
        return f"{what} of {name} is a {type(entry).__name__}; expected a dict"
    there = {key: value for key, value in entry.items() if value is not None}
    own = [column.name for column in rule.columns]
    needed = [column for column in rule.columns if column.needed(group)]
    wanted = [column.name for column in needed]
    if needed and not hidden_step:
        wanted.insert(0, "step")
    if not needed or not there or (hidden_step and not loading and not any(name in there for name in own)):
        others = [key for key in there if key in _columns_of_others(rule)]
        if others:
            return f"{what} of {name} has {_listed(others)}, which is state of another optimizer"
        wanted = []
    late = () if loading else [column.name for column in needed if column.may_start_late]
    for key in wanted:
        if key not in there and key not in late:
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
        elif loading:
            problem = unsupported_kind(value)
            if value.shape != param.shape:
                problem = f"has shape {tuple(value.shape)}, expected {tuple(param.shape)}"
        if problem is None and not loading and key in own and not dealt_out_alike(param, value):
            problem = f"is {dealt_out(value)} but the parameter is {dealt_out(param)}"
        if problem is not None:
            return f"{what} {key!r} of {name} {problem}"
    return None
