"""transformers: ``fuse(trainer)``, and the Trainer trains with a fused optimizer; everything else stays as written.

    trainer = fuse(Trainer(model, args, train_dataset=data))
    trainer.train()

See docs/trainers.md.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

from .. import optimizers
from ..messages.extras import require
from ..optimizers import FusedOptimizer
from ..optimizers.fuse import FUSED_TWINS

__all__ = ["fuse", "unfuse"]

_transformers: Any = require("transformers", "transformers")
require("accelerate", "transformers")

from . import accelerate as _accelerate  # noqa: E402
from .replaced import replace_methods, restore_methods  # noqa: E402

_log = logging.getLogger(__name__)


def fuse(trainer: Any) -> Any:
    """Let the trainer train with a fused optimizer, whose step unscales and clips.

    Call it before ``train()``. An SGD, Adam or AdamW of torch becomes its fused twin, whether the trainer makes it by
    ``args.optim`` or got it as ``optimizers=``; learning rates, groups and schedules stay what they are. Any other
    optimizer is left alone, and the log says so once. The trainer's accelerator is fused as by
    :func:`fusedopt.integrations.accelerate.fuse`, and so is each that the trainer makes later.

    Args:
        trainer: a ``transformers.Trainer`` or of a class derived from it.

    Returns:
        The trainer.

    Raises:
        TypeError: it is no Trainer.
    """
    if not isinstance(trainer, _transformers.Trainer):
        raise TypeError(f"fuse() takes a transformers.Trainer; got {type(trainer).__name__}")
    replaced = _replaced(trainer)
    if replaced is None:
        replaced = trainer._fusedopt = _Replaced(trainer)
    replaced.take_over()
    return trainer


def unfuse(trainer: Any) -> Any:
    """Undo :func:`fuse`. An optimizer that :func:`fuse` has replaced becomes torch's again, with its state.

    Args:
        trainer: a ``transformers.Trainer``, fused or not.

    Returns:
        The trainer.

    Raises:
        ValueError: the optimizer was given a ``clip_grad`` of its own, which torch's does not have.
    """
    replaced = _replaced(trainer)
    if replaced is not None:
        replaced.undo()
        del trainer._fusedopt
    return trainer


def _replaced(trainer: Any) -> _Replaced | None:
    return vars(trainer).get("_fusedopt")


class _Replaced:
    """What stands in the place of a trainer's create_optimizer, and how to undo that."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.active = True
        self._stock = trainer.create_optimizer
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()
        self._told = False
        replace_methods(trainer, {"create_optimizer": self.create_optimizer})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.create_optimizer``, which is called whenever it trains, also with another accelerator."""
        optimizer = self._stock(*args, **kwargs)
        if not self.active or optimizer is not self.trainer.optimizer:
            return optimizer
        self.take_over()
        return self.trainer.optimizer

    def take_over(self) -> None:
        """Fuse the optimizer that is there, and the accelerator."""
        accelerator = self.trainer.accelerator
        optimizer = _accelerate.inner(self.trainer.optimizer)
        why = None
        if optimizer is None or isinstance(optimizer, FusedOptimizer):
            pass
        elif type(optimizer) not in FUSED_TWINS:
            why = "it has no fused twin"
        elif not _accelerate.serves(accelerator):
            why = f"the trainer's distributed_type is {accelerator.distributed_type.value}"
        else:
            twin = optimizers.fuse(optimizer)
            self._made.add(twin)
            self._put(twin)
        if why is not None and not self._told:
            self._told = True
            _log.warning("fusedopt leaves %s as it is: %s", type(optimizer).__name__, why)
        _accelerate.fuse(accelerator)

    def undo(self) -> None:
        optimizer = _accelerate.inner(self.trainer.optimizer)
        if optimizer in self._made:
            self._put(optimizers.unfuse(optimizer))
        _accelerate.unfuse(self.trainer.accelerator)
        self.active = False
        restore_methods(self.trainer)

    def _put(self, optimizer: Any) -> None:
        """Make it the trainer's optimizer, in the place of the one that is there."""
        before = self.trainer.optimizer
        if _accelerate.inner(before) is not before:
            _accelerate.hold(before, optimizer)
            return
        self.trainer.optimizer = optimizer
        if self.trainer.callback_handler.optimizer is before:
            self.trainer.callback_handler.optimizer = optimizer
