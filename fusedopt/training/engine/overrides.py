"""resume_overrides: a resumed run uses the settings of the config, not those of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ..schedulers.watching import unwatch
from ..wrappers import OptimWrapper, OptimWrapperDict, SkipAwareScheduler
from .checkpoint import CheckpointError
from .hooks import ParamSchedulerHook
from .preflight import named_schedulers

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["GroupSettings", "check_replay", "replay_schedules"]


class GroupSettings:
    """The present settings of a wrapper's parameter groups, to be restored after a state is loaded."""

    def __init__(self, optim_wrapper: OptimWrapper):
        several = isinstance(optim_wrapper, OptimWrapperDict)
        self._wrappers = list(optim_wrapper.values()) if several else [optim_wrapper]  # type: ignore[attr-defined]
        self._settings = [[_settings(group) for group in each.param_groups] for each in self._wrappers]

    def put_back(self) -> None:
        """Restore the settings; the groups' parameters stay."""
        for wrapper, settings in zip(self._wrappers, self._settings, strict=True):
            for group, own in zip(wrapper.param_groups, settings, strict=True):
                for key in [key for key in group if key not in ("params", "param_names")]:
                    del group[key]
                group.update(own)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: deepcopy(value) for key, value in group.items() if key not in ("params", "param_names")}


def check_replay(runner: Runner, filename: Any) -> None:
    """Raise CheckpointError if a schedule depends on more than the number of steps."""
    for name, scheduler in named_schedulers(runner.param_schedulers):
        reason = None
        if getattr(scheduler, "need_val_args", False):
            reason = "on the metrics so far"
        elif isinstance(scheduler, SkipAwareScheduler):
            reason = "on which steps were skipped"
        if reason is not None:
            kind = type(getattr(scheduler, "scheduler", scheduler)).__name__
            raise CheckpointError(
                f"{filename} cannot be resumed from with resume_overrides: what {name} ({kind}) has done depends "
                f"{reason}, which the file does not have. Undo the edits of optim_wrapper and param_scheduler, or "
                "resume without resume_overrides"
            )


def replay_schedules(runner: Runner, meta: Mapping[str, Any]) -> None:
    """Step newly built schedulers to where a checkpoint was written.

    Args:
        runner: its schedulers must have made no step.
        meta: the checkpoint's ``meta``, with the numbers of iterations and epochs done.
    """
    loop = runner.train_loop
    assert loop is not None
    schedulers = [scheduler for _, scheduler in named_schedulers(runner.param_schedulers)]
    if not any(isinstance(hook, ParamSchedulerHook) for hook in runner.hooks):
        return
    for scheduler in schedulers:
        unwatch(scheduler.optimizer)
    verbose = [scheduler.verbose for scheduler in schedulers]
    by_iteration = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    epochs = meta["epoch"] if by_epoch else 0
    for scheduler in schedulers:
        scheduler.verbose = False
    done = 0
    for iteration in range(1, meta["iter"] + 1) if by_iteration else ():
        for scheduler in by_iteration:
            scheduler.step()
        if done < epochs and iteration % meta["epoch_length"] == 0:
            done += 1
            for scheduler in by_epoch:
                scheduler.step()
    for _ in range(done, epochs):
        for scheduler in by_epoch:
            scheduler.step()
    for scheduler, was in zip(schedulers, verbose, strict=True):
        scheduler.verbose = was
