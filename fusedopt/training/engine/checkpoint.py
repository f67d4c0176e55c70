"""Checkpoint files: written whole or not at all, read without running code."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from ...messages import plain_settings
from ..errors import CheckpointError
from ..unwrapping import bare_state_dict

__all__ = [
    "CheckpointError",
    "check_fit",
    "find_latest_checkpoint",
    "read_checkpoint",
    "unloadable_parts",
    "write_atomically",
    "write_checkpoint",
]

#: The file in ``work_dir`` that holds the name of the newest checkpoint.
LAST_CHECKPOINT = "last_checkpoint"

#: Suffix of a file that is being written; a leftover one is from a killed process.
UNFINISHED = ".unfinished"

_ESCAPES = re.compile(r"\x1b\[[\d;]*m")

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a file that becomes ``path`` only when all of it is on disk.

    The folder is created if needed.

    Raises:
        CheckpointError: it cannot be written; ``path`` is unchanged.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a disk that became read-only
            unfinished.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch's writer raises a RuntimeError on a full disk
            raise CheckpointError(f"{path} cannot be written and is unchanged: {error}") from error
        raise


def unloadable_parts(value: Any, name: str) -> Iterator[str]:
    """The parts of ``value`` that ``torch.load(weights_only=True)`` rejects."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, item in value.items():
            yield from unloadable_parts(key, f"the key {key!r} of {name}")
            yield from unloadable_parts(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple, set):
        for index, item in enumerate(value):
            yield from unloadable_parts(item, f"{name}[{index}]")
    elif type(value) not in (*_PLAIN, *torch.serialization.get_safe_globals()) and not isinstance(value, Tensor):
        yield f"{name} ({type(value).__name__})"


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint.

    Args:
        checkpoint: tensors and plain values, in dicts and lists; NumPy's numbers are written as Python's.
        path: the file.

    Raises:
        CheckpointError: something in it could not be loaded again with ``weights_only=True``, or the file cannot be
            written. ``path`` is unchanged then.
    """
    checkpoint = plain_settings(checkpoint)  # e.g. numbers that users put into the message hub: Note [Plain numbers]
    refused = next(unloadable_parts(checkpoint, "checkpoint"), None)
    if refused is not None:
        raise CheckpointError(
            f"{path} was not written: {refused} is neither a tensor nor a plain value, so the file could not be loaded "
            "again with weights_only=True"
        )
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory, with ``weights_only=True``.

    Raises:
        CheckpointError: there is no such file, or it is not a checkpoint, is truncated, or holds more than tensors and
            plain values.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file with arbitrary content can raise anything
        reason = _ESCAPES.sub("", str(error)).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path}: truncated, not written by torch.save, or holding more than tensors and plain values "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path}: a checkpoint holds a dict, this file a {type(checkpoint).__name__}")
    return dict(checkpoint)


def find_latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The newest checkpoint in ``work_dir``, or None if none was written.

    Raises:
        CheckpointError: the file named as the newest does not exist.
    """
    pointer = Path(work_dir) / LAST_CHECKPOINT
    if not pointer.is_file():
        return None
    path = Path(work_dir) / os.fsdecode(pointer.read_bytes()).strip()
    if not os.path.isfile(path):  # False for what can be no name, too
        raise CheckpointError(f"{pointer} names {path}, which does not exist")
    return path


def check_fit(state_dict: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Why ``state_dict`` does not fit ``model``: a clause for each kind of difference."""
    own = bare_state_dict(model)
    reshaped = [
        f"{name} has {_shape(state_dict[name])} instead of {_shape(value)}"
        for name, value in own.items()
        if name in state_dict and isinstance(value, Tensor) and _shape(state_dict[name]) != _shape(value)
    ]
    missing = [name for name in own if name not in state_dict]
    unknown = [name for name in state_dict if name not in own]
    clauses = [f"it lacks {_some(missing)}"] if missing else []
    clauses += [f"it has {_some(unknown)}, which the model does not have"] if unknown else []
    return clauses + ([_some(reshaped)] if reshaped else [])


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
