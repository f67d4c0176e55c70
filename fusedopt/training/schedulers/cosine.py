"""Schedulers along a cosine (SGDR, Loshchilov and Hutter, 2017)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...messages import check_number, plain_settings
from ..registry import PARAM_SCHEDULERS
from .base import INF, LRSchedulerMixin, MomentumSchedulerMixin, _ParamScheduler
from .lengths import check_steps, warn_of_fraction
from .watching import OptimizerLike

__all__ = [
    "CosineAnnealingLR",
    "CosineAnnealingMomentum",
    "CosineAnnealingParamScheduler",
    "CosineAnnealingWeightDecay",
    "CosineRestartLR",
    "CosineRestartMomentum",
    "CosineRestartParamScheduler",
]


class _Cosine(_ParamScheduler):
    """Base of both: the minimum, and the recursive rule.

    Args:
        eta_min: value at the end, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the end divided by the value before any schedule.
    """

    def _set_minimum(self, eta_min: float | None, eta_min_ratio: float | None) -> None:
        if eta_min is not None and eta_min_ratio is not None:
            raise ValueError(f"eta_min={eta_min} and eta_min_ratio={eta_min_ratio} are both given; expected one")
        if eta_min is None and eta_min_ratio is None:
            eta_min = 0.0
        self.eta_min = None if eta_min is None else check_number("eta_min", eta_min)
        self.eta_min_ratio = None if eta_min_ratio is None else check_number("eta_min_ratio", eta_min_ratio)

    def _minimum(self, base: Any) -> Any:
        return self.eta_min if self.eta_min_ratio is None else base * self.eta_min_ratio

    def _along(self, step: float, period: float) -> float:
        """The factor at ``step`` of a half wave of ``period`` steps, from the value at ``step - 1``."""
        return (1 + math.cos(math.pi * step / period)) / (1 + math.cos(math.pi * (step - 1) / period))

    def _move(self, base: Any) -> Callable[[Any, float], Any]:
        minimum = self._minimum(base)
        return lambda value, ratio: ratio * (value - minimum) + minimum


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingParamScheduler(_Cosine):
    """eta_min + (base - eta_min) (1 + cos(pi t / T_max)) / 2, as ``torch.optim.lr_scheduler.CosineAnnealingLR``.

    After ``T_max`` steps it rises again.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        T_max: number of steps down to the minimum, not necessarily whole; ``end - begin`` by default.
        eta_min: value at the end, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the end divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.

    Raises:
        ValueError: neither ``T_max`` nor ``end`` is given; both ``eta_min`` and ``eta_min_ratio`` are.
    """

    _in_steps = ("T_max",)
    _may_be_fractions = ("T_max",)

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        T_max: float | None = None,  # noqa: N803
        eta_min: float | None = None,
        *args: Any,
        eta_min_ratio: float | None = None,
        **kwargs: Any,
    ):
        self.T_max = None if T_max is None else check_number("T_max", T_max, 1)
        self._set_minimum(eta_min, eta_min_ratio)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _prepare(self) -> None:
        if self.T_max is None:
            if self.end == INF:
                raise ValueError(f"{type(self).__name__} must know where its cosine ends; expected T_max or end")
            self.T_max = self.end - self.begin

    def _factor(self) -> float | None:
        step, period = self.last_step, self.T_max
        assert period is not None
        if step == 0 or (step - 1 - period) % (2 * period) == 0:  # from the minimum the ratio is 0 / 0
            return None
        return self._along(step, period)

    def _next(self, value: Any, base: Any) -> Any:
        factor = self._factor()
        if factor is not None:
            return self._move(base)(value, factor)
        if self.last_step == 0:
            return value
        assert self.T_max is not None
        return value + (base - self._minimum(base)) * (1 - math.cos(math.pi / self.T_max)) / 2


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingLR(LRSchedulerMixin, CosineAnnealingParamScheduler):
    """:class:`CosineAnnealingParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        T_max: number of steps down to the minimum, not necessarily whole; ``end - begin`` by default.
        eta_min: value at the end, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the end divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingMomentum(MomentumSchedulerMixin, CosineAnnealingParamScheduler):
    """:class:`CosineAnnealingParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        T_max: number of steps down to the minimum, not necessarily whole; ``end - begin`` by default.
        eta_min: value at the end, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the end divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingWeightDecay(CosineAnnealingParamScheduler):
    """:class:`CosineAnnealingParamScheduler` of the weight decay, as in MMPretrain: a value of 0 stays 0.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        T_max: number of steps down to the minimum, not necessarily whole; ``end - begin`` by default.
        eta_min: value at the end, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the end divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    def __init__(self, optimizer: OptimizerLike, *args: Any, **kwargs: Any):
        super().__init__(optimizer, "weight_decay", *args, **kwargs)

    def _move(self, base: Any) -> Callable[[Any, float], Any]:
        return (lambda value, _: value) if _is_zero(base) else super()._move(base)

    def _next(self, value: Any, base: Any) -> Any:
        if _is_zero(base):
            return value
        new = super()._next(value, base)
        return torch.where(base == 0, value, new) if isinstance(base, Tensor) else new


def _is_zero(base: Any) -> bool:
    return not isinstance(base, Tensor) and base == 0


@PARAM_SCHEDULERS.register_module()
class CosineRestartParamScheduler(_Cosine):
    """A sequence of cosines, each from ``base * restart_weight`` down to the minimum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        periods: number of steps of each cosine. After the last one, the value stays.
        restart_weights: a weight for each period.
        eta_min: value at the ends, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the ends divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.

    Raises:
        ValueError: ``periods`` and ``restart_weights`` differ in length.
    """

    _in_steps = ("periods",)
    _may_be_fractions = ("periods",)

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        periods: Sequence[int],
        restart_weights: Sequence[float] = (1,),
        eta_min: float | None = None,
        eta_min_ratio: float | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        for name, value in (("periods", periods), ("restart_weights", restart_weights)):
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"Invalid {name}: {value!r}; expected a list")
        if len(periods) != len(restart_weights):
            raise ValueError(
                f"periods has {len(periods)} entries and restart_weights {len(restart_weights)}; expected equal lengths"
            )
        self.periods = [check_steps(f"periods[{index}]", each, 1) for index, each in enumerate(periods)]
        for index, weight in enumerate(restart_weights):
            check_number(f"restart_weights[{index}]", weight)
        self.restart_weights = plain_settings(restart_weights)
        self.cumulative_periods = list(itertools.accumulate(self.periods))
        for restart in self.cumulative_periods[:-1]:
            warn_of_fraction("a restart of periods", restart)
        self._set_minimum(eta_min, eta_min_ratio)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _place(self) -> tuple[int, float] | None:
        """The number of the period, and the step within it; None after the last."""
        ends = self.cumulative_periods
        index = next((index for index, end in enumerate(ends) if self.last_step < end), None)
        return None if index is None else (index, self.last_step - (ends[index - 1] if index else 0))

    def _factor(self) -> float | None:
        place = self._place()
        if place is None or place[1] == 0:
            return None
        return self._along(place[1], self.periods[place[0]])

    def _next(self, value: Any, base: Any) -> Any:
        place = self._place()
        if place is not None and place[1] == 0:
            return base * self.restart_weights[place[0]]
        return super()._next(value, base)


@PARAM_SCHEDULERS.register_module()
class CosineRestartLR(LRSchedulerMixin, CosineRestartParamScheduler):
    """:class:`CosineRestartParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        periods: number of steps of each cosine. After the last one, the value stays.
        restart_weights: a weight for each period.
        eta_min: value at the ends, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the ends divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class CosineRestartMomentum(MomentumSchedulerMixin, CosineRestartParamScheduler):
    """:class:`CosineRestartParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        periods: number of steps of each cosine. After the last one, the value stays.
        restart_weights: a weight for each period.
        eta_min: value at the ends, 0 unless ``eta_min_ratio`` is given.
        eta_min_ratio: value at the ends divided by the value before any schedule, instead of ``eta_min``.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """
