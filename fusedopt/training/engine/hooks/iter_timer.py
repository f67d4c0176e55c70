"""IterTimerHook: how long an iteration takes, and how long the training will."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["IterTimerHook"]


@HOOKS.register_module()
class IterTimerHook(Hook):
    """Notes ``data_time``, the wait for the data, and ``time``, the whole iteration, in seconds, and ``eta``.

    Nothing waits for the device: on a GPU an iteration's time is that of the host.
    """

    def __init__(self) -> None:
        self._first_iter = 0
        self._seconds = {"train": 0.0, "val": 0.0, "test": 0.0}
        self._last = time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        """Begin to count at the iteration where the training starts."""
        self._first_iter = runner.iter
        self._seconds["train"] = 0.0

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode != "train":
            self._seconds[mode] = 0.0
        self._last = time.perf_counter()

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        self._last = time.perf_counter()  # a validation is no wait for training data

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        runner.message_hub.update_scalar(f"{mode}/data_time", time.perf_counter() - self._last)

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | Sequence[Any] | None = None,
        mode: str = "train",
    ) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        runner.message_hub.update_scalar(f"{mode}/time", seconds)
        self._seconds[mode] += seconds
        if mode == "train":
            done, left = runner.iter + 1 - self._first_iter, runner.max_iters - runner.iter - 1
        else:
            loader = runner.val_dataloader if mode == "val" else runner.test_dataloader
            assert loader is not None
            done, left = batch_idx + 1, len(loader) - batch_idx - 1
        runner.message_hub.update_info("eta", self._seconds[mode] / done * left)
