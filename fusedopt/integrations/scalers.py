"""The loss scaler that a trainer has made for itself."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..amp import GradScaler

__all__ = ["give_scaler_back", "take_scaler"]

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
