"""Checkpoints that are folders: each process writes its shards, through torch.distributed.checkpoint.

Note [Sharded checkpoints]: a folder holds what ``torch.distributed.checkpoint`` writes, and ``checkpoint.pth``: the
checkpoint as in a single file, with None in the place of each DTensor, and an entry ``shards`` that says which parts of
it are where. Reading uses that entry, not torch's ``.metadata``, which is a pickle that could run anything. All of it
is written under a name that ends in ``.unfinished``, and the folder gets its own name when every process is done.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...messages import is_dtensor, one_line
from ..errors import CheckpointError
from ..files import UNFINISHED
from ..reading import read_file
from . import distributed
from .checkpoint import REPLACED, REST, checked_for_reading

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["read_folder", "remove_checkpoint", "remove_left_over", "write_folder"]

Place = tuple[Any, ...]


def write_folder(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint as a folder, whole or not at all. All processes must call this.

    Args:
        checkpoint: DTensors, each process with its shards; everything else is the main process's: tensors and plain
            values, in dicts and lists, which can be read back.
        path: the folder. If it exists, it is replaced at the end.

    Raises:
        CheckpointError: it cannot be written. ``path`` is unchanged then.
    """
    shards: dict[str, Tensor] = {}
    places: dict[str, Place] = {}
    rest = _without_shards(checkpoint, (), shards, places)
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(path.name + UNFINISHED)
    from torch.distributed import checkpoint as dcp

    def start() -> None:
        rest.update(checked_for_reading(rest, path))
        remove_checkpoint(unfinished)
        unfinished.mkdir(parents=True)

    _by_main_process(start, path, unfinished)
    try:
        with _quiet():
            metadata = dcp.save(shards, storage_writer=dcp.FileSystemWriter(str(unfinished)))
    except (Exception, dcp.CheckpointException) as error:  # of this process or of another, which may have been killed
        if distributed.is_main_process():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"{path} cannot be written and is unchanged: {one_line(error, 300)}") from error
    _by_main_process(
        lambda: _finish({**rest, "shards": _described(metadata, places)}, unfinished, path), path, unfinished
    )


def _by_main_process(step: Callable[[], object], path: Path, unfinished: Path) -> None:
    """Call ``step`` in the main process. If it fails, what was written is removed and all processes raise."""
    told = None
    if distributed.is_main_process():
        try:
            step()
        except Exception as error:  # the others wait to be told
            shutil.rmtree(unfinished, ignore_errors=True)
            told = str(error) if isinstance(error, CheckpointError) else f"{path} cannot be written: {error}"
    told = distributed.broadcast(told)
    if told is not None:
        raise CheckpointError(told)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that torch.distributed.checkpoint gives in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _finish(rest: Mapping[str, Any], unfinished: Path, path: Path) -> None:
    """Write what is left, and give the folder its name."""
    with open(unfinished / REST, "wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(unfinished)
    replaced = path.with_name(path.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    try:
        os.replace(unfinished, path)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise
    _flush_folder(path.parent)
    remove_checkpoint(replaced)


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if there is one; never only a part of a folder that keeps its name."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(UNFINISHED):
        outdated = path.with_name(f"{path.name}.removed{UNFINISHED}")
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(path, outdated)
        path = outdated
    shutil.rmtree(path, ignore_errors=True)


def remove_left_over(path: Path) -> None:
    """Remove what a killed process left with a name in ``.unfinished``, or undo half a replacement."""
    original = path.with_name(path.name.removesuffix(REPLACED))
    if path.name.endswith(REPLACED) and not original.exists():
        os.replace(path, original)
    else:
        remove_checkpoint(path)


def _without_shards(value: Any, place: Place, shards: dict[str, Tensor], places: dict[str, Place]) -> Any:
    """A copy of ``value`` with None for each DTensor, which is put into ``shards`` under a name made of its place."""
    if is_dtensor(value):
        name = "/".join(map(str, place))
        while name in shards:  # of the keys 1 and '1'
            name += "'"
        shards[name], places[name] = value.detach(), place
        return None
    if isinstance(value, Mapping):
        copied: Any = copy(value)
        copied.update({key: _without_shards(item, (*place, key), shards, places) for key, item in value.items()})
        return copied
    if type(value) is list:
        return [_without_shards(item, (*place, index), shards, places) for index, item in enumerate(value)]
    return value


def _described(metadata: Metadata, places: Mapping[str, Place]) -> dict[str, Any]:
    """What torch.distributed.checkpoint says of each shard, in plain values."""
    described: dict[str, Any] = {}
    for name, place in places.items():
        noted: Any = metadata.state_dict_metadata[name]
        shape, dtype = list(noted.size), noted.properties.dtype
        described[name] = {"place": list(place), "shape": shape, "dtype": dtype, "chunks": []}
    for index, info in metadata.storage_data.items():
        of: Any = metadata.state_dict_metadata[index.fqn]
        size = next(list(chunk.sizes) for chunk in of.chunks if chunk.offsets == index.offset)
        file = {"file": info.relative_path, "begin": info.offset, "length": info.length}
        described[index.fqn]["chunks"].append({"offset": list(index.offset), "size": size, **file})
    return described


def read_folder(
    path: str | Path,
    like: Callable[[dict[str, Any]], Mapping[Place, Tensor]] | None = None,
    keys: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read a sharded checkpoint, running nothing in it; each process reads what it needs, without communication.

    Args:
        path: the folder.
        like: gives, for the checkpoint with None in place of shards, DTensors by place: such a tensor becomes a
            DTensor that is sharded like it, if its shape is the same. All others are whole, on the CPU.
        keys: the top-level keys whose shards are read; the others stay None. All by default.

    Raises:
        CheckpointError: there is no such folder, or it is damaged or of another kind.
    """
    from torch.distributed.checkpoint import CheckpointException

    path = Path(path)
    rest = read_file(path / REST).value
    try:
        shards = rest.pop("shards")
        wanted = {name: each for name, each in shards.items() if keys is None or each["place"][0] in keys}
        metadata = _metadata(wanted)
        likes = {} if like is None else like(rest)
        tensors = {}
        for name, each in wanted.items():
            partner = likes.get(tuple(each["place"]))
            if partner is not None and list(partner.shape) == each["shape"]:
                tensors[name] = torch.empty_like(partner, dtype=each["dtype"], requires_grad=False)
            else:
                tensors[name] = torch.empty(each["shape"], dtype=each["dtype"])
        _load(path, metadata, tensors)
        for name, each in wanted.items():
            _put(rest, each["place"], tensors[name])
    except (Exception, CheckpointException) as error:  # a file with arbitrary content can raise anything
        told = str(error) if isinstance(error, CheckpointError) else f"({type(error).__name__}: {error})"
        raise CheckpointError(f"{path}: truncated or damaged: {one_line(told, 300)}") from error
    return dict(rest)


def _metadata(shards: Mapping[str, Any]) -> Metadata:
    """What torch.distributed.checkpoint needs to know of ``shards``, checked.

    Raises:
        CheckpointError: the chunks of a tensor are not all of it.
    """
    from torch.distributed.checkpoint import metadata as kinds
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tensors: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for name, each in shards.items():
        chunks = each["chunks"]
        inside = all(
            begin >= 0 and begin + size <= most
            for chunk in chunks
            for begin, size, most in zip(chunk["offset"], chunk["size"], each["shape"], strict=True)
        )
        elements = sum(math.prod(chunk["size"]) for chunk in chunks)
        filled = [tuple(chunk["offset"]) for chunk in chunks if math.prod(chunk["size"])]
        if not inside or elements != math.prod(each["shape"]) or len(set(filled)) < len(filled):
            raise CheckpointError(f"the chunks of {name!r} do not make up its shape {tuple(each['shape'])}")
        tensors[name] = kinds.TensorStorageMetadata(
            kinds.TensorProperties(dtype=each["dtype"]),
            torch.Size(each["shape"]),
            [kinds.ChunkStorageMetadata(torch.Size(chunk["offset"]), torch.Size(chunk["size"])) for chunk in chunks],
        )
        for index, chunk in enumerate(chunks):
            if Path(chunk["file"]).name != chunk["file"]:
                raise CheckpointError(f"{name!r} is in {chunk['file']!r}, which is not a file of the folder")
            key = kinds.MetadataIndex(name, chunk["offset"], index)
            stored[key] = _StorageInfo(chunk["file"], chunk["begin"], chunk["length"])
    return kinds.Metadata(tensors, storage_data=stored)


def _load(path: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` from the files of the folder."""
    from torch.distributed import checkpoint as dcp

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return metadata

    with _quiet():
        dcp.load(tensors, storage_reader=Reader(str(path)), no_dist=True)


def _put(held: Any, place: list[Any], tensor: Tensor) -> None:
    *outer, last = place
    for key in outer:
        held = held[key]
    if held[last] is not None:
        raise CheckpointError(f"there is a value in the place {place} of a shard")
    held[last] = tensor
