"""IterTimerHook: the time of an iteration, and the time left."""

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
    """Records ``data_time``, the wait for data, ``time``, the whole iteration, and ``eta``, the time left, in seconds.

    It does not synchronize: on a GPU, an iteration's time is the host's.
    """

    def __init__(self) -> None:
        self._first_iter = 0
        self._seconds = {"train": 0.0, "val": 0.0, "test": 0.0}
        self._last = time.perf_counter()

    def before_train(self, runner: Runner) -> None:
        """Start counting at the first iteration of this run."""
        self._first_iter = runner.iter
        self._seconds["train"] = 0.0

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        if mode != "train":
            self._seconds[mode] = 0.0
        self._last = time.perf_counter()

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        self._last = time.perf_counter()  # a validation does not count as waiting for training data

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
