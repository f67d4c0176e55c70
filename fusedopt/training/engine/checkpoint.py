"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ...messages import one_line, plain_settings
from ..errors import CheckpointError
from ..files import UNFINISHED, replace_file
from ..reading import StandIn, read_file

__all__ = [
    "CheckpointError",
    "checked_for_reading",
    "find_latest_checkpoint",
    "is_folder",
    "read_checkpoint",
    "unloadable_parts",
    "write_atomically",
    "write_checkpoint",
]

#: The file in ``work_dir`` that holds the name of the newest checkpoint.
LAST_CHECKPOINT = "last_checkpoint"

#: The file of a sharded checkpoint, which is a folder, with everything but the shards.
REST = "checkpoint.pth"
#: Suffix of a sharded checkpoint that a new one of its name is about to replace.
REPLACED = f".replaced{UNFINISHED}"

_PLAIN = frozenset({str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size})


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a file that becomes ``path`` only when all of it is on disk.

    The folder is created if needed.

    Raises:
        CheckpointError: it cannot be written; ``path`` is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError on a full disk
        raise CheckpointError(f"{path} cannot be written and is unchanged: {error}") from error


def unloadable_parts(value: Any, name: str) -> Iterator[str]:
    """The parts of ``value`` that are neither tensors nor plain, so that they would not be read back."""
    for place, kind in _unloadable(value):
        yield f"{name}{place} ({kind})"


def _unloadable(value: Any) -> Iterator[tuple[str, str]]:
    """The place and the class of each such part. Paths are only made where there is one: there may be many places."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            if type(key) not in _PLAIN:
                yield from ((f"{place} in the key {one_line(key, 100)}", kind) for place, kind in _unloadable(key))
            if type(item) not in _PLAIN:
                yield from ((f"[{key!r}]{place}", kind) for place, kind in _unloadable(item))
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            if type(item) not in _PLAIN:
                yield from ((f"[{index}]{place}", kind) for place, kind in _unloadable(item))
    elif type(value) not in _PLAIN and not isinstance(value, Tensor):
        yield "", value.name if isinstance(value, StandIn) else type(value).__name__


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint.

    Args:
        checkpoint: tensors and plain values, in dicts and lists; NumPy's numbers are written as Python's.
        path: the file.

    Raises:
        CheckpointError: something in it could not be loaded again with ``weights_only=True``, or the file cannot be
            written. ``path`` is unchanged then.
    """
    checkpoint = checked_for_reading(checkpoint, path)
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def checked_for_reading(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """``checkpoint`` with Python's numbers; CheckpointError if something in it could not be read back."""
    checkpoint = plain_settings(checkpoint)  # e.g. numbers that users put into the message hub: Note [Plain numbers]
    refused = next(unloadable_parts(checkpoint, "checkpoint"), None)
    if refused is not None:
        raise CheckpointError(
            f"{path} was not written: {refused} is neither a tensor nor a plain value, so the file could not be loaded "
            "again with weights_only=True"
        )
    return checkpoint


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory, running nothing in it; see :func:`~fusedopt.training.reading.read_file`.

    Raises:
        CheckpointError: there is no such file, it is damaged, or what it holds is not a dict.
    """
    checkpoint = read_file(path).value
    if not isinstance(checkpoint, Mapping):
        kind = checkpoint.name if isinstance(checkpoint, StandIn) else type(checkpoint).__name__
        raise CheckpointError(f"{path}: a checkpoint holds a dict, this file a {kind}")
    return dict(checkpoint)


def is_folder(path: str | Path) -> bool:
    """Whether there is a sharded checkpoint at ``path``, see Note [Sharded checkpoints]."""
    return os.path.isfile(os.path.join(path, REST))


def find_latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest checkpoint in ``work_dir``, or None if none was written. MMEngine's files are understood too.

    If the folder has been moved, the checkpoint is looked for where it is now.

    Raises:
        CheckpointError: the file named as the newest does not exist.
    """
    pointer = Path(work_dir) / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    written = Path(os.fsdecode(pointer.read_bytes()).strip())
    places = [Path(work_dir) / written, Path(work_dir) / written.name]
    if written.name != str(written):  # MMEngine may write a path that is relative to the current folder
        places.insert(0, written)
    # A process may have been killed when it had moved a folder away, and not yet put the new one in its place.
    for path in [*places, *(path.with_name(path.name + REPLACED) for path in places if path.name)]:
        if os.path.isfile(path) or is_folder(path):  # False for what can be no name, too
            return path
    raise CheckpointError(f"{pointer} names {written}, which does not exist")
