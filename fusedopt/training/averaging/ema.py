"""ExponentialMovingAverage."""

from __future__ import annotations

import torch
from torch import nn

from ...messages import check_number, warn_caller
from .base import BaseAveragedModel

__all__ = ["ExponentialMovingAverage"]


class ExponentialMovingAverage(BaseAveragedModel):
    """The exponential moving average (EMA) of the model.

    As ``mmengine.model.ExponentialMovingAverage``::

        average <- (1 - momentum) * average + momentum * value

    Args:
        momentum: weight of the new value, 1 - decay, in (0, 1). It may be changed later.
        model, interval, device, update_buffers, dtype: see :class:`BaseAveragedModel`.

    Raises:
        ValueError: ``momentum`` is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        dtype: torch.dtype | str | None = None,
    ):
        momentum = check_number("momentum", momentum, 0, 1, exclusive=True)
        if momentum > 0.5:
            warn_caller(
                f"momentum of an average is the weight of the new value, and {momentum} is a large one; for a decay of "
                f"{momentum} it is {1 - momentum:.6g}"
            )
        super().__init__(model, interval, device, update_buffers, dtype)
        self.momentum = momentum

    def update_weight(self, steps: int) -> float:
        return self.momentum

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, {super().extra_repr()}"
