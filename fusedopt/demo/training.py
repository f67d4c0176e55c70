"""A training that measures its optimizer."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from ..bench.memory import PeakMemory
from ..builder import build_optim_wrapper
from ..registry import MODELS
from .data import Digits

__all__ = ["WARMUP_STEPS", "ScheduleSettings", "Training"]

#: The first optimizer steps allocate state and tables; they are left out of the times, and measured for memory.
WARMUP_STEPS = 5


@dataclass(frozen=True)
class ScheduleSettings:
    """``lr_schedule`` of a config: linear warm-up, then a cosine, both counted in optimizer steps.

    Args:
        warmup_steps: length of the warm-up.
        start_factor: multiplier of the learning rate at its beginning, above 0.
        eta_min: learning rate at the end of the cosine.
    """

    warmup_steps: int = 0
    start_factor: float = 0.01
    eta_min: float = 0.0

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        """The schedule of a training of ``total_steps`` optimizer steps."""
        cosine = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - self.warmup_steps), eta_min=self.eta_min)
        if not self.warmup_steps:
            return cosine
        warmup = LinearLR(optimizer, start_factor=self.start_factor, total_iters=self.warmup_steps)
        return SequentialLR(optimizer, [warmup, cosine], milestones=[self.warmup_steps])


class Training:
    """One model, its optimizer wrapper and its schedule; trains a batch at a time and keeps the figures.

    Args:
        model: config of the model.
        optim_wrapper: config of the wrapper, as :func:`fusedopt.build_optim_wrapper` takes it.
        schedule: of the learning rate.
        total_iters: number of batches to come.
        seed: of the initial weights.
        device: where to train.

    Attributes:
        losses: mean loss of each batch.
        optimizer_seconds: for each optimizer step, what the wrapper did after backward: unscale, clip, step, scaler
            update, zero_grad.
        step_seconds: the whole of each optimizer step: forward and backward of its batches and the above. The
            learning rate schedule is not counted.
        peak_bytes: extra memory of the optimizer's part in steps 2 to WARMUP_STEPS; empty where it cannot be told.

    Raises:
        KeyError, TypeError, ValueError: a config is wrong.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        optim_wrapper: Mapping[str, Any],
        schedule: ScheduleSettings,
        total_iters: int,
        seed: int,
        device: torch.device,
    ):
        torch.manual_seed(seed)
        self.device = device
        self.model: torch.nn.Module = MODELS.build(dict(model)).to(device)
        self.wrapper = build_optim_wrapper(self.model, dict(optim_wrapper))
        self.wrapper.initialize_count_status(self.model, 0, total_iters)
        total_steps = math.ceil(total_iters / optim_wrapper.get("accumulative_counts", 1))
        self.schedule = schedule.build(self.wrapper.optimizer, total_steps)
        self.losses: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self.peak_bytes: list[int] = []
        self._memory = PeakMemory(device)
        self._unfinished_step_seconds = 0.0
        self._optimizer_started: float | None = None
        # update_params calls step and then zero_grad, only when a step is due.
        self._around("step", before=self._start_optimizer)
        self._around("zero_grad", after=self._stop_optimizer)

    def _around(
        self, method: str, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None
    ) -> None:
        original = getattr(self.wrapper, method)

        def surrounded(*args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs)
            after()
            return result

        setattr(self.wrapper, method, surrounded)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
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

    def train(self, batch: Digits, seed: int) -> bool:
        """Train on one batch with random numbers from ``seed``; True when that completed an optimizer step."""
        self.model.train()
        torch.manual_seed(seed)
        self._optimizer_started = None
        start = self._now()
        with self.wrapper.optim_context(self.model):
            loss = functional.cross_entropy(self.model(batch.images).float(), batch.labels)
        self.wrapper.update_params(loss)
        self._unfinished_step_seconds += self._now() - start
        self.losses.append(loss.item())
        if self._optimizer_started is None:
            return False
        self.step_seconds.append(self._unfinished_step_seconds)
        self._unfinished_step_seconds = 0.0
        with warnings.catch_warnings():
            # A scaler skips its first steps until the scale fits; torch takes that for a wrong order of calls.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.schedule.step()
        return True

    @torch.no_grad()
    def evaluate(self, split: Digits) -> tuple[float, float]:
        """Mean loss and accuracy on ``split``, in the parameters' precision."""
        self.model.eval()
        logits = self.model(split.images)
        accuracy = (logits.argmax(dim=1) == split.labels).double().mean()
        return functional.cross_entropy(logits, split.labels).item(), accuracy.item()
