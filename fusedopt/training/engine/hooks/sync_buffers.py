"""SyncBuffersHook: the same buffers in all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from ...registry import HOOKS
from ..distributed import world_size
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["SyncBuffersHook"]


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Averages the model's floating-point buffers, such as the statistics of BatchNorm, over all processes.

    It does so after each training epoch, and before a validation that does not follow one directly.
    """

    def __init__(self) -> None:
        self._synchronized = False

    def before_val_epoch(self, runner: Runner) -> None:
        """Average if the epoch's end has not just done so."""
        if not self._synchronized:
            self._average(runner)
        self._synchronized = False

    def after_train_epoch(self, runner: Runner) -> None:
        """Average."""
        self._average(runner)
        self._synchronized = True

    def _average(self, runner: Runner) -> None:
        size = world_size()
        if size == 1:
            return
        for buffer in runner.bare_model.buffers():
            if buffer.is_floating_point() and buffer.numel():
                dist.all_reduce(buffer)
                buffer.div_(size)
