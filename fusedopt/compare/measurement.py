"""A hook that measures what the optimizer does in a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..bench.memory import PeakMemory
from ..training.config import naming
from ..training.engine.hooks import Hook
from ..training.engine.runner import Runner

__all__ = ["WARMUP_STEPS", "OptimizerMeasurement"]

#: The first optimizer steps allocate state and tables; they are left out of the times, and measured for memory.
WARMUP_STEPS = 5


class OptimizerMeasurement(Hook):
    """Measures the part of the optimizer in each step of a run with one optimizer wrapper.

    Attributes:
        losses: loss of each iteration.
        optimizer_seconds: for each optimizer step, what the wrapper did after backward: unscale, clip, step, scaler
            update, zero_grad.
        step_seconds: the whole of each optimizer step: forward and backward of its iterations and the above. Hooks,
            such as the one of the schedulers, are not counted.
        peak_bytes: extra memory of the optimizer's part in steps 2 to WARMUP_STEPS; empty where it cannot be told.
    """

    priority = "HIGHEST"

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.peak_bytes: list[int] = []
        self._unfinished_step_seconds = 0.0
        self._optimizer_started: float | None = None

    def before_train(self, runner: Runner) -> None:
        """Watch the wrapper."""
        self._device = runner.device
        self._memory = PeakMemory(runner.device)
        # update_params calls step and then zero_grad, only when a step is due.
        _around(runner.optim_wrapper, "step", before=self._start_optimizer)
        _around(runner.optim_wrapper, "zero_grad", after=self._stop_optimizer)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start the clock."""
        self._optimizer_started = None
        self._started = self._now()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Stop the clock."""
        self._unfinished_step_seconds += self._now() - self._started
        if not isinstance(outputs, Mapping) or "loss" not in outputs:
            with naming(runner.cfg):
                raise ValueError("compare needs train_step to return a loss, under the key 'loss'")
        self.losses.append(outputs["loss"].item())
        if self.made_step:
            self.step_seconds.append(self._unfinished_step_seconds)
            self._unfinished_step_seconds = 0.0

    @property
    def made_step(self) -> bool:
        """Whether the last iteration completed an optimizer step."""
        return self._optimizer_started is not None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _measures_memory(self) -> bool:
        return 1 <= len(self.step_seconds) < WARMUP_STEPS  # the very first step allocates the optimizer's state

    def _start_optimizer(self) -> None:
        if self._measures_memory():
            self._memory.start()
        self._optimizer_started = self._now()

    def _stop_optimizer(self) -> None:
        assert self._optimizer_started is not None
        self.optimizer_seconds.append(self._now() - self._optimizer_started)
        if self._measures_memory() and (peak := self._memory.stop()) is not None:
            self.peak_bytes.append(peak)


def _around(
    target: Any, method: str, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
) -> None:
    original = getattr(target, method)

    def surrounded(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        after()
        return result

    setattr(target, method, surrounded)
