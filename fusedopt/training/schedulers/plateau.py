"""Schedulers that monitor a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler

from ...messages import as_float, check_number, check_whole_number, did_you_mean
from ..registry import PARAM_SCHEDULERS
from .base import LRSchedulerMixin, MomentumSchedulerMixin, _copied
from .from_torch import TorchParamScheduler
from .watching import OptimizerLike

__all__ = [
    "ReduceLROnPlateau",
    "ReduceOnPlateauLR",
    "ReduceOnPlateauMomentum",
    "ReduceOnPlateauParamScheduler",
]

_MODES = {"less": "min", "greater": "max"}

#: What MMEngine's state has and this class's has not, with torch's names.
_MMENGINE = {
    **{name: name for name in ("factor", "patience", "cooldown", "cooldown_counter", "num_bad_epochs", "eps")},
    **{"threshold": "threshold", "threshold_rule": "threshold_mode", "min_values": "min_lrs", "best": "best"},
}
#: MMEngine's best value before the first.
_MMENGINE_WORST = 1e9


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauParamScheduler(TorchParamScheduler):
    """Multiplies by ``factor`` when a metric has not improved for more than ``patience`` steps.

    It uses ``torch.optim.lr_scheduler.ReduceLROnPlateau``. Call ``step(metrics)`` after each validation, and
    ``step()``, which counts for ``begin`` and ``end``, after each training epoch.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'`` or ``'weight_decay'``.
        monitor: name of the metric.
        rule: ``'less'`` if less is better, or ``'greater'``.
        factor: factor, >= 0 and < 1.
        patience: number of steps without improvement that are tolerated.
        threshold: minimum improvement of the metric, >= 0.
        threshold_rule: ``'rel'``, relative to the best value so far, or ``'abs'``.
        cooldown: number of steps after a reduction that are ignored.
        min_value: lower bound of the value, or a list with one for each parameter group.
        eps: reductions by this or less are not made.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`; ``by_epoch`` must be True.

    Raises:
        ValueError: ``by_epoch`` or ``convert_to_iter_based`` asks for iterations.
    """

    _scheduler = lr_scheduler.ReduceLROnPlateau
    _per_group = ("min_lr",)

    #: Tells the code that steps schedulers to pass the metrics to this one.
    need_val_args = True

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        monitor: str = "loss",
        rule: str = "less",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_rule: str = "rel",
        cooldown: int = 0,
        min_value: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ):
        if kwargs.get("by_epoch", True) is False:
            raise ValueError(
                f"Invalid by_epoch: False; {type(self).__name__} monitors metrics, which come once per epoch"
            )
        for name, value, choices in (
            ("rule", rule, ("less", "greater")),
            ("threshold_rule", threshold_rule, ("rel", "abs")),
        ):
            if value not in choices:
                raise ValueError(f"Invalid {name}: {value!r}; expected {choices[0]!r} or {choices[1]!r}")
        factor = check_number("factor", factor, below=1)
        threshold = check_number("threshold", threshold)
        eps = check_number("eps", eps)
        self.monitor = monitor
        super().__init__(
            optimizer,
            _MODES[rule],
            factor,
            check_whole_number("patience", patience, 0),
            threshold,
            threshold_rule,
            check_whole_number("cooldown", cooldown, 0),
            min_value,
            eps,
            param_name=param_name,
            **kwargs,
        )

    def _from_mmengine(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """MMEngine's class has no scheduler of torch inside."""
        if not set(_MMENGINE) <= set(state_dict):
            return state_dict
        own = self.state_dict()
        best = state_dict["best"]
        torchs = {
            **own["torch_state"],
            **{torchs: state_dict[name] for name, torchs in _MMENGINE.items()},
            "best": math.copysign(math.inf, best) if abs(best) >= _MMENGINE_WORST else best,
            "mode": _MODES[state_dict["rule"]],
            "mode_worse": math.inf if state_dict["rule"] == "less" else -math.inf,
            "last_epoch": state_dict["last_step"] + 1,
            "_last_lr": state_dict["_last_value"],
        }
        return {**own, **{key: state_dict[key] for key in own if key in state_dict}, "torch_state": torchs}

    @property
    def patience(self) -> int:
        """Number of steps without improvement that are tolerated."""
        return self._torch.patience

    def _first_step(self) -> None:
        self._global_step = 0 if self.last_step == -1 else self._global_step + 1
        self._torch = self._make(self._live)
        self._note_values()

    def step(self, metrics: Mapping[str, Any] | float | Tensor | None = None) -> None:
        """Process the metrics of a validation, or count an epoch.

        Args:
            metrics: all metrics by name, or the monitored one; None counts an epoch.

        Raises:
            KeyError: the monitored metric is not among them.
            TypeError: neither a dict nor a number.
        """
        if metrics is None:
            self._global_step += 1
            return
        metric = self._monitored(metrics)
        if self.begin <= self._global_step < self.end:
            self.last_step += 1
            self._make_values_plain()
            self._look_at(metric)
            self._make_values_plain()
            self._follow()
        self._note_values()

    def _look_at(self, metric: float) -> None:
        """torch's step on copies, since it reduces the groups in turn, but they may share a tensor."""
        key = self.param_name
        copies = [{"lr": _copied(group[key])} for group in self.optimizer.param_groups]
        self._torch.optimizer.groups = lambda: copies
        try:
            self._torch.step(metric)
        finally:
            self._torch.optimizer.groups = self._live
        self._write([copy["lr"] for copy in copies])

    def _monitored(self, metrics: Any) -> float:
        metric = metrics
        if isinstance(metrics, Mapping):
            if self.monitor not in metrics:
                hint = did_you_mean(self.monitor, map(str, metrics)) if metrics else "there are none"
                raise KeyError(f"metrics has no {self.monitor!r}, which {type(self).__name__} monitors; {hint}")
            metric = metrics[self.monitor]
        number = None if isinstance(metric, bool) else as_float(metric)
        if number is None:
            raise TypeError(f"{type(self).__name__} takes metrics as a dict or a number, got {metric!r}")
        return number

    @classmethod
    def build_iter_from_epoch(cls, optimizer: OptimizerLike, *, epoch_length: int, **kwargs: Any) -> Any:
        """Not supported: metrics come once per epoch."""
        raise ValueError(
            f"{cls.__name__} cannot be built with convert_to_iter_based=True: its metrics come once per epoch"
        )


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauLR(LRSchedulerMixin, ReduceOnPlateauParamScheduler):
    """:class:`ReduceOnPlateauParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        monitor: name of the metric.
        rule: ``'less'`` if less is better, or ``'greater'``.
        factor: factor, >= 0 and < 1.
        patience: number of steps without improvement that are tolerated.
        threshold: minimum improvement of the metric, >= 0.
        threshold_rule: ``'rel'``, relative to the best value so far, or ``'abs'``.
        cooldown: number of steps after a reduction that are ignored.
        min_value: lower bound of the value, or a list with one for each parameter group.
        eps: reductions by this or less are not made.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`; ``by_epoch`` must be True.
    """


@PARAM_SCHEDULERS.register_module()
class ReduceOnPlateauMomentum(MomentumSchedulerMixin, ReduceOnPlateauParamScheduler):
    """:class:`ReduceOnPlateauParamScheduler` of the momentum.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        monitor: name of the metric.
        rule: ``'less'`` if less is better, or ``'greater'``.
        factor: factor, >= 0 and < 1.
        patience: number of steps without improvement that are tolerated.
        threshold: minimum improvement of the metric, >= 0.
        threshold_rule: ``'rel'``, relative to the best value so far, or ``'abs'``.
        cooldown: number of steps after a reduction that are ignored.
        min_value: lower bound of the value, or a list with one for each parameter group.
        eps: reductions by this or less are not made.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`; ``by_epoch`` must be True.
    """


@PARAM_SCHEDULERS.register_module()
class ReduceLROnPlateau(ReduceOnPlateauLR):
    """:class:`ReduceOnPlateauLR` with the names of ``torch.optim.lr_scheduler.ReduceLROnPlateau``'s arguments.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        mode: ``'min'`` or ``'max'``, for ``rule='less'`` and ``rule='greater'``.
        threshold_mode: ``threshold_rule``.
        min_lr: ``min_value``.
        factor, patience, threshold, cooldown, eps, kwargs: see :class:`ReduceOnPlateauParamScheduler`; ``kwargs`` may
            include ``monitor``.
    """

    def __init__(
        self,
        optimizer: OptimizerLike,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ):
        rules = {torchs: ours for ours, torchs in _MODES.items()}
        if mode not in rules:
            raise ValueError(f"Invalid mode: {mode!r}; expected 'min' or 'max'")
        super().__init__(
            optimizer,
            rule=rules[mode],
            factor=factor,
            patience=patience,
            threshold=threshold,
            threshold_rule=threshold_mode,
            cooldown=cooldown,
            min_value=min_lr,
            eps=eps,
            **kwargs,
        )
