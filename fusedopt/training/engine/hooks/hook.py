"""Hook: the stages of a run, and the order of hooks within a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from ....messages import did_you_mean, plain

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["Hook", "Priority", "check_local_files", "get_priority"]


class Priority(IntEnum):
    """Order of hooks within a stage, lower numbers first, as ``mmengine.runner.Priority``.

    Args:
        value: the number of one of the names below.
    """

    HIGHEST = 0
    VERY_HIGH = 10
    HIGH = 30
    ABOVE_NORMAL = 40
    NORMAL = 50
    BELOW_NORMAL = 60
    LOW = 70
    VERY_LOW = 90
    LOWEST = 100


def get_priority(priority: int | str) -> int:
    """The number of a priority.

    Args:
        priority: a name of :class:`Priority` in any case, or a number from 0 to 100.

    Raises:
        TypeError: it is neither.
        ValueError: an unknown name, or a number out of range.
    """
    if isinstance(priority, str):
        if priority.upper() not in Priority.__members__:
            hint = did_you_mean(priority, Priority.__members__)
            raise ValueError(f"Invalid priority: {priority!r}; {hint}")
        return Priority[priority.upper()].value
    priority = plain(priority)
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise TypeError(f"priority must be a name such as 'NORMAL' or a number from 0 to 100, got {priority!r}")
    if not 0 <= priority <= 100:
        raise ValueError(f"Invalid priority: {priority}; expected a number from 0 to 100")
    return int(priority)


def check_local_files(backend_args: Any) -> None:
    """Raise ValueError unless ``backend_args``, which MMEngine's hooks have, stand for files on a local disk."""
    if backend_args is not None and backend_args != {"backend": "local"}:
        raise ValueError(f"Invalid backend_args: {backend_args!r}; expected None or dict(backend='local')")


class Hook:
    """Base of the hooks, as ``mmengine.hooks.Hook``: every stage is a method, which does nothing by default.

    The stages of epochs and iterations call ``_before_epoch``, ``_after_epoch``, ``_before_iter`` and ``_after_iter``
    with the ``mode`` ``'train'``, ``'val'`` or ``'test'``, so that a hook can handle all three in one method.

    Attributes:
        priority: a name of :class:`Priority` or a number from 0 to 100. Hooks of equal priority act in order of
            registration.
        stages: the names of the stages, in the order of a run.
    """

    priority: int | str = "NORMAL"
    stages = (
        "before_run",
        "after_load_checkpoint",
        "before_train",
        "before_train_epoch",
        "before_train_iter",
        "after_train_iter",
        "after_train_epoch",
        "before_val",
        "before_val_epoch",
        "before_val_iter",
        "after_val_iter",
        "after_val_epoch",
        "after_val",
        "before_save_checkpoint",
        "after_train",
        "before_test",
        "before_test_epoch",
        "before_test_iter",
        "after_test_iter",
        "after_test_epoch",
        "after_test",
        "after_run",
    )

    def before_run(self, runner: Runner) -> None:
        """Before everything else, and before a checkpoint is loaded."""

    def after_run(self, runner: Runner) -> None:
        """After everything else; not called if the run fails."""

    def close(self) -> None:
        """Release resources. Called at the end of every run, even after a failure; another run may follow."""

    def before_train(self, runner: Runner) -> None:
        """Before the first epoch, after a resumed state has been loaded."""

    def after_train(self, runner: Runner) -> None:
        """After the last epoch."""

    def before_val(self, runner: Runner) -> None:
        """Before a validation."""

    def after_val(self, runner: Runner) -> None:
        """After a validation."""

    def before_test(self, runner: Runner) -> None:
        """Before a test."""

    def after_test(self, runner: Runner) -> None:
        """After a test."""

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint is written; changes to ``checkpoint`` are written too."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """After a checkpoint is read and before the model loads ``checkpoint['state_dict']``."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Before an epoch; when training by iterations, once before the first iteration."""
        self._before_epoch(runner, mode="train")

    def before_val_epoch(self, runner: Runner) -> None:
        """Before the batches of a validation."""
        self._before_epoch(runner, mode="val")

    def before_test_epoch(self, runner: Runner) -> None:
        """Before the batches of a test."""
        self._before_epoch(runner, mode="test")

    def after_train_epoch(self, runner: Runner) -> None:
        """After an epoch, before ``runner.epoch`` is increased; when training by iterations, once after the last."""
        self._after_epoch(runner, mode="train")

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """After the batches of a validation."""
        self._after_epoch(runner, mode="val")

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """After the batches of a test."""
        self._after_epoch(runner, mode="test")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before an iteration."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="train")

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before a batch of a validation."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="val")

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before a batch of a test."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="test")

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """After an iteration, before ``runner.iter`` is increased; ``train_step`` returned ``outputs``."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="train")

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """After a batch of a validation; ``val_step`` returned ``outputs``."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="val")

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        """After a batch of a test; ``test_step`` returned ``outputs``."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="test")

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        """Before an epoch of any ``mode``."""

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        """After an epoch of any ``mode``."""

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        """Before a batch of any ``mode``."""

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | Sequence[Any] | None = None,
        mode: str = "train",
    ) -> None:
        """After a batch of any ``mode``."""

    def every_n_epochs(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Whether the number of epochs done since ``start`` is a multiple of ``n``; False for ``n <= 0``."""
        return _is_multiple(runner.epoch + 1 - start, n)

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether the number of batches done in the epoch is a multiple of ``n``; False for ``n <= 0``."""
        return _is_multiple(batch_idx + 1, n)

    def every_n_train_iters(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Whether the number of iterations done since ``start`` is a multiple of ``n``; False for ``n <= 0``."""
        return _is_multiple(runner.iter + 1 - start, n)

    def end_of_epoch(self, dataloader: Any, batch_idx: int) -> bool:
        """Whether this is the last batch of ``dataloader``."""
        return batch_idx + 1 == len(dataloader)

    def get_triggered_stages(self) -> list[str]:
        """The stages in which the class of this hook acts, in the order of a run."""
        own = {name for cls in type(self).__mro__ if cls is not Hook and issubclass(cls, Hook) for name in vars(cls)}
        return [stage for stage in self.stages if {stage, _method_for_all_modes(stage)} & own]

    def is_last_train_epoch(self, runner: Runner) -> bool:
        """Whether this is the last epoch."""
        return runner.epoch + 1 == runner.max_epochs

    def is_last_train_iter(self, runner: Runner) -> bool:
        """Whether this is the last iteration."""
        return runner.iter + 1 == runner.max_iters


def _method_for_all_modes(stage: str) -> str:
    """The method that a stage calls: ``'_after_iter'`` for ``'after_train_iter'``."""
    return "_" + "_".join(part for part in stage.split("_") if part not in ("train", "val", "test"))


def _is_multiple(count: int, n: int) -> bool:
    return n > 0 and count >= 0 and count % n == 0
