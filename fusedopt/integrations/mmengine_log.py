"""Which path a training takes, said once in MMEngine's log. Imports MMEngine when there is something to say."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..optimizers import FusedOptimizer
from ..training.wrappers import AmpOptimWrapper, OptimWrapper
from ..training.wrappers.base import DRIVEN

__all__ = ["announce_path", "announce_stock_path", "gradient_passes"]

_watching = False
#: Steps under wrappers of ours that the watch for a stock one lasts at most. A fused step is slower while it does.
_MOST_WATCHED = 100


def _log(text: str) -> None:
    from mmengine.logging import print_log

    print_log(f"fusedopt: {text}", logger="current")


def gradient_passes(wrapper: OptimWrapper) -> tuple[int, int]:
    """Passes over the gradients before the update: the stock ones for this wrapper's settings, and those made here."""
    scales = isinstance(wrapper, AmpOptimWrapper) and wrapper.loss_scaler.is_enabled()
    clip = wrapper.clip_grad or {}
    by_norm = clip.get("type") == "norm"
    stock = int(scales) + (2 if by_norm else int(bool(clip)))
    return stock, (int(scales or by_norm) if isinstance(wrapper.optimizer, FusedOptimizer) else stock)


def announce_path(wrapper: OptimWrapper) -> None:
    """Log the path of a wrapper of ours."""
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
    """At the first step of a fused optimizer that no wrapper of ours drives, log that only its update is fused.

    A stock wrapper tells nobody what it drives; but torch calls a hook before each step. It acts once. After 100 steps
    of optimizers that wrappers of ours drive it watches no more.
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
                    f"{type(optimizer).__name__} (backend {optimizer.backend_in_use}) is driven by no wrapper of "
                    "fusedopt: only the update is fused, 0 passes over the gradients are saved. "
                    "type='FusedOptimWrapper' or 'FusedAmpOptimWrapper' makes unscaling and clipping part of the step"
                )
        hooks = handle.hooks_dict_ref()
        if not left and hooks is not None and next(reversed(hooks)) == handle.id:
            # torch is walking over this dict: only its last entry can go without the walk failing.
            handle.remove()

    handle = register_optimizer_step_pre_hook(hook)
