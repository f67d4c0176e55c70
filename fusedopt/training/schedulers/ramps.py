"""Schedulers that go from one value to another along a line or a polynomial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...messages import check_number
from ..registry import PARAM_SCHEDULERS
from .base import LRSchedulerMixin, MomentumSchedulerMixin, _ParamScheduler
from .watching import OptimizerLike

__all__ = ["LinearLR", "LinearMomentum", "LinearParamScheduler", "PolyLR", "PolyMomentum", "PolyParamScheduler"]


@PARAM_SCHEDULERS.register_module()
class LinearParamScheduler(_ParamScheduler):
    """Multiplies by a factor that goes linearly from ``start_factor`` to ``end_factor`` at step ``end - begin - 1``.

    As ``torch.optim.lr_scheduler.LinearLR`` with ``total_iters = end - begin - 1``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        start_factor: first factor, > 0 and <= 1.
        end_factor: last factor, from 0 to 1.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        *args: Any,
        **kwargs: Any,
    ):
        start_factor = check_number("start_factor", start_factor, exclusive=True)
        end_factor = check_number("end_factor", end_factor)
        for name, factor in (("start_factor", start_factor), ("end_factor", end_factor)):
            if factor > 1:
                raise ValueError(f"Invalid {name}: {factor}; expected a number up to 1")
        self.start_factor = start_factor
        self.end_factor = end_factor
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _prepare(self) -> None:
        self.total_iters = self.end - self.begin - 1

    def _factor(self) -> float:
        if self.last_step == 0:
            return self.start_factor
        rise = self.end_factor - self.start_factor
        return 1 + rise / (self.total_iters * self.start_factor + (self.last_step - 1) * rise)


@PARAM_SCHEDULERS.register_module()
class LinearLR(LRSchedulerMixin, LinearParamScheduler):
    """:class:`LinearParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        start_factor: first factor, > 0 and <= 1.
        end_factor: last factor, from 0 to 1.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class LinearMomentum(MomentumSchedulerMixin, LinearParamScheduler):
    """:class:`LinearParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        start_factor: first factor, > 0 and <= 1.
        end_factor: last factor, from 0 to 1.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class PolyParamScheduler(_ParamScheduler):
    """Falls to ``eta_min`` at step T = ``end - begin - 1`` as (1 - t / T)^power.

    As ``torch.optim.lr_scheduler.PolynomialLR``, which has no ``eta_min``, with ``total_iters = T``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        eta_min: the last value.
        power: power of the polynomial, >= 0; 1 is a line.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        eta_min: float = 0,
        power: float = 1.0,
        *args: Any,
        **kwargs: Any,
    ):
        self.eta_min = check_number("eta_min", eta_min)
        self.power = check_number("power", power)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _prepare(self) -> None:
        self.total_iters = self.end - self.begin - 1

    def _factor(self) -> float | None:
        if self.last_step == 0:
            return None
        share = 1 - 1 / (self.total_iters - self.last_step + 1)
        return share**self.power

    def _move(self, base: Any) -> Callable[[Any, float], Any]:
        eta_min = self.eta_min
        return lambda value, factor: (value - eta_min) * factor + eta_min


@PARAM_SCHEDULERS.register_module()
class PolyLR(LRSchedulerMixin, PolyParamScheduler):
    """:class:`PolyParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        eta_min: the last value.
        power: power of the polynomial, >= 0; 1 is a line.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class PolyMomentum(MomentumSchedulerMixin, PolyParamScheduler):
    """:class:`PolyParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        eta_min: the last value.
        power: power of the polynomial, >= 0; 1 is a line.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """
