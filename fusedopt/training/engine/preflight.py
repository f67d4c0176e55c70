"""Warnings, before a run begins, about parts of it that would never act or not act as configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...messages import warn_caller
from .hooks import CheckpointHook, LoggerHook

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["named_schedulers", "warn_of_what_will_not_act"]


def warn_of_what_will_not_act(runner: Runner) -> None:
    """Warn of schedulers whose metrics will never come, and of parts that count epochs in training by iterations."""
    if runner.train_loop is None:
        return
    for name, scheduler in named_schedulers(runner.param_schedulers):
        if getattr(scheduler, "need_val_args", False):
            _warn_of_idle_plateau(runner, name, scheduler)
    if not runner.train_loop.by_epoch:
        _warn_of_epochs(runner)


def named_schedulers(param_schedulers: Any) -> Iterator[tuple[str, Any]]:
    """Each scheduler with its key in a config, such as ``param_scheduler.0`` or ``param_scheduler.generator.0``."""
    parts = param_schedulers if isinstance(param_schedulers, Mapping) else {"": param_schedulers or []}
    for part, listed in parts.items():
        for index, scheduler in enumerate(listed):
            yield ".".join(filter(None, ("param_scheduler", part, str(index)))), scheduler


def _kind(scheduler: Any) -> str:
    return type(getattr(scheduler, "scheduler", scheduler)).__name__  # what a SkipAwareScheduler drives


def _warn_of_idle_plateau(runner: Runner, name: str, scheduler: Any) -> None:
    loop = runner.train_loop
    assert loop is not None
    what = f"{name} ({_kind(scheduler)}) monitors {getattr(scheduler, 'monitor', 'a metric')!r} of the validations"
    if runner.val_loop is None:
        warn_caller(
            f"{what}, but there are none, so it never acts; expected val_dataloader, val_cfg and val_evaluator, or a "
            "custom hook that steps it"
        )
        return
    # It counts epochs of training, which stay 0 when training by iterations.
    length = loop.max_epochs if loop.by_epoch else loop.max_iters
    looked_at = sum(
        loop.validates_after(count) and scheduler.begin <= (count if loop.by_epoch else 0) < scheduler.end
        for count in range(1, length + 1)
    )
    patience = getattr(scheduler, "patience", None)
    needed = 1 if patience is None else patience + 2  # the first value is the best so far
    if looked_at < needed:
        why = "" if patience is None else f", patience={patience} + 2"
        warn_caller(
            f"{what}, of which {looked_at} {'is' if looked_at == 1 else 'are'} in its span from begin="
            f"{scheduler.begin} to end={scheduler.end}, so it never acts; expected at least {needed}{why}"
        )


def _warn_of_epochs(runner: Runner) -> None:
    entries = [
        f"{name} ({_kind(scheduler)}, by_epoch=True) makes no step before the end"
        for name, scheduler in named_schedulers(runner.param_schedulers)
        if scheduler.by_epoch and not getattr(scheduler, "need_val_args", False)
    ]
    for hook in runner.hooks:
        name = type(hook).__name__
        if isinstance(hook, CheckpointHook):
            if hook.by_epoch and hook.interval > 0:
                when = "once, at the end" if hook.save_last or hook.interval == 1 else "never"
                entries.append(f"{name} (by_epoch=True) writes checkpoints {when}")
        elif isinstance(hook, LoggerHook):
            if hook.log_metric_by_epoch and runner.val_loop is not None:
                entries.append(f"{name} (log_metric_by_epoch=True) logs the metrics of all validations at step 0")
        elif getattr(hook, "by_epoch", False) is True:
            entries.append(f"{name} (by_epoch=True) acts at the end, if at all")
    if runner.log_by_epoch:
        entries.append("log_processor (by_epoch=True) counts iterations of an epoch that never ends")
    if entries:
        warn_caller(
            f"the run trains by iterations, train_cfg.max_iters={runner.max_iters}, but these count epochs: "
            f"{'; '.join(entries)}. Expected by_epoch=False, and log_metric_by_epoch=False, in each"
        )
