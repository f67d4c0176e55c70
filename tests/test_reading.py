"""Files from anywhere: everything that torch.save writes comes back, and nothing in a file is run."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import io
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz.watching import nothing_runs
from planted import FUNCTIONS, PICKLES, archive, calls, old_file
from torch import nn

from fusedopt.training.engine.checkpoint import unloadable_parts
from fusedopt.training.errors import CheckpointError
from fusedopt.training.reading import StandIn, find_weights, read_file

BASE = torch.randn(4, 5)
TENSORS = {
    "a state dict": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict(),
    "views": [BASE, BASE.t(), BASE[1], BASE[::2, 1:3], torch.ones(1).expand(3, 3)],
    "dtypes": [
        torch.arange(5).to(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.complex64,
        )
    ],
    "shapes": [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.zeros(2, 0),
        torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ],
    "conjugates": [torch.randn(3, dtype=torch.complex128).conj(), torch.randn(3, dtype=torch.complex64).conj().imag],
    "parameters": [
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.arange(3), requires_grad=False),
        torch.randn(2).requires_grad_(),
    ],
    "sparse": torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 1]]), torch.ones(2), (3, 4), check_invariants=True),
}
PLAIN = {
    "numbers": [0, -1, 255, 256, 65536, 2**31, 2**63, -(2**63), 2**100, 1.5, float("inf"), 1 + 2j, True, False, None],
    "text and bytes": ["", "ä\u2028\n", "x" * 300, b"", b"\xff\x00", b"x" * 300, bytearray(b"abc")],
    "containers": [
        [],
        {},
        (),
        [[]],
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {1, 2},
        frozenset([1, (2, 3)]),
        {1: {2: 3}},
    ],
    "dicts": [
        collections.OrderedDict(b=1, a=2),
        collections.Counter("aab"),
        {(1, "a"): None, 1.5: 0, True: 1, None: 2},
    ],
    "of torch": [torch.float32, torch.bfloat16, torch.device("cuda:1"), torch.device("cpu"), torch.Size([1, 2])],
}
FORMATS = [(new, protocol) for new in (True, False) for protocol in (1, 2, 3, 4, 5)]


def saved(value: Any, path: Path, new: bool = True, protocol: int = 2) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
    return path


def assert_equal(read: Any, expected: Any) -> None:
    assert type(read) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (read.dtype, read.shape, read.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad)
        assert read.layout == expected.layout
        if read.layout == torch.strided:
            assert read.stride() == expected.stride() and read.is_conj() == expected.is_conj()
        assert torch.equal(read.detach().to_dense(), expected.detach().to_dense())
    elif isinstance(expected, (list, tuple)):
        assert len(read) == len(expected)
        for pair in zip(read, expected, strict=True):
            assert_equal(*pair)
    elif isinstance(expected, dict):
        assert list(read) == list(expected) and getattr(read, "_metadata", 0) == getattr(expected, "_metadata", 0)
        assert_equal(list(read.values()), list(expected.values()))
    else:
        assert read == expected


@pytest.mark.parametrize(("new", "protocol"), FORMATS)
@pytest.mark.parametrize("name", [*TENSORS, *PLAIN])
def test_what_torch_saves_comes_back(name, new, protocol, tmp_path):
    value = {**TENSORS, **PLAIN}[name]
    contents = read_file(saved(value, tmp_path / "file.pth", new, protocol))
    assert_equal(contents.value, value)
    assert not contents.not_built


@pytest.mark.parametrize("new", [True, False])
def test_tensors_share_memory_as_before(new, tmp_path):
    whole, flipped, row, *_ = read_file(saved(TENSORS["views"], tmp_path / "file.pth", new)).value
    whole[1, 2] = 7
    assert flipped[2, 1] == row[2] == 7


def test_dtypes_without_a_class_of_storages(tmp_path):
    value = [torch.tensor([1, 2], dtype=torch.uint16), torch.ones(3).to(torch.float8_e4m3fn)]
    for read, expected in zip(read_file(saved(value, tmp_path / "file.pth")).value, value, strict=True):
        assert read.dtype == expected.dtype and torch.equal(read.view(torch.uint8), expected.view(torch.uint8))


def test_memory_is_aligned_as_torch_aligns_it(tmp_path):
    read = read_file(saved([torch.ones(100) for _ in range(5)], tmp_path / "file.pth")).value
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read)


@pytest.mark.parametrize("new", [True, False])
def test_numbers_of_numpy_are_numbers(new, tmp_path):
    value = [np.float64(2.5), np.float32(1.5), np.int64(-7), np.uint8(200), np.bool_(True), np.float16(0.5)]
    value.append(np.array(3, ">i4")[()])
    read = read_file(saved(value, tmp_path / "file.pth", new)).value
    assert read == [2.5, 1.5, -7, 200, True, 0.5, 3]
    assert [type(each) for each in read] == [float, float, int, int, bool, float, int]


@pytest.mark.parametrize(("new", "protocol"), FORMATS)
def test_objects_become_stand_ins(new, protocol, tmp_path):
    value = {
        "args": argparse.Namespace(lr=0.1),
        "when": datetime.datetime(2026, 1, 2),
        "default": collections.defaultdict(list, a=[1]),
        "array": np.arange(3),
        "path": Path("a"),
        "weight": torch.ones(2),
    }
    contents = read_file(saved(value, tmp_path / "file.pth", new, protocol))
    read = contents.value
    assert type(read["default"]) is dict and read["default"] == {"a": [1]}
    assert all(type(read[key]) is StandIn for key in ("args", "when", "array", "path"))
    assert read["args"].state == {"lr": 0.1}
    assert torch.equal(read["weight"], value["weight"])
    assert {"argparse.Namespace", "datetime.datetime"} <= set(contents.not_built)
    assert find_weights(contents).left_out


def test_tensors_of_other_kinds_are_named_and_left_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    weights = {"a": torch.ones(2), "q": quantized, "m": torch.empty(2, device="meta")}
    found = find_weights(read_file(saved(weights, tmp_path / "file.pth")))
    assert list(found.state_dict) == ["a"]
    assert "q (torch._utils._rebuild_qtensor), m (torch._utils._rebuild_meta_tensor_no_storage)" in found.told()


def test_a_tensor_with_attributes_is_the_tensor(tmp_path):
    value = torch.randn(3)
    value.note = "mine"
    assert_equal(read_file(saved(value, tmp_path / "file.pth")).value, torch.Tensor(value))


def test_bytes_in_the_other_order(tmp_path):
    value = torch.tensor([1.0, 2.5])
    data = bytearray(saved(value, tmp_path / "file.pth").read_bytes())
    swapped = torch.tensor([1.0, 2.5]).numpy().byteswap().tobytes()
    data = data.replace(value.numpy().tobytes(), swapped).replace(b"little", b"big")
    with zipfile.ZipFile(tmp_path / "file.pth") as archived:
        entries = {info.filename.partition("/")[2]: archived.read(info) for info in archived.infolist()}
    (tmp_path / "big.pth").write_bytes(
        archive(entries.pop("data.pkl"), **{**entries, "data/0": swapped, "byteorder": b"big"})
    )
    assert torch.equal(read_file(tmp_path / "big.pth").value, value)


def harmless(data: bytes, path: Path) -> str:
    """Read ``data``: it is refused in a line that names the file, or its weights are; nothing has run."""
    path.write_bytes(data)
    try:
        with nothing_runs():
            contents = read_file(path)
            list(unloadable_parts(contents.value, "checkpoint"))
            told = find_weights(contents).told()
    except CheckpointError as error:
        told = str(error)
    assert told.isprintable() and len(told) < 2000, told
    assert not Path("ran").exists()
    return told


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder; what a pickle runs would leave a file there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", [archive, old_file], ids=["archive", "old file"])
def test_a_hundred_planted_pickles_run_nothing(make, here):
    read = [name for name, content in PICKLES.items() if harmless(make(content), here / "file.pth") == "1 weights"]
    assert read == ["a state of a tensor"]
    assert len(PICKLES) >= 100


def test_every_function_through_every_instruction_runs_nothing(here):
    count = 0
    for path, arguments in FUNCTIONS.items():
        for content in calls(path, arguments).values():
            told = harmless(archive(content), here / "file.pth")
            assert told.startswith(f"{here / 'file.pth'}: it ") or " has no weights: it holds a " in told, told
            count += 1
    assert count >= 700


def test_registered_extensions_are_not_called(here):
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        told = harmless(archive(b"\x80\x02\x82\xf0X\x09\x00\x00\x00touch ran\x85R."), here / "file.pth")
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
    assert "copyreg.extension 240" in told


def test_a_cut_file(here):
    for new in (True, False):
        whole = saved(TENSORS["a state dict"], here / "whole.pth", new).read_bytes()
        for size in (*range(0, len(whole), 97), len(whole) - 1):
            assert "file.pth: " in harmless(whole[:size], here / "file.pth")


def edited(data: bytes, before: bytes, after: bytes) -> bytes:
    assert before in data
    return data.replace(before, after)


def test_archives_that_are_not_right(here):
    whole = archive(PICKLES["more elements than the storage"])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as written:
        written.writestr("archive/data.pkl", bytes(10**7))
    twice = archive(b"}.") + archive(b"}.")
    fine = archive(PICKLES["a size that overflows"])
    fine_bytes = saved({"w": torch.ones(4)}, here / "fine.pth").read_bytes()
    size = struct.pack("<II", 16, 16)
    cases = {
        "compressed": (packed.getvalue(), "compressed"),
        "no pickle": (archive(b"}.", **{"data.pkl": None}), "has not written"),
        "two pickles": (archive(b"}.", **{"more/data.pkl": b"}."}), "has not written"),
        "TorchScript": (archive(b"}.", **{"constants.pkl": b"."}), "TorchScript"),
        "no storage": (archive(PICKLES["more elements than the storage"], **{"data/0": None}), "lacks the entry"),
        "a storage of gigabytes": (edited(fine_bytes, size, struct.pack("<II", 2**31, 2**31)), "leads elsewhere"),
        "an entry elsewhere": (edited(whole, b"PK\x01\x02", b"PK\x01\x03"), "truncated or damaged"),
        "an encrypted entry": (b"".join((whole[:6], b"\x01", whole[7:])), "beyond its storage"),
        "a pickle in a zip": (twice, "no weights"),
        "overflowing": (fine, "truncated or damaged"),
    }
    for name, (data, expected) in cases.items():
        told = harmless(data, here / "file.pth")
        assert expected in told, (name, told)


def test_what_is_no_file(here):
    (here / "folder").mkdir()
    for name, message in (("nowhere.pth", "there is no such checkpoint"), ("folder", "is not a file")):
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            read_file(here / name)
    with pytest.raises(CheckpointError, match="is not a file"):
        read_file("/dev/zero")


def test_other_files(here):
    for data in (b"", b"text", b"\x80\x04K\x01.", bytes(100), b"{}", struct.pack("<Q", 5) + b"{" * 20):
        assert harmless(data, here / "file.pth").startswith(f"{here / 'file.pth'}: ")
