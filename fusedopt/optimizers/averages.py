"""The averages of the weights that an optimizer keeps in its state: read, and put in the parameters' place."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import local_of
from ..rules import Average

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = [
    "averages_in_place",
    "averages_of",
    "begin_again",
    "has_stepped",
    "keep_average",
    "refuse_while_averaged",
    "steps_of",
]


def has_stepped(optimizer: FusedOptimizer, param: Tensor) -> bool:
    """Whether a step that was not skipped has changed this parameter. Reads its count, for which the host waits."""
    entry = optimizer.state.get(param) or {}
    counts = optimizer._counts
    count: Any = entry.get("step") if counts is None else counts.of_entry(param, entry)
    return bool(count is not None and float(count))


def steps_of(optimizer: FusedOptimizer) -> int:
    """The largest number of steps that a parameter has taken."""
    counts, most = optimizer._counts, 0
    for param, entry in optimizer.state.items():
        count: Any = entry.get("step") if counts is None else counts.of_entry(param, entry)
        most = max(most, 0 if count is None else int(count))
    return most


def averages_of(optimizer: FusedOptimizer) -> dict[Tensor, Tensor]:
    """See :meth:`FusedOptimizer.averages`."""
    if optimizer._precision.average is None:
        raise RuntimeError(
            f"this {type(optimizer).__name__} keeps no average; expected one with ema=dict(decay=...), or momentum"
        )
    found = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            average = (optimizer.state.get(param) or {}).get("ema")
            if isinstance(average, Tensor) and has_stepped(optimizer, param):
                found[param] = average
            else:
                found[param] = param.detach()
    return found


def refuse_while_averaged(optimizer: FusedOptimizer, what: str) -> None:
    """Raise RuntimeError where the parameters have the values of their averages, and not their own."""
    if optimizer._shared.averaged:
        raise RuntimeError(
            f"{what} inside of `with optimizer.averaged():`, where the parameters have the values of their averages; "
            "expected after the block, which gives them their own back"
        )


@contextlib.contextmanager
def averages_in_place(optimizer: FusedOptimizer) -> Iterator[dict[Tensor, Tensor]]:
    """See :meth:`FusedOptimizer.averaged`."""
    refuse_while_averaged(optimizer, "averaged()")
    averages = averages_of(optimizer)
    pairs = [
        (param, local_of(average))
        for param, average in averages.items()
        if local_of(average).data_ptr() != local_of(param).data_ptr()
    ]
    own = [local_of(param.detach()).clone() for param, _ in pairs]
    optimizer._shared.averaged = True
    try:
        with torch.no_grad():
            for param, average in pairs:
                local_of(param.detach()).copy_(average)
        yield averages
    finally:
        with torch.no_grad():
            # A model that was cast or moved in the block has other memory now.
            for (param, _), value in zip(pairs, own, strict=True):
                local_of(param.detach()).copy_(value)
        optimizer._shared.averaged = False


def begin_again(optimizer: FusedOptimizer) -> None:
    """Let the average begin anew, with the weights that the next step finds."""
    for entry in optimizer.state.values():
        if entry:
            entry["ema"] = None


def _alike(one: Average, other: Average) -> bool:
    """Whether two are the same but for the rounding of 1 - decay."""
    close = math.isclose(one.smallest_weight, other.smallest_weight, rel_tol=1e-9, abs_tol=1e-15)
    return close and (one.begin, one.interval, one.gamma) == (other.begin, other.interval, other.gamma)


def keep_average(optimizer: FusedOptimizer, average: Average) -> None:
    """Let an optimizer that keeps no average keep one from its next step on; it begins with the weights.

    Args:
        optimizer: at any point of its training.
        average: what the ``ema`` of a new optimizer would be.

    Raises:
        ValueError: it keeps another one, or no parameter requires grad.
    """
    precision = optimizer._precision
    if precision.average is not None and not _alike(precision.average, average):
        raise ValueError(
            f"the optimizer keeps the average {precision.average.as_dict()}; expected {average.as_dict()}, or none"
        )
    if not any(param.requires_grad for group in optimizer.param_groups for param in group["params"]):
        raise ValueError("ema: no parameter of this optimizer requires grad, so no step would average anything")
    if precision.average is None:
        begin_again(optimizer)
    optimizer._precision = precision.with_average(average)
    optimizer._backend, optimizer._introduced = None, False
