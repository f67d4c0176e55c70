"""Files from anywhere: everything that torch.save writes comes back, and nothing in a file is run."""

from __future__ import annotations

import argparse
import collections
import copy
import copyreg
import datetime
import io
import itertools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import config
from fuzz.watching import nothing_runs
from planted import FUNCTIONS, PICKLES, archive, calls, old_file
from torch import nn

from fusedopt.cli import main
from fusedopt.training.engine import Runner
from fusedopt.training.engine.checkpoint import unloadable_parts
from fusedopt.training.errors import CheckpointError
from fusedopt.training.reading import StandIn, find_weights, read_file

BASE = torch.randn(4, 5)


def sparse_tensor() -> torch.Tensor:
    with warnings.catch_warnings():
        # torch 2.11 says so even if it was told whether to check.
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        return torch.sparse_coo_tensor(torch.tensor([[0, 2], [1, 1]]), torch.ones(2), (3, 4), check_invariants=True)


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
    "sparse": sparse_tensor(),
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


def entries_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archived:
        return {entry.filename.partition("/")[2]: archived.read(entry) for entry in archived.infolist()}


def test_bytes_in_the_other_order(tmp_path):
    value = torch.tensor([1.0, 2.5])
    entries = entries_of(saved(value, tmp_path / "file.pth"))
    entries["data/0"] = value.numpy().byteswap().tobytes()
    entries["byteorder"] = b"big"
    (tmp_path / "big.pth").write_bytes(archive(entries.pop("data.pkl"), **entries))
    assert torch.equal(read_file(tmp_path / "big.pth").value, value)
    entries = entries_of(saved(torch.tensor([1, 2], dtype=torch.uint16), tmp_path / "file.pth"))
    (tmp_path / "big.pth").write_bytes(archive(entries.pop("data.pkl"), **{**entries, "byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="written on a machine with another byte order"):
        read_file(tmp_path / "big.pth")


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("new", [True, False])
def test_whatever_the_default_device_is(new, device, tmp_path):
    path = saved(TENSORS["a state dict"], tmp_path / "file.pth", new)
    with torch.device(device):
        assert_equal(read_file(path).value, TENSORS["a state dict"])


@pytest.mark.parametrize("new", [True, False])
def test_indices_of_sparse_tensors_are_checked(new, tmp_path):
    for indices, message in (([[0, 9]], "size is inconsistent with indices"), ([[2, 0]], "indices are not in order")):
        value = torch.sparse_coo_tensor(torch.tensor(indices), torch.ones(2), (3,), check_invariants=False)
        value._coalesced_(True)
        with pytest.raises(CheckpointError, match=message):
            read_file(saved(value, tmp_path / "file.pth", new))
    value = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.ones(2), (3,), check_invariants=True).coalesce()
    assert read_file(saved(value, tmp_path / "file.pth", new)).value.is_coalesced()


def test_a_sparse_tensor_larger_than_its_file_is_not_built(tmp_path):
    value = torch.sparse_coo_tensor(
        torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**30), torch.ones(1).expand(2**30), (3,), check_invariants=False
    )
    assert type(read_file(saved(value, tmp_path / "file.pth")).value) is StandIn


def test_only_versions_of_a_state_dict_are_read(tmp_path):
    weights = nn.BatchNorm1d(2).state_dict()
    weights._metadata = {
        "": {"version": 2, "assign_to_params_buffers": True},
        5: {"version": 1},
        "a": 3,
        "b": {"version": "x"},
    }
    assert read_file(saved(weights, tmp_path / "file.pth")).value._metadata == {"": {"version": 2}}


def legacy(reference: bytes, count: int = 4) -> bytes:
    """An old file whose value is a storage, in which there are ``count`` numbers."""
    data = old_file(b"\x80\x02ctorch\nFloatStorage\n0(X\x07\x00\x00\x00storage" + reference + b"tQ.")
    return data[:-24] + struct.pack("<q", count) + bytes(16)


@pytest.mark.parametrize(
    ("end", "count", "message"),
    [
        (b"K\x04(X\x01\x00\x00\x001K\x01K\x03t", 4, None),
        (b"K\x04(X\x01\x00\x00\x001K\x01K\x04t", 4, "a part of a storage reaches beyond it"),
        (b"K\x04(X\x01\x00\x00\x001J\xff\xff\xff\xffK\x01t", 4, "a part of a storage reaches beyond it"),
        (b"K\x04N", 3, "storage '0' has another size"),
        (b"K\x05N", 4, "storage '0' has another size"),
        (b"J\x00\x00\x00\x7fN", 4, "it claims more tensors than its"),
    ],
)
def test_storages_of_old_files(end, count, message, tmp_path):
    reference = b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    (tmp_path / "file.pth").write_bytes(legacy(reference + end, count))
    if message is None:
        assert read_file(tmp_path / "file.pth").value.bytes.nbytes() == 12
    else:
        with pytest.raises(CheckpointError, match=message):
            read_file(tmp_path / "file.pth")


def test_a_storage_under_two_dtypes_in_an_old_file(tmp_path):
    one = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04NtQ"
    (tmp_path / "file.pth").write_bytes(old_file(b"\x80\x02" + one + one.replace(b"Float", b"Int") + b"\x86."))
    with pytest.raises(CheckpointError, match="storage '0' is not what it should be"):
        read_file(tmp_path / "file.pth")


def test_a_copy_in_another_dtype_is_not_made(tmp_path):
    """In an old file the numbers are not there yet."""
    told = harmless(old_file(PICKLES["a tensor of another dtype"]), tmp_path / "file.pth")
    assert "left out" in told or "has no weights" in told


def test_storages_that_lie_over_each_other(tmp_path):
    value = [torch.ones(1000), torch.ones(1000), torch.ones(1000)]
    entries = entries_of(saved(value, tmp_path / "file.pth"))
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as written:
        for name in ("data.pkl", "data/0"):
            written.writestr(f"archive/{name}", entries[name])
        for key in "12":
            again = copy.copy(written.getinfo("archive/data/0"))
            again.filename = f"archive/data/{key}"
            written.filelist.append(again)
    with pytest.raises(CheckpointError, match="it claims more tensors than its"):
        read_file(tmp_path / "file.pth")


def test_entries_whose_headers_are_not_right(tmp_path):
    whole = saved({"w": torch.ones(4)}, tmp_path / "file.pth").read_bytes()
    entry = next(each for each in zipfile.ZipFile(tmp_path / "file.pth").infolist() if each.filename.endswith("data/0"))
    directory = whole.index(b"PK\x01\x02")
    central = whole.rindex(b"PK\x01\x02", directory, whole.index(entry.filename.encode(), directory))
    for place, change, message in (
        (entry.header_offset, b"PX\x03\x04", "its list of entries leads elsewhere"),
        (central + 8, struct.pack("<H", 1), "compressed entries"),
        (central + 10, struct.pack("<H", 8), "compressed entries"),
        (central + 20, struct.pack("<II", 2**31, 2**31), "its list of entries leads elsewhere"),
        (central + 20, struct.pack("<II", 8, 8), "storage '0' is smaller than what it should hold"),
    ):
        (tmp_path / "file.pth").write_bytes(whole[:place] + change + whole[place + len(change) :])
        with pytest.raises(CheckpointError, match=message):
            read_file(tmp_path / "file.pth")


def test_a_model_that_refers_to_itself_many_times(tmp_path):
    layer = nn.Linear(1, 1)
    for _ in range(25):
        layer = nn.Sequential(layer, layer)
    with pytest.raises(CheckpointError, match="a model with too many modules"):
        find_weights(read_file(saved(layer, tmp_path / "file.pth")))


def harmless(data: bytes, path: Path) -> str:
    """Read ``data``: it is refused in a line that names the file, or its weights are; nothing has run."""
    path.write_bytes(data)
    try:
        with nothing_runs():
            contents = read_file(path)
            list(itertools.islice(unloadable_parts(contents.value, "checkpoint"), 1))
            told = find_weights(contents).told()
    except CheckpointError as error:
        told = str(error)
    assert told.isprintable() and len(told) < 3000, told
    assert not Path("ran").exists()
    return told


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder; what a pickle runs would leave a file there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", [archive, old_file], ids=["archive", "old file"])
def test_a_hundred_planted_pickles_run_nothing(make, here):
    told = {name: harmless(make(content), here / "file.pth") for name, content in PICKLES.items()}
    read = [name for name, line in told.items() if not line.startswith(f"{here / 'file.pth'}")]
    assert read == ["a state of a tensor"], told
    assert len(PICKLES) >= 100


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("an item twice", "it sets an item twice"),
        ("more elements than the storage", "it has a tensor of shape (1099511627776,) that reaches beyond its storage"),
        ("lists in lists", "it is nested more than 100 levels deep"),
        ("shared lists", "it is nested more than 100 levels deep, or has more than 10,000,000 values in 1,000,000"),
        ("shared tuples", "it is nested more than 100 levels deep, or has more than 10,000,000 values in 1,000,000"),
        ("shared tuples as a key", "it has a key of more than 64 values"),
        ("shared tuples in a set", "it has a key of more than 64 values"),
        ("a list in itself", "it has a value that contains itself"),
        ("a long name again and again", "it names a function by more than 1,000 characters"),
        ("a long key", "it has a key of 1,000,000 characters; 4,096 are allowed"),
        ("a long key of many numbers", "it has a key of more than 64 values"),
        ("a key of a thousand bits", "it has an integer of more than 64 bits as a key"),
        ("numbers that are found slowly", "reading it would take far longer than its size explains"),
        ("counts of counts", "reading it would take far longer than its size explains"),
        ("an integer of a million bits", "it has an integer of 999999 bits; 4096 are allowed"),
        ("a reference to a number", "it refers to something outside the file"),
        ("terabytes of bytes", "truncated or damaged (ValueError: "),
        ("no STOP", "truncated or damaged (ValueError: "),
        ("marks", "it ends in the middle of a value"),
    ],
)
def test_why_it_is_refused(name, reason, here):
    assert harmless(archive(PICKLES[name]), here / "file.pth").startswith(f"{here / 'file.pth'}: {reason}")


@pytest.mark.parametrize("command", ["convert", "load_from", "resume"])
def test_planted_pickles_end_in_one_line_wherever_they_are_read(command, here, capsys, thorough):
    """As the whole of a checkpoint, as its weights, as its optimizer's state, and as its meta."""
    untrained = Runner.from_cfg(config(here / "out", validates=False))
    for index, content in enumerate(PICKLES.values()):
        places = [b"state_dict", b"optimizer", b"meta"]
        for place in places if thorough else [places[index % 3]]:
            name = b"X" + struct.pack("<I", len(place)) + place
            inside = b"\x80\x04}" + name + content.removesuffix(b".") + b"s."
            for whole in (content, inside) if thorough else (inside,):
                (here / "file.pth").write_bytes(archive(whole))
                if command == "convert":
                    assert main(["convert", str(here / "file.pth"), str(here / "weights.pth")]) in (0, 2)
                    continue
                with pytest.raises(CheckpointError) as caught:
                    (untrained.resume if command == "resume" else untrained.load_checkpoint)(here / "file.pth")
                assert str(caught.value).isprintable()
        lines = capsys.readouterr()
        assert all(line.isprintable() for line in (lines.out + lines.err).splitlines())
    assert not Path("ran").exists()


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
