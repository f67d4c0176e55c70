"""Loops: training by epochs and by iterations, validation and test."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from ...messages import check_flag, check_whole_number
from ..registry import LOOPS
from .data import InfiniteSampler, iterate, sampler_of, set_epoch
from .evaluator import Evaluator
from .random_states import isolated_random_states, random_states, set_random_states

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["EpochBasedTrainLoop", "IterBasedTrainLoop", "TestLoop", "TrainLoop", "ValLoop"]


# Note [Resuming bit for bit]
# A checkpoint holds the number of complete passes over the data, the number of batches of the current pass that were
# trained on, and the states of the random generators, now and when the current pass began. A resumed run restores the
# latter, begins the pass (a sampler or a loader may draw its seed there), skips the batches, and restores the former.
# The checkpoint also holds the gradients of an incomplete accumulation and, for each process, whatever differs between
# processes. A checkpoint written before a due validation records that, and the resumed run validates first, since
# schedulers and the best checkpoint depend on it. A validation restores the generators, so that training does not
# depend on it.


class TrainLoop(abc.ABC):
    """Base of training by epochs and by iterations; see Note [Resuming bit for bit].

    Args:
        runner: the runner.
        dataloader: its training data.
        val_begin: number of the first epoch or iteration, counted from 1, after which a validation may follow.
        val_interval: number of epochs or iterations between validations.
        dynamic_intervals: pairs of a number and the interval from there on.

    Attributes:
        stop_training: a hook can set this to end the run after the current epoch or iteration.
    """

    by_epoch: bool
    max_epochs: int
    max_iters: int

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader,
        val_begin: int,
        val_interval: int,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ):
        if not len(dataloader):
            raise ValueError("train_dataloader has no batch: drop_last with fewer samples than batch_size?")
        self.runner = runner
        self.dataloader = dataloader
        self.val_begin = check_whole_number("train_cfg.val_begin", val_begin, 0)
        self.val_interval = check_whole_number("train_cfg.val_interval", val_interval, 1)
        self.dynamic_intervals: list[tuple[int, int]] = []
        name = "train_cfg.dynamic_intervals"
        for pair in dynamic_intervals or ():
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                raise TypeError(f"{name} must be a list of pairs (milestone, interval), got {dynamic_intervals!r}")
            milestone = check_whole_number(f"{name} milestone", pair[0], 0)
            self.dynamic_intervals.append((milestone, check_whole_number(f"{name} interval", pair[1], 1)))
        self.dynamic_intervals.sort()
        self.stop_training = False
        self.epoch = 0
        self.iter = 0
        self._iters_done = 0
        self._passes = 0
        self._batches = 0
        self._pass_random: Mapping[str, Any] = {}
        self._random_after_validation: Mapping[str, Any] | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._validation_due = False

    @abc.abstractmethod
    def run(self) -> None:
        """Train to the end."""

    @property
    def _end(self) -> int:
        return self.max_epochs if self.by_epoch else self.max_iters

    def interval_after(self, count: int) -> int:
        """The number of epochs or iterations between validations, after ``count`` of them."""
        passed = [interval for milestone, interval in self.dynamic_intervals if count + 1 >= milestone]
        return passed[-1] if passed else self.val_interval

    def validates_after(self, count: int) -> bool:
        """Whether a validation follows after ``count`` epochs or iterations."""
        return (
            self.runner.val_loop is not None
            and count >= self.val_begin
            and (count % self.interval_after(count) == 0 or count == self._end)
        )

    def progress(self) -> dict[str, Any]:
        """Epochs and iterations done, passes over the data, batches of the current pass, and if a validation is due.

        In an ``after_train_iter`` or ``after_train_epoch`` hook, the current iteration or epoch counts as done.
        """
        return {
            "epoch": self._passes if self.by_epoch else self.epoch,
            "iter": self._iters_done,
            "position": {"passes": self._passes, "batches": self._batches},
            "validation_due": self._validation_due,
        }

    def process_state(self) -> dict[str, Any]:
        """The state that differs between processes: their random generators, now and at the start of the pass."""
        now = self._random_after_validation or random_states(self.dataloader.generator)
        return {"random": now, "pass_random": self._pass_random}

    def resume(self, meta: Mapping[str, Any], process_state: Mapping[str, Any] | None) -> None:
        """Continue where a checkpoint was written.

        Args:
            meta: the checkpoint's ``meta``.
            process_state: the state of this process; None leaves the random generators as they are.
        """
        self.epoch, self.iter = meta["epoch"], meta["iter"]
        self._iters_done = self.iter
        self._passes, self._batches = meta["position"]["passes"], meta["position"]["batches"]
        self._validation_due = meta["validation_due"]
        self._resumed = process_state

    def _begin(self) -> None:
        """The start of :meth:`run`."""
        self.runner.call_hook("before_train")
        if self._resumed is not None:
            set_random_states(self._resumed["random"], self.dataloader.generator)
        self._validate()

    def _validate(self) -> None:
        """Validate if due."""
        due, self._validation_due = self._validation_due, False
        if due and self.runner.val_loop is not None:
            self._random_after_validation = random_states(self.dataloader.generator)
            try:
                self.runner.val_loop.run()
            finally:
                self._random_after_validation = None

    def _pass(self) -> Iterator[Any]:
        """The batches of one pass, or the rest of it."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None and self._batches:
            set_random_states(resumed["pass_random"], self.dataloader.generator)
        self._pass_random = random_states(self.dataloader.generator)
        batches = iterate(self.dataloader, self._passes, self._batches)
        if resumed is not None and self._batches:
            set_random_states(resumed["random"], self.dataloader.generator)
        yield from batches
        self._passes += 1
        self._batches = 0

    def run_iter(self, batch_idx: int, data_batch: Any) -> None:
        """Run one iteration."""
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=batch_idx, data_batch=data_batch)
        outputs = runner.model.train_step(data_batch, optim_wrapper=runner.optim_wrapper)
        self._iters_done += 1
        self._batches += 1
        if not self.by_epoch:
            self._validation_due = self.validates_after(self._iters_done)
        runner.call_hook("after_train_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)
        self.iter += 1


@LOOPS.register_module()
class EpochBasedTrainLoop(TrainLoop):
    """Training by epochs: ``train_cfg=dict(by_epoch=True, ...)``.

    Args:
        runner: the runner.
        dataloader: its training data.
        max_epochs: number of epochs.
        val_begin: number of the first epoch, counted from 1, after which a validation may follow.
        val_interval: number of epochs between validations; one also follows the last epoch.
        dynamic_intervals: pairs of the number of an epoch, from 1, and the ``val_interval`` from there on.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or the data have no end.
    """

    by_epoch = True

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader,
        max_epochs: int,
        val_begin: int = 1,
        val_interval: int = 1,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ):
        if isinstance(sampler_of(dataloader), InfiniteSampler):
            raise ValueError(
                "an epoch of an InfiniteSampler never ends; use DefaultSampler, or train by iterations: "
                "train_cfg=dict(by_epoch=False, max_iters=...)"
            )
        super().__init__(runner, dataloader, val_begin, val_interval, dynamic_intervals)
        self.max_epochs = check_whole_number("train_cfg.max_epochs", max_epochs, 1)
        self.max_iters = self.max_epochs * len(dataloader)

    def run(self) -> None:
        """Train to the end."""
        self._begin()
        while self.epoch < self.max_epochs and not self.stop_training:
            self.run_epoch()
            self._validate()
        self.runner.call_hook("after_train")

    def run_epoch(self) -> None:
        """Run one epoch, or the rest of it."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for batch_idx, data_batch in enumerate(self._pass(), self._batches):
            self.run_iter(batch_idx, data_batch)
        self._validation_due = self.validates_after(self.epoch + 1)
        self.runner.call_hook("after_train_epoch")
        self.epoch += 1


@LOOPS.register_module()
class IterBasedTrainLoop(TrainLoop):
    """Training by iterations: ``train_cfg=dict(by_epoch=False, ...)``. Hooks see one epoch.

    Args:
        runner: the runner.
        dataloader: its training data. At their end they start again, in the sampler's next order.
        max_iters: number of iterations.
        val_begin: number of the first iteration, counted from 1, after which a validation may follow.
        val_interval: number of iterations between validations; one also follows the last iteration.
        dynamic_intervals: pairs of the number of an iteration, from 1, and the ``val_interval`` from there on.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    by_epoch = False

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader,
        max_iters: int,
        val_begin: int = 1,
        val_interval: int = 1000,
        dynamic_intervals: Sequence[tuple[int, int]] | None = None,
    ):
        super().__init__(runner, dataloader, val_begin, val_interval, dynamic_intervals)
        self.max_epochs = 1
        self.max_iters = check_whole_number("train_cfg.max_iters", max_iters, 1)

    def run(self) -> None:
        """Train to the end."""
        self._begin()
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        batches = self._endless()
        while self.iter < self.max_iters and not self.stop_training:
            if not self.runner.model.training:
                self.runner.model.train()
            self.run_iter(self.iter, next(batches))
            self._validate()
        self.runner.call_hook("after_train_epoch")
        self.runner.call_hook("after_train")

    def _endless(self) -> Iterator[Any]:
        while True:
            set_epoch(self.dataloader, self._passes)
            yield from self._pass()


class _EvaluationLoop:
    """Validation or test.

    Args:
        runner: the runner.
        dataloader: its data.
        evaluator: computes the metrics from the predictions.
        fp16: whether to predict under autocast.
    """

    mode: str

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader,
        evaluator: Evaluator,
        fp16: bool = False,
    ):
        self.runner = runner
        self.dataloader = dataloader
        self.evaluator = evaluator
        self.fp16 = check_flag("fp16", fp16)
        metainfo = getattr(dataloader.dataset, "metainfo", None)
        if metainfo is not None:
            self.evaluator.dataset_meta = metainfo

    def run(self) -> dict[str, Any]:
        """Go through the data once; return the metrics."""
        with isolated_random_states(self.dataloader.generator):
            call_hook, mode = self.runner.call_hook, self.mode
            call_hook(f"before_{mode}")
            call_hook(f"before_{mode}_epoch")
            self.runner.model.eval()
            self.evaluator.begin()
            for batch_idx, data_batch in enumerate(iterate(self.dataloader, 0, 0)):
                self.run_iter(batch_idx, data_batch)
            metrics = self.evaluator.evaluate(len(self.dataloader.dataset))  # type: ignore[arg-type]
            call_hook(f"after_{mode}_epoch", metrics=metrics)
            call_hook(f"after_{mode}")
        return metrics

    @torch.no_grad()
    def run_iter(self, batch_idx: int, data_batch: Any) -> None:
        """Process one batch."""
        call_hook, mode = self.runner.call_hook, self.mode
        call_hook(f"before_{mode}_iter", batch_idx=batch_idx, data_batch=data_batch)
        with torch.autocast(self.runner.device.type, enabled=self.fp16):
            outputs = getattr(self.runner.model, f"{mode}_step")(data_batch)
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        call_hook(f"after_{mode}_iter", batch_idx=batch_idx, data_batch=data_batch, outputs=outputs)


@LOOPS.register_module()
class ValLoop(_EvaluationLoop):
    """Validation: ``val_cfg=dict()``.

    Args:
        runner: the runner.
        dataloader: its data.
        evaluator: computes the metrics from the predictions.
        fp16: whether to predict under autocast.
    """

    mode = "val"


@LOOPS.register_module()
class TestLoop(_EvaluationLoop):
    """Test: ``test_cfg=dict()``.

    Args:
        runner: the runner.
        dataloader: its data.
        evaluator: computes the metrics from the predictions.
        fp16: whether to predict under autocast.
    """

    mode = "test"
    __test__ = False  # not a pytest class
