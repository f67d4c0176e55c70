"""EmptyCacheHook: returns cached GPU memory to the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["EmptyCacheHook"]


@HOOKS.register_module()
class EmptyCacheHook(Hook):
    """Calls ``torch.cuda.empty_cache()``; has no effect without a GPU.

    Args:
        before_epoch: call it before each epoch.
        after_epoch: call it after each epoch.
        after_iter: call it after each iteration.
    """

    def __init__(self, before_epoch: bool = False, after_epoch: bool = True, after_iter: bool = False):
        self.before_epoch = before_epoch
        self.after_epoch = after_epoch
        self.after_iter = after_iter

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        if self.before_epoch:
            torch.cuda.empty_cache()

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        if self.after_epoch:
            torch.cuda.empty_cache()

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | Sequence[Any] | None = None,
        mode: str = "train",
    ) -> None:
        if self.after_iter:
            torch.cuda.empty_cache()
