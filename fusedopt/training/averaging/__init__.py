"""Averages of a model's weights over a run, with one multi-tensor call per update; also torch's own."""

from torch.optim.swa_utils import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

from .annealing_ema import MomentumAnnealingEMA
from .base import BaseAveragedModel
from .ema import ExponentialMovingAverage
from .swa import StochasticWeightAverage

__all__ = [
    "SWALR",
    "AveragedModel",
    "BaseAveragedModel",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "StochasticWeightAverage",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
