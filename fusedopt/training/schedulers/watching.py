"""Whether an optimizer has stepped before its schedulers do."""

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

# A scheduler that steps before the first optimizer step has skipped the first value of its schedule. torch's schedulers
# replace `optimizer.step` to find out, and leave `_opt_called` behind. A hook that does so leaves the method alone.
_watched: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()


def _note_step(watched: weakref.ref[torch.optim.Optimizer], *_: Any) -> None:
    if (optimizer := watched()) is not None:  # not the one that stepped, where a fused twin took over the hooks
        optimizer._opt_called = True  # type: ignore[attr-defined]


def optimizer_of(driven: OptimizerLike) -> torch.optim.Optimizer:
    """The optimizer that is driven, within its wrapper or without one."""
    return driven.optimizer if isinstance(driven, BaseOptimWrapper) else driven


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the first step of ``optimizer`` will be noted."""
    handle = _watched.get(optimizer)
    # A failure may have taken the hook away again.
    return handle is not None and handle.id in (handle.hooks_dict_ref() or ())


def watch(driven: OptimizerLike) -> None:
    """Note the first step of the optimizer."""
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
    """Warn when the optimizer was watched and has not stepped; it is not watched any more."""
    optimizer = optimizer_of(driven)
    # A wrapper that accumulates, or whose scaler skipped the step, has done its part without one.
    excused = optimizer in DRIVEN if driven is optimizer else getattr(driven, "inner_count", 0)
    if unwatch(driven) and not getattr(optimizer, "_opt_called", False) and not excused:
        warn_caller(
            "scheduler.step() was called before optimizer.step(), so the first value of the schedule is skipped; "
            "call the optimizer's first"
        )
