"""SkipAwareScheduler: a scheduler that stands still when a step was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dict import OptimWrapperDict
from .wrapper import OptimWrapper

__all__ = ["SkipAwareScheduler"]


class _Flag:
    """A flag on its way from the device to the host."""

    def __init__(self, flag: Tensor):
        self._flag = flag
        self._event: torch.cuda.Event | None = None
        if flag.is_cuda:
            self._flag = flag.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(flag.device))

    def read(self) -> bool:
        """The flag; waits for the work that made it, and for none that was queued after."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class SkipAwareScheduler:
    """Drives a learning rate scheduler, except past steps that were skipped for non-finite gradients.

    By default nothing waits for the device, so the scheduler **lags one step**: each call looks at the flag of the step
    before the last one. A step that was skipped is made up for at the next call, and until then the scheduler is one
    ahead. The host runs at most one step ahead of the device. With ``wait`` each call reads the flag of the last step;
    on a GPU that **synchronizes**. A call with no step since the one before, as in the middle of an accumulation,
    advances as usual.

    Args:
        scheduler: any object with ``step()``; everything else of it can be reached through this one.
        optim_wrapper: the wrapper whose steps count.
        wait: read the flag at once.

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
        self._steps_seen = optim_wrapper.step_count
        self._pending: _Flag | None = None

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step the scheduler, unless for a skipped step."""
        if self.wait:
            self._settle()
        skipped = self._pending is not None and self._pending.read()
        self._pending = None
        if not self.wait:
            self._settle()
        if not skipped:
            self.scheduler.step(*args, **kwargs)

    def _settle(self) -> None:
        """Begin to read the flag of the last step, if there was one since the last call."""
        flag = self.optim_wrapper.step_was_skipped
        if self.optim_wrapper.step_count != self._steps_seen and flag is not None:
            self._pending = _Flag(flag)
        self._steps_seen = self.optim_wrapper.step_count

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state dict, and ``last_step_was_skipped``; that waits for the last step's flag."""
        skipped = self._pending is not None and self._pending.read()
        return {**self.scheduler.state_dict(), "last_step_was_skipped": skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned, or the scheduler's own state dict."""
        own = dict(state_dict)
        self._pending = _Flag(torch.tensor(own.pop("last_step_was_skipped", False)))
        self._steps_seen = self.optim_wrapper.step_count
        self.scheduler.load_state_dict(own)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.scheduler, name)
