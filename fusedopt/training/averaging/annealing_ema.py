"""MomentumAnnealingEMA."""

from __future__ import annotations

import torch
from torch import nn

from ...messages import check_number
from .ema import ExponentialMovingAverage

__all__ = ["MomentumAnnealingEMA"]


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """An exponential moving average that follows the model closely at first.

    As ``mmengine.model.MomentumAnnealingEMA``: the weight of the new value is
    ``max(momentum, gamma / (gamma + steps))``.

    Args:
        momentum: the smallest weight, in (0, 1).
        gamma: how slowly the weight falls: after ``gamma`` calls it is 1/2; > 0.
        model, interval, device, update_buffers, dtype: see :class:`BaseAveragedModel`.

    Raises:
        ValueError: ``momentum`` or ``gamma`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: int = 100,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        dtype: torch.dtype | str | None = None,
    ):
        gamma = check_number("gamma", gamma, 0, exclusive=True)
        super().__init__(model, momentum, interval, device, update_buffers, dtype)
        self.gamma = gamma

    def update_weight(self, steps: int) -> float:
        return max(self.momentum, self.gamma / (self.gamma + steps))

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"
