"""Warns if a scheduler steps before its optimizer."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from ...messages import warn_caller
from ..wrappers import BaseOptimWrapper
from ..wrappers.base import DRIVEN

__all__ = ["OptimizerLike", "is_watched", "optimizer_of", "unwatch", "warn_unless_stepped", "watch"]

OptimizerLike = torch.optim.Optimizer | BaseOptimWrapper

# A scheduler that steps before the first optimizer step skips the first value of its schedule. To detect that, torch's
# schedulers replace `optimizer.step` to set `_opt_called`. A hook that sets it leaves the method alone.
_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()


def _note_step(watched: weakref.ref[torch.optim.Optimizer], *_: Any) -> None:
    if (optimizer := watched()) is not None:  # not the stepping one, if a fused twin took over the hooks
        optimizer._opt_called = True  # type: ignore[attr-defined]


def optimizer_of(driven: OptimizerLike) -> torch.optim.Optimizer:
    """The optimizer itself, or a wrapper's optimizer."""
    return driven.optimizer if isinstance(driven, BaseOptimWrapper) else driven


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the first step of ``optimizer`` will be recorded."""
    handle = _watched.get(optimizer)
    # Recovery from an error may have removed the hook.
    return handle is not None and handle.id in (handle.hooks_dict_ref() or ())


def watch(driven: OptimizerLike) -> None:
    """Record the first step of the optimizer."""
    optimizer = optimizer_of(driven)
    if not is_watched(optimizer) and not getattr(optimizer, "_opt_called", False):
        hook = functools.partial(_note_step, weakref.ref(optimizer))
        _watched[optimizer] = optimizer.register_step_post_hook(hook)


def unwatch(driven: OptimizerLike) -> bool:
    """Stop watching the optimizer; return whether it was watched."""
    watched = is_watched(optimizer_of(driven))
    handle = _watched.pop(optimizer_of(driven), None)
    if handle is not None:
        handle.remove()
    return watched


def warn_unless_stepped(driven: OptimizerLike) -> None:
    """Warn if the optimizer was watched and has not stepped; stop watching it."""
    if not unwatch(driven):
        return
    optimizer = optimizer_of(driven)
    # No step is expected of a wrapper that accumulates, or whose scaler skipped the step.
    excused = optimizer in DRIVEN if driven is optimizer else getattr(driven, "inner_count", 0)
    if not getattr(optimizer, "_opt_called", False) and not excused:
        warn_caller(
            "scheduler.step() was called before optimizer.step(), so the first value of the schedule is skipped; "
            "call the optimizer's first"
        )
