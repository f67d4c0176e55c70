"""The files of ``torch.save``, old and new, and of safetensors."""

from __future__ import annotations

import ctypes
import io
import struct
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ...messages import MissingExtraError, one_line, require
from ..errors import CheckpointError
from .bounds import Budget, check_extent
from .building import Building, Storage, StorageType
from .machine import Machine
from .standins import StandIn

__all__ = ["Contents", "read_file"]

#: The first number in a file that torch wrote before version 1.6, or with ``_use_new_zipfile_serialization=False``.
_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        path: the file.
        value: tensors on the CPU, plain values and containers, and stand-ins.
        not_built: how often each class or function occurs for which ``value`` has only a :class:`StandIn`.
    """

    path: Path
    value: Any
    not_built: Counter[str] = field(default_factory=Counter)


def read_file(path: str | Path) -> Contents:
    """Read a file of ``torch.save`` or safetensors without running anything in it; see Note [Reading runs nothing].

    Tensors are dense or sparse (COO) and on the CPU; tensors of other kinds are stand-ins.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another kind; the message is one line.
        MissingExtraError: the package safetensors is not installed.
    """
    path = Path(path)
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "there is no such checkpoint"
            raise CheckpointError(what)
        with open(path, "rb") as file:
            return _read(file, path)
    except MissingExtraError:
        raise
    except Exception as error:  # a file with arbitrary content can raise anything
        reason = str(error)
        if isinstance(error, OSError) and error.strerror:
            reason = f"cannot be read: {error.strerror}"
        elif not isinstance(error, CheckpointError):
            reason = f"truncated or damaged ({type(error).__name__}: {reason})"
        raise CheckpointError(f"{path}: {one_line(reason, 300)}") from error


def _read(file: IO[bytes], path: Path) -> Contents:
    start = file.read(9)
    file.seek(0)
    if start[:4] == b"PK\x03\x04":
        contents = _Archive(file, path).read()
    elif start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
        contents = Contents(path, require("safetensors.torch", "engine").load_file(path))
    else:
        contents = _OldFile(file, path).read()
    check_extent(contents.value)
    return contents


class _File:
    """A file whose storages are together not larger than it."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.size = self._left = path.stat().st_size
        self.storages: dict[str, Storage] = {}
        self.building = Building(self.stored, Budget(self.size))
        self.machine = Machine(self.building)

    def allocated(self, count: int) -> torch.UntypedStorage:
        """Memory for ``count`` bytes of the file."""
        if not 0 <= count <= self._left:
            raise CheckpointError(f"truncated or damaged: it claims more tensors than its {self.size:,} bytes hold")
        self._left -= count
        return torch.empty(count, dtype=torch.uint8, device="cpu").untyped_storage()

    def fill(self, storage: torch.UntypedStorage) -> None:
        """Read a storage at the file's position."""
        count = storage.nbytes()
        if count and self.file.readinto((ctypes.c_char * count).from_address(storage.data_ptr())) != count:  # type: ignore[attr-defined]
            raise CheckpointError("truncated")

    def stored(self, reference: Any) -> Storage | StandIn:
        """The storage that a pickle refers to."""
        if not isinstance(reference, tuple) or len(reference) < 2:
            raise CheckpointError("it refers to something outside the file")
        kind, what, *about = reference
        if kind in ("module", b"module") and isinstance(what, StandIn):
            return what  # old files name a module's class like this, beside its source
        if kind not in ("storage", b"storage") or not isinstance(what, StorageType) or len(about) < 3:
            raise CheckpointError("it refers to something outside the file")
        key, _, count, *view = about
        if not isinstance(key, str) or type(count) is not int or count < 0:
            raise CheckpointError("it refers to a storage by something other than a key and a size")
        return self.storage(what, key, count, next(iter(view), None))

    def storage(self, storage_type: StorageType, key: str, count: int, view: Any) -> Storage:
        """The storage ``key``, with ``count`` elements."""
        raise NotImplementedError


class _Archive(_File):
    """A zip archive, as torch has written it since version 1.6."""

    def __init__(self, file: IO[bytes], path: Path):
        super().__init__(file, path)
        self.entries = {entry.filename: entry for entry in zipfile.ZipFile(file).infolist()}
        folders = [name.removesuffix("data.pkl") for name in self.entries if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise CheckpointError("a zip archive that torch.save has not written")
        self.folder = folders[0]
        if f"{self.folder}constants.pkl" in self.entries:
            raise CheckpointError("a TorchScript archive, which holds code; save its state_dict() with torch.save")
        order = self.content("byteorder") if f"{self.folder}byteorder" in self.entries else b"little"
        self.swapped = order != sys.byteorder.encode()

    def find(self, name: str) -> int:
        """The size of an entry, at whose start the file is positioned then."""
        entry = self.entries.get(self.folder + name)
        if entry is None:
            raise CheckpointError(f"truncated or damaged: it lacks the entry {name!r}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise CheckpointError("a zip archive with compressed entries, which torch.save does not write")
        self.file.seek(entry.header_offset)
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size))
        self.file.seek(name_length + extra_length, io.SEEK_CUR)
        if signature != b"PK\x03\x04" or self.file.tell() + entry.file_size > self.size:
            raise CheckpointError("truncated or damaged: its list of entries leads elsewhere")
        return entry.file_size

    def content(self, name: str) -> bytes:
        """The bytes of an entry."""
        return self.file.read(self.find(name))

    def read(self) -> Contents:
        """Everything in the archive."""
        value = self.machine.run(io.BytesIO(self.content("data.pkl")))
        self.building.finish()
        return Contents(self.path, value, self.machine.not_built)

    def storage(self, storage_type: StorageType, key: str, count: int, view: Any) -> Storage:
        if key not in self.storages:
            size = self.find(f"data/{key}")
            storage = self.allocated(size)
            self.fill(storage)
            if self.swapped:
                if storage_type.dtype is None:
                    raise CheckpointError("written on a machine with another byte order")
                storage.byteswap(storage_type.dtype)
            self.storages[key] = Storage(storage, storage_type.dtype)
        found = self.storages[key]
        if count * storage_type.itemsize > found.bytes.nbytes():
            raise CheckpointError(f"truncated or damaged: storage {key!r} is smaller than what it should hold")
        return found


class _OldFile(_File):
    """The format before torch 1.6: pickles one after the other, then the storages."""

    def read(self) -> Contents:
        """Everything in the file."""
        rest: Any = _Rest(self.file, self.size)
        try:
            number = self.machine.run(rest)
        except Exception as error:
            raise CheckpointError("neither a file of torch.save nor of safetensors") from error
        if number != _MAGIC:
            raise CheckpointError("a pickle that torch.save has not written")
        self.machine.run(rest)  # the version of the format, 1001 ever since
        if self.machine.run(rest).get("little_endian", True) != (sys.byteorder == "little"):
            raise CheckpointError("written on a machine with another byte order")
        value = self.machine.run(rest)
        roots = dict(self.storages)
        for key in self.machine.run(rest):
            storage = roots.pop(key, None)
            if storage is None:
                raise CheckpointError(f"truncated or damaged: it holds a storage {key!r} that nothing refers to")
            (count,) = struct.unpack("<q", self.file.read(8))
            if count * StorageType(storage.dtype).itemsize != storage.bytes.nbytes():
                raise CheckpointError(f"truncated or damaged: storage {key!r} has another size")
            self.fill(storage.bytes)
        if roots:
            raise CheckpointError(f"truncated or damaged: it lacks the storage {next(iter(roots))!r}")
        self.building.finish()
        return Contents(self.path, value, self.machine.not_built)

    def storage(self, storage_type: StorageType, key: str, count: int, view: Any) -> Storage:
        size = count * storage_type.itemsize
        if key not in self.storages:
            self.storages[key] = Storage(self.allocated(size), storage_type.dtype)
        found = self.storages[key]
        if size > found.bytes.nbytes() or storage_type.dtype != found.dtype:
            raise CheckpointError(f"truncated or damaged: storage {key!r} is not what it should be")
        if view is None:
            return found
        _, offset, length = view
        if not all(type(each) is int and each >= 0 for each in (offset, length)) or offset + length > count:
            raise CheckpointError("truncated or damaged: a part of a storage reaches beyond it")
        size = storage_type.itemsize
        return Storage(found.bytes[offset * size : (offset + length) * size], found.dtype)


class _Rest:
    """A file of which at most what is left of it is read, whatever length a pickle claims."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        return self._file.read(count if count < 2**16 else min(count, self._size - self._file.tell()))
