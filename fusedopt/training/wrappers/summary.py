"""Readable summaries of an optimizer's parameters and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...messages import aligned, group_names
from ...optimizers.base import FusedOptimizer
from ..unwrapping import named_parameters

__all__ = ["parameter_table", "settings_summary"]

#: The most names in a line of the summary.
_QUOTED_NAMES = 3


class _Row(NamedTuple):
    """One parameter, its name if known, and its group."""

    name: str | None
    param: Tensor
    group: Mapping[str, Any]
    group_number: int
    position: int


def _rows(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> list[_Row]:
    """Every parameter of the optimizer, with its name in ``model`` or else in its group."""
    names = {id(param): name for name, param in named_parameters(model)} if model is not None else {}
    rows = []
    for number, group in enumerate(optimizer.param_groups):
        own = group_names(group)
        for position, param in enumerate(group["params"]):
            name = names.get(id(param), own[position] if position < len(own) else None)
            rows.append(_Row(name, param, group, number, position))
    return rows


def _number(value: Any) -> str:
    return "-" if value is None else f"{float(value):.4g}"


def settings_summary(optimizer: torch.optim.Optimizer) -> str:
    """A line about the optimizer, and one for each pair of learning rate and weight decay among its parameters."""
    rows = _rows(optimizer)
    by_settings: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        by_settings.setdefault((_number(row.group.get("lr")), _number(row.group.get("weight_decay"))), []).append(row)
    backend = getattr(optimizer, "backend_in_use", None)
    lines = [
        f"{type(optimizer).__name__}{f' (backend {backend})' if backend else ''}: "
        f"{_count(len(optimizer.param_groups), 'group')}, {_sizes(rows)}"
    ]
    for (lr, decay), members in by_settings.items():
        names = [row.name for row in members if row.name is not None]
        quoted = names[:_QUOTED_NAMES] + ["..."] * (len(names) > _QUOTED_NAMES)
        lines.append(f"  lr {lr}, weight_decay {decay}: {_sizes(members)}{': ' * bool(quoted)}{', '.join(quoted)}")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _sizes(rows: Sequence[_Row]) -> str:
    # A lazy parameter has no shape yet.
    elements = sum(0 if torch.nn.parameter.is_lazy(row.param) else row.param.numel() for row in rows)
    return f"{_count(len(rows), 'parameter')}, {_count(elements, 'element')}"


def parameter_table(optimizers: Mapping[str, torch.optim.Optimizer], model: nn.Module | None = None) -> str:
    """A line for each parameter: name, shape, learning rate, weight decay, group; and the bytes that they take.

    Args:
        optimizers: the optimizers by name; the name is put before the number of a group.
        model: adds names that groups lack, and the parameters that no optimizer trains.
    """
    lines = [("parameter", "shape", "lr", "weight_decay", "group")]
    known = set()
    for label, optimizer in optimizers.items():
        for row in _rows(optimizer, model):
            known.add(id(row.param))
            name = row.name or f"param_groups[{row.group_number}]['params'][{row.position}]"
            lr, decay = (_number(row.group.get(key)) for key in ("lr", "weight_decay"))
            lines.append((name, _shape(row.param), lr, decay, f"{label} {row.group_number}".strip()))
    for name, param in named_parameters(model) if model is not None else ():
        if id(param) not in known:
            lines.append((name, _shape(param), "-", "-", "in no group" if param.requires_grad else "frozen"))
    return "\n".join([aligned(lines), *_bytes_taken(optimizers)])


def _bytes_taken(optimizers: Mapping[str, torch.optim.Optimizer]) -> Iterator[str]:
    """A line for each fused optimizer, of the bytes that it takes for each element of its parameters."""
    for label, optimizer in optimizers.items():
        if isinstance(optimizer, FusedOptimizer):
            yield f"{label}{': ' * bool(label)}{optimizer.bytes_per_parameter()}"


def _shape(param: Tensor) -> str:
    return "?" if torch.nn.parameter.is_lazy(param) else "x".join(map(str, param.shape)) or "scalar"
