"""Any bytes as a checkpoint: read, or refused in one line; nothing runs, and memory and time stay bounded."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from fusedopt.training.engine.checkpoint import unloadable_parts
from fusedopt.training.errors import CheckpointError
from fusedopt.training.reading import find_weights, read_file

from .watching import nothing_runs


def seeds() -> Iterator[bytes]:
    """Files of each kind. The first byte says whether a pickle follows, or a whole file."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    weights = model.state_dict()
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=True)
    values = [
        weights,
        {"state_dict": weights, "meta": argparse.Namespace(epoch=3), "optimizer": {"state": {0: {"step": 1.0}}}},
        {"model": model},
        {"a": torch.ones(2, dtype=torch.complex64).conj(), "b": sparse, "c": torch.tensor([1, 2], dtype=torch.uint16)},
        [{1, 2}, frozenset([3]), b"bytes", bytearray(b"more"), 1 + 2j, 2**70, (), None, True, 1.5, torch.Size([1])],
    ]
    for value in values:
        for new in (True, False):
            for protocol in (2, 4):
                file = io.BytesIO()
                try:
                    torch.save(value, file, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
                except RuntimeError:  # the old format has no uint16
                    continue
                yield b"f" + file.getvalue()
                if new:
                    archive = zipfile.ZipFile(file)
                    yield b"p" + archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    yield b"f" + struct.pack("<Q", 59) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}     ' + bytes(4)
    yield b"p" + pickle.dumps([1, {"a": 2.5}])


def run(data: bytes, folder: Path) -> None:
    """Read ``data`` as a file, or as the pickle in a file of ``torch.save``."""
    path = folder / "fuzzed.pth"
    if data[:1] == b"p":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data[1:])
            for key in range(6):
                archive.writestr(f"archive/data/{key}", bytes(64))
    else:
        path.write_bytes(data[1:])
    try:
        with nothing_runs():
            contents = read_file(path)
            list(unloadable_parts(contents.value, "checkpoint"))
            weights = find_weights(contents)
            told = weights.told()
        assert "\n" not in told and told.isprintable(), told
        for value in weights.state_dict.values():
            if isinstance(value, torch.Tensor) and value.numel() < 1e6:
                value.detach().to_dense().clone()  # all of it is there
    except CheckpointError as error:
        message = str(error)
    else:
        return
    assert message.startswith(f"{path}") and "\n" not in message and message.isprintable(), message
