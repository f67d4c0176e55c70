"""ParamSchedulerHook: steps the parameter schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["ParamSchedulerHook"]


@HOOKS.register_module()
class ParamSchedulerHook(Hook):
    """Steps each scheduler after each iteration or epoch, whichever it counts.

    A scheduler by epoch whose attribute ``need_val_args`` is true is stepped with the metrics after each validation.
    """

    priority = "LOW"

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Step the schedulers that count iterations."""
        for scheduler in _schedulers(runner):
            if not scheduler.by_epoch:
                scheduler.step()

    def after_train_epoch(self, runner: Runner) -> None:
        """Step the schedulers that count epochs."""
        for scheduler in _schedulers(runner):
            if scheduler.by_epoch:
                scheduler.step()

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Step the schedulers that use metrics."""
        if metrics is None:
            return
        for scheduler in _schedulers(runner):
            if scheduler.by_epoch and getattr(scheduler, "need_val_args", False):
                scheduler.step(metrics)


def _schedulers(runner: Runner) -> Iterator[Any]:
    listed = runner.param_schedulers or []
    for part in listed.values() if isinstance(listed, Mapping) else [listed]:
        yield from part
