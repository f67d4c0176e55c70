"""EarlyStoppingHook: ends a run whose metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....messages import as_float, check_number, check_whole_number, did_you_mean
from ...registry import HOOKS
from .hook import Hook
from .rules import RULES, rule_of

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["EarlyStoppingHook"]


@HOOKS.register_module()
class EarlyStoppingHook(Hook):
    """Ends a run when a metric has not improved for some validations, as ``mmengine.hooks.EarlyStoppingHook``.

    Its state is in the message hub, so a resumed run goes on counting.

    Args:
        monitor: name of the metric.
        rule: whether ``'greater'`` or ``'less'`` is better; by default the name of the metric decides.
        min_delta: the least change that is an improvement, >= 0.
        strict: raise an error, instead of a warning in the log, if a validation does not give the metric.
        check_finite: also end the run when the metric is infinite or NaN.
        patience: number of validations without improvement after which the run ends.
        stopping_threshold: end the run when the metric is better than this.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the rule cannot be inferred.
    """

    priority = "LOWEST"

    def __init__(
        self,
        monitor: str,
        rule: str | None = None,
        min_delta: float = 0.1,
        strict: bool = False,
        check_finite: bool = True,
        patience: int = 5,
        stopping_threshold: float | None = None,
    ):
        if rule is not None and rule not in RULES:
            raise ValueError(f"Invalid rule: {rule!r}; {did_you_mean(str(rule), RULES)}")
        check_number("min_delta", min_delta)
        self.monitor = monitor
        self.rule = rule or rule_of("monitor", monitor)
        self.min_delta = min_delta
        self.strict = strict
        self.check_finite = check_finite
        self.patience = check_whole_number("patience", patience, 1)
        self.stopping_threshold = stopping_threshold
        self._trains = False

    def before_train(self, runner: Runner) -> None:
        """From here on, validations are part of the run."""
        self._trains = True

    def after_train(self, runner: Runner) -> None:
        """A later validation is not."""
        self._trains = False

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """End the run if the metric says so."""
        if runner.train_loop is None or not self._trains:
            return
        metrics = metrics or {}
        if self.monitor not in metrics:
            message = f"monitor={self.monitor!r} is not among the metrics; {did_you_mean(self.monitor, metrics)}"
            if self.strict:
                raise KeyError(message)
            runner.warn_once(message)
            return
        score = as_float(metrics[self.monitor])
        if score is None:
            raise TypeError(f"monitor={self.monitor!r} is a {type(metrics[self.monitor]).__name__}, not a number")
        reason = self._reason_to_stop(runner, score)
        if reason is not None:
            runner.train_loop.stop_training = True
            runner.logger.info(f"The run ends early: {self.monitor} is {score:.4g}, {reason}")

    def _reason_to_stop(self, runner: Runner, score: float) -> str | None:
        sign = 1 if self.rule == "greater" else -1
        key = self._key(runner)
        info = runner.message_hub.get_info(key, {})
        best, waited = info.get("best", -sign * math.inf), info.get("waited", 0)
        if self.check_finite and not math.isfinite(score):
            return "which is not finite"
        if self.stopping_threshold is not None and sign * score > sign * self.stopping_threshold:
            return f"better than stopping_threshold={self.stopping_threshold}"
        if sign * score < sign * best + self.min_delta:
            waited += 1
        else:
            best, waited = score, 0
        runner.message_hub.update_info(key, {"best": best, "waited": waited})
        if waited >= self.patience:
            return f"and did not improve on {best:.4g} in {waited} validations"
        return None

    def _key(self, runner: Runner) -> str:
        """Where this hook's state is: each of several hooks has its own."""
        alike = [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook) and hook.monitor == self.monitor]
        return f"early_stopping_{self.monitor}" + (f"_{alike.index(self)}" if alike.index(self) else "")
