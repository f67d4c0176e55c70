"""The loss scaler that a trainer has made for itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..amp import GradScaler
from ..optimizers import FusedOptimizer

__all__ = ["give_scaler_back", "is_unscaled", "scale_of_gradients", "take_scaler"]

#: The scalers that were taken, and the class that each had.
_taken: weakref.WeakKeyDictionary[Any, type] = weakref.WeakKeyDictionary()

_STOCK = torch.amp.GradScaler, torch.cuda.amp.GradScaler


def take_scaler(scaler: Any) -> None:
    """Make a stock scaler :class:`fusedopt.amp.GradScaler`, which unscales in a fused step.

    It stays the same object with the same state, for whoever has it. Another scaler, or None, is left alone.
    """
    if type(scaler) in _STOCK:
        _taken[scaler] = type(scaler)
        scaler.__class__ = GradScaler


def give_scaler_back(scaler: Any) -> None:
    """Undo :func:`take_scaler`; a scaler that was not taken is left alone."""
    if scaler is not None and (kind := _taken.pop(scaler, None)) is not None:
        scaler.__class__ = kind


def is_unscaled(scaler: Any, optimizer: FusedOptimizer) -> bool:
    """Whether a scaler has unscaled the gradients since its last update."""
    record = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer))
    return record is not None and record["stage"] is not OptState.READY


def scale_of_gradients(scaler: Any, optimizer: FusedOptimizer) -> Tensor | None:
    """What the gradients are still multiplied with, 0-dim; None without a scaler, or after it has unscaled them."""
    if scaler is None or not scaler.is_enabled() or is_unscaled(scaler, optimizer):
        return None
    return scaler._get_scale_async()
