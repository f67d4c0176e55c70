"""Names in messages: the closest known name for a wrong one, and a parameter's name and position."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["did_you_mean", "group_names", "parameter_name"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing clause for an error about an unknown ``name``: the closest known name, or all of them."""
    known = sorted(known)
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), folded, 1)
    return f"did you mean {folded[close[0]]!r}?" if close else f"expected one of {', '.join(known)}"


def group_names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters: its ``param_names``, else its ``param_name``; empty without either."""
    return list(_names_of(group))


def _names_of(group: Mapping[str, Any]) -> Sequence[str]:
    """The same, not copied: a group of thousands is asked for each of its parameters."""
    names = group.get("param_names") or ([group["param_name"]] if "param_name" in group else [])
    return names if isinstance(names, (list, tuple)) else list(names)


def parameter_name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """A parameter as errors name it: its name, if the group stores names, and always its position and shape."""
    names = _names_of(group)
    params = group["params"]
    param = params[index]
    known = isinstance(param, Tensor) and not torch.nn.parameter.is_lazy(param)
    shape = f", shape {tuple(param.shape)}" if known else ""
    quoted = f" {names[index]!r}" if index < len(names) else ""
    return f"parameter{quoted} (param_groups[{group_index}]['params'][{index}]{shape})"
