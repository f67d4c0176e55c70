"""StochasticWeightAverage."""

from __future__ import annotations

from .base import BaseAveragedModel

__all__ = ["StochasticWeightAverage"]


class StochasticWeightAverage(BaseAveragedModel):
    """The mean of the model at all updates (stochastic weight averaging, SWA).

    As ``mmengine.model.StochasticWeightAverage`` and the default of ``torch.optim.swa_utils.AveragedModel``::

        average <- average + (value - average) / (number of updates before + 1)

    Args:
        model, interval, device, update_buffers, dtype: see :class:`BaseAveragedModel`.

    Formula: Izmailov et al., 2018, https://arxiv.org/abs/1803.05407.
    """

    def update_weight(self, steps: int) -> float:
        return 1 / (steps // self.interval + 1)
