"""Schedulers that multiply by a factor at certain steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...messages import check_number
from ..registry import PARAM_SCHEDULERS
from .base import INF, LRSchedulerMixin, MomentumSchedulerMixin, _ParamScheduler
from .lengths import check_steps, warn_of_fraction
from .watching import OptimizerLike

__all__ = [
    "ConstantLR",
    "ConstantMomentum",
    "ConstantParamScheduler",
    "ExponentialLR",
    "ExponentialMomentum",
    "ExponentialParamScheduler",
    "MultiStepLR",
    "MultiStepMomentum",
    "MultiStepParamScheduler",
    "StepLR",
    "StepMomentum",
    "StepParamScheduler",
]


@PARAM_SCHEDULERS.register_module()
class StepParamScheduler(_ParamScheduler):
    """Multiplies by ``gamma`` every ``step_size`` steps, as ``torch.optim.lr_scheduler.StepLR``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        step_size: period in steps.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _in_steps = ("step_size",)
    _may_be_fractions = ("step_size",)

    def __init__(
        self, optimizer: OptimizerLike, param_name: str, step_size: int, gamma: float = 0.1, *args: Any, **kwargs: Any
    ):
        self.step_size = check_steps("step_size", step_size, 1)
        self.gamma = check_number("gamma", gamma)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _factor(self) -> float:
        return self.gamma if self.last_step and self.last_step % self.step_size == 0 else 1.0


@PARAM_SCHEDULERS.register_module()
class StepLR(LRSchedulerMixin, StepParamScheduler):
    """:class:`StepParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        step_size: period in steps.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class StepMomentum(MomentumSchedulerMixin, StepParamScheduler):
    """:class:`StepParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        step_size: period in steps.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class MultiStepParamScheduler(_ParamScheduler):
    """Multiplies by ``gamma`` at each milestone, as ``torch.optim.lr_scheduler.MultiStepLR``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        milestones: steps counted from ``begin``; one that is listed twice counts twice.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _in_steps = ("milestones",)
    _may_be_fractions = ("milestones",)

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        milestones: Sequence[int],
        gamma: float = 0.1,
        *args: Any,
        **kwargs: Any,
    ):
        if isinstance(milestones, str) or not isinstance(milestones, Sequence):
            raise TypeError(f"Invalid milestones: {milestones!r}; expected a list of steps")
        steps = [check_steps(f"milestones[{index}]", step, 0) for index, step in enumerate(milestones)]
        for step in steps:
            warn_of_fraction("a milestone", step)
        self.milestones = Counter(steps)
        self.gamma = check_number("gamma", gamma)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _factor(self) -> float:
        times = self.milestones[self.last_step]
        return self.gamma**times if times else 1.0


@PARAM_SCHEDULERS.register_module()
class MultiStepLR(LRSchedulerMixin, MultiStepParamScheduler):
    """:class:`MultiStepParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        milestones: steps counted from ``begin``; one that is listed twice counts twice.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class MultiStepMomentum(MomentumSchedulerMixin, MultiStepParamScheduler):
    """:class:`MultiStepParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        milestones: steps counted from ``begin``; one that is listed twice counts twice.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class ExponentialParamScheduler(_ParamScheduler):
    """Multiplies by ``gamma`` at each step, as ``torch.optim.lr_scheduler.ExponentialLR``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    def __init__(self, optimizer: OptimizerLike, param_name: str, gamma: float, *args: Any, **kwargs: Any):
        self.gamma = check_number("gamma", gamma)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _factor(self) -> float:
        return self.gamma if self.last_step else 1.0


@PARAM_SCHEDULERS.register_module()
class ExponentialLR(LRSchedulerMixin, ExponentialParamScheduler):
    """:class:`ExponentialParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class ExponentialMomentum(MomentumSchedulerMixin, ExponentialParamScheduler):
    """:class:`ExponentialParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        gamma: factor, >= 0.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class ConstantParamScheduler(_ParamScheduler):
    """Multiplies by ``factor`` at its first step and divides by it at its last, ``end - begin - 1``.

    As ``torch.optim.lr_scheduler.ConstantLR`` with ``total_iters = end - begin - 1``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        factor: factor from 0 to 1; above 0 if ``end`` is given, because the last step divides by it.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    def __init__(self, optimizer: OptimizerLike, param_name: str, factor: float = 1.0 / 3, *args: Any, **kwargs: Any):
        factor = check_number("factor", factor)
        if factor > 1:
            raise ValueError(f"Invalid factor: {factor}; expected a number from 0 to 1")
        self.factor = factor
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _prepare(self) -> None:
        self.total_iters = self.end - self.begin - 1
        if self.factor == 0 and self.end != INF and self.total_iters:
            raise ValueError(f"Invalid factor: 0 with end={self.end}; the last step divides by it")

    def _factor(self) -> float:
        if self.last_step == 0:
            return self.factor
        return 1.0 / self.factor if self.last_step == self.total_iters else 1.0


@PARAM_SCHEDULERS.register_module()
class ConstantLR(LRSchedulerMixin, ConstantParamScheduler):
    """:class:`ConstantParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        factor: factor from 0 to 1; above 0 if ``end`` is given, because the last step divides by it.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """


@PARAM_SCHEDULERS.register_module()
class ConstantMomentum(MomentumSchedulerMixin, ConstantParamScheduler):
    """:class:`ConstantParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        factor: factor from 0 to 1; above 0 if ``end`` is given, because the last step divides by it.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """
