"""The checkpoints of a Runner: saving, loading and resuming."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..reading import Contents, find_weights, read_file
from ..sharding import gathered
from . import distributed
from .checkpoint import find_latest_checkpoint, is_folder, read_checkpoint, write_checkpoint
from .checks import check_training
from .hooking import HasHooks
from .mmengine_checkpoint import as_own, is_from_mmengine
from .sharded_checkpoint import read_folder, write_folder
from .state import load_training, shards_by_place, training_state
from .weights import check_weights, load_weights

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["HasCheckpoints"]


class HasCheckpoints(HasHooks):
    """The part of :class:`Runner` that saves and loads."""

    work_dir: str
    logger: logging.Logger
    _load_from: str | Path | None
    _resume: bool
    _loaded: bool

    @property
    def resumes(self) -> bool:
        """Whether this run resumes from a checkpoint."""
        return self._resume

    @property
    def _runner(self) -> Runner:
        return cast("Runner", self)

    def save_checkpoint(
        self,
        out_dir: str | Path,
        filename: str,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        meta: Mapping[str, Any] | None = None,
        sharded: bool = False,
    ) -> Path:
        """Write a checkpoint, whole or not at all. All processes must call this; the main one writes.

        Hooks get the tensors of a sharded model as DTensors, in ``before_save_checkpoint``.

        Args:
            out_dir: the folder; it is created if needed.
            filename: name of the file, or of the folder with ``sharded``.
            save_optimizer: include the optimizer's state, without which a run cannot be resumed.
            save_param_scheduler: include the schedulers' states, without which a run cannot be resumed.
            meta: entries of the checkpoint's ``meta``; they override the runner's own.
            sharded: write a folder, in which each process puts its shards of a sharded model, see Note [Sharded
                checkpoints]; otherwise the main process writes a file with whole tensors.

        Raises:
            CheckpointError: it cannot be written. An existing file or folder is unchanged then.
            RuntimeError: the config does not train.
        """
        if self.train_loop is None:
            raise RuntimeError("there is nothing to save: the config does not train")
        checkpoint = training_state(self._runner, save_optimizer, save_param_scheduler, meta)
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        path = Path(out_dir) / filename
        if sharded:
            write_folder(checkpoint, path)
            return path
        checkpoint = gathered(checkpoint, keep=distributed.is_main_process())
        if distributed.is_main_process():
            write_checkpoint(checkpoint, path)
        return path

    def load_or_resume(self) -> None:
        """Load or resume as ``load_from`` and ``resume`` say; only once, before the first loop runs.

        Raises:
            CheckpointError: loading is not possible. Nothing has been loaded then.
        """
        if self._loaded:
            return
        if self._resume:
            path = self._load_from or find_latest_checkpoint(self.work_dir)
            if path is None:
                self.logger.info(f"There is no checkpoint in {self.work_dir} to resume from: starting from scratch")
            else:
                self.resume(path)
        elif self._load_from is not None:
            self.load_checkpoint(self._load_from)
        self._loaded = True

    def load_checkpoint(self, filename: str | Path, strict: bool = False) -> dict[str, Any]:
        """Load the weights of a checkpoint into the model, and return the checkpoint.

        Args:
            filename: a sharded checkpoint of this Runner, or a file of ``torch.save`` or safetensors: a checkpoint of
                MMEngine, Lightning or others, a state dict, or a model. Nothing in it is run. What wrappers such as
                DataParallel and ``torch.compile`` add to names does not matter; a prefix under which half of the
                model's weights or more are, such as ``model.``, is removed.
            strict: require that every weight is in it and fits; otherwise, weights that do not are logged and kept.

        Raises:
            CheckpointError: it cannot be read, nothing in it fits or, with ``strict``, something does not fit. Nothing
                has been loaded then.
        """
        if is_folder(filename):
            folder = read_folder(filename, partial(shards_by_place, self._runner), ("state_dict", "ema_state_dict"))
            contents = Contents(Path(filename), folder)
        else:
            contents = read_file(filename)
        weights = find_weights(contents)
        whole = weights.key is not None and isinstance(contents.value, Mapping)
        checkpoint = {**(contents.value if whole else {}), "state_dict": weights.state_dict}
        check_weights(self._runner, filename, checkpoint, strict)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        loaded = load_weights(self._runner, checkpoint)
        self.logger.info(f"Loaded {filename}: {weights.told(loaded)}")
        return checkpoint

    def resume(self, filename: str | Path) -> None:
        """Resume the run that wrote a checkpoint; if the config does not train, load only the weights.

        Args:
            filename: the checkpoint, of this Runner or of MMEngine's.

        Raises:
            CheckpointError: it cannot be read, does not fit this run, or lacks something. Nothing has been loaded then.
        """
        self._resume = True  # hooks read it
        if self.train_loop is None:
            self.load_checkpoint(filename, strict=True)
            self._loaded = True
            return
        if is_folder(filename):
            checkpoint = read_folder(filename, partial(shards_by_place, self._runner))
        else:
            checkpoint = read_checkpoint(filename)
        if is_from_mmengine(checkpoint):
            checkpoint = as_own(self._runner, filename, checkpoint)
        check_training(self._runner, filename, checkpoint)
        load_training(self._runner, filename, checkpoint)
        self._loaded = True
        self.logger.info(f"Resumed {filename}: {self._runner.epoch} epochs and {self._runner.iter} iterations are done")
