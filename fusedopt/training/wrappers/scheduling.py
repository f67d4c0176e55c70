"""SkipAwareScheduler: a scheduler that does not advance when steps were skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...undo import unchanged_on_error
from ..portable import as_before
from .dict import OptimWrapperDict
from .wrapper import OptimWrapper, _on

__all__ = ["SkipAwareScheduler"]


class _Flag:
    """A flag that is copied from the device to the host."""

    def __init__(self, flag: Tensor):
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._flag = flag.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        """The flag; waits only for the work that produced it, not for work queued later."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class SkipAwareScheduler:
    """Drives a scheduler, but does not advance it when all steps were skipped for non-finite gradients.

    A call does not advance the scheduler if all steps since the previous call were skipped: the one step, if called
    after each step; all steps of the epoch, if called after each epoch. A call without steps since the previous one, as
    in the middle of an accumulation, advances as usual.

    By default the scheduler **lags one call**: each call checks the steps before the previous call. After skipped
    steps, the scheduler is thus one ahead until the next call, which does not advance it. On a GPU the host waits until
    the steps before the previous call are done, so that it runs at most one call ahead of the device. With ``wait``
    each call checks the steps just made; on a GPU that **synchronizes**.

    Args:
        scheduler: any object with ``step()``; its other attributes can be read from this object.
        optim_wrapper: the wrapper whose steps count.
        wait: check the steps just made.

    Raises:
        TypeError: ``optim_wrapper`` is not a single wrapper.
    """

    def __init__(self, scheduler: Any, optim_wrapper: OptimWrapper, wait: bool = False):
        if not isinstance(optim_wrapper, OptimWrapper) or isinstance(optim_wrapper, OptimWrapperDict):
            raise TypeError(
                f"optim_wrapper must be one OptimWrapper (of an OptimWrapperDict, the one that the scheduler drives), "
                f"got {type(optim_wrapper).__name__}"
            )
        self.scheduler = scheduler
        self.optim_wrapper = optim_wrapper
        self.wait = wait
        self._pending: _Flag | None = None
        with unchanged_on_error(optim_wrapper):
            self._begin()

    def _begin(self) -> None:
        self._steps_before = self.optim_wrapper.step_count
        self._made_before = self.optim_wrapper.count_made_steps()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler, unless all optimizer steps that it follows were skipped."""
        if self.wait:
            self._settle()
        skipped = self._pending is not None and self._pending.read()
        self._pending = None
        if not self.wait:
            self._settle()
        if not skipped:
            self.scheduler.step(*args, **kwargs)

    def _settle(self) -> None:
        """If there were steps since the last call, start reading whether all were skipped."""
        made = self.optim_wrapper.count_made_steps()
        if self.optim_wrapper.step_count != self._steps_before and isinstance(made, Tensor):
            self._pending = _Flag(made == _on(made.device, self._made_before))
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state dict, with ``all_were_skipped`` before the last call and ``some_were_made`` since it.

        This waits for the device.
        """
        skipped = self._pending is not None and self._pending.read()
        some = int(self.optim_wrapper.count_made_steps()) != int(self._made_before)
        return {**self.scheduler.state_dict(), "all_were_skipped": skipped, "some_were_made": some}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state from :meth:`state_dict`, or the scheduler's own state dict."""
        own = dict(state_dict)
        self._pending = _Flag(torch.tensor(own.pop("all_were_skipped", False)))
        self._begin()
        if own.pop("some_were_made", False):
            self._made_before = self._made_before - 1
        self.scheduler.load_state_dict(as_before(own, self.scheduler.state_dict()))

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not set yet, as during unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)
