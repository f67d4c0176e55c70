"""Logs once, in MMEngine's log, which path a run takes. Imports MMEngine only when it logs."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..optimizers import FusedOptimizer
from ..training.wrappers import AmpOptimWrapper, OptimWrapper
from ..training.wrappers.base import DRIVEN

__all__ = ["announce_path", "announce_stock_path", "gradient_passes"]

_watching = False
#: The watch for a stock wrapper ends after this many steps under ours. Until then fused steps are slower.
_MOST_WATCHED = 100


def _log(text: str) -> None:
    from mmengine.logging import print_log

    print_log(f"fusedopt: {text}", logger="current")


def gradient_passes(wrapper: OptimWrapper) -> tuple[int, int]:
    """Passes over the gradients before the update: (of stock wrappers with these settings, of this wrapper)."""
    scales = isinstance(wrapper, AmpOptimWrapper) and wrapper.loss_scaler.is_enabled()
    clip = wrapper.clip_grad or {}
    by_norm = clip.get("type") == "norm"
    stock = int(scales) + (2 if by_norm else int(bool(clip)))
    return stock, (int(scales or by_norm) if isinstance(wrapper.optimizer, FusedOptimizer) else stock)


def announce_path(wrapper: OptimWrapper) -> None:
    """Log the path that one of our wrappers takes."""
    stock, made = gradient_passes(wrapper)
    optimizer = wrapper.optimizer
    who = f"{type(wrapper).__name__} drives {type(optimizer).__name__}"
    if isinstance(optimizer, FusedOptimizer):
        _log(
            f"{who} (backend {optimizer.backend_in_use}): unscaling and clipping are part of the fused step; it makes "
            f"{made} of the {stock} stock passes over the gradients before the update, {stock - made} saved"
        )
    else:
        _log(f"{who} in the stock way; 0 of {stock} passes over the gradients are saved")


def announce_stock_path() -> None:
    """At the first step of a fused optimizer that none of our wrappers drives, log that only its update is fused.

    A stock wrapper does not announce its optimizer, but torch calls a hook before each step. The hook logs once, and
    removes itself then or after 100 steps of optimizers that our wrappers drive.
    """
    global _watching
    if _watching:
        return
    _watching = True
    left = _MOST_WATCHED

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        global _watching
        nonlocal left
        if left and isinstance(optimizer, FusedOptimizer):
            stock = optimizer not in DRIVEN
            left = 0 if stock else left - 1
            _watching = left > 0
            if stock:
                _log(
                    f"{type(optimizer).__name__} (backend {optimizer.backend_in_use}) is not driven by a fusedopt "
                    "wrapper: only the update is fused, 0 passes over the gradients are saved. "
                    "type='FusedOptimWrapper' or 'FusedAmpOptimWrapper' makes unscaling and clipping part of the step"
                )
        hooks = handle.hooks_dict_ref()
        if not left and hooks is not None and next(reversed(hooks)) == handle.id:
            # torch is iterating over this dict: only its last entry can be removed without an error.
            handle.remove()

    handle = register_optimizer_step_pre_hook(hook)
