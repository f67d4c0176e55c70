"""Which compiled module serves which torch: the choice among a wheel's modules, and the probe before one is trusted."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import module
from test_package import TRAIN, copied_package, run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedopt.backends import binding
from fusedopt.backends.binding import Stamp, choose
from fusedopt.backends.probe import misread

assert callable(copied_package)  # a fixture

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MINOR = "_".join(torch.__version__.split(".")[:2])


def put(folder: Path, name: str, built_for: str, abi: int = 1) -> Path:
    """A file that looks like a compiled module to whoever reads its stamp."""
    path = folder / f"{name}{SUFFIX}"
    path.write_bytes(b"\0ELF\0fusedopt built for torch %b; C++11 ABI %d;\0" % (built_for.encode(), abi))
    return path


class TestChoice:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        put(tmp_path, "_C_torch2_1", "2.1.2")
        put(tmp_path, "_C_torch2_13", "2.13.0+cpu")
        put(tmp_path, "_C_torch2_14", "2.14.1")
        return tmp_path

    @pytest.mark.parametrize(
        ("version", "name"),
        [
            ("2.13.0", "_C_torch2_13"),
            ("2.13.0+cpu", "_C_torch2_13"),
            ("2.13.0+cu130", "_C_torch2_13"),
            ("2.13.2", "_C_torch2_13"),
            ("2.14.0+rocm7.0", "_C_torch2_14"),
            ("2.1.0", "_C_torch2_1"),
        ],
    )
    def test_a_minor_release_is_served_whatever_its_patch_level_and_build(
        self, folder: Path, version: str, name: str
    ) -> None:
        assert choose(folder, version, True) == (folder / f"{name}{SUFFIX}", None)

    @pytest.mark.parametrize("version", ["2.12.0", "2.15.0+cpu", "3.13.0", "21.3.0", "unknown"])
    def test_another_one_has_none_and_those_there_are_are_named(self, folder: Path, version: str) -> None:
        said = f"fusedopt has no compiled module for torch {version} here, only for torch 2.1, 2.13 and 2.14"
        assert choose(folder, version, True) == (None, said)

    @pytest.mark.parametrize(
        "version", ["2.14.0a0+git1234567", "2.14.0.dev20260101+cpu", "2.14.0rc3", "2.14.1a0+nv26.01"]
    )
    def test_a_pre_release_is_not_taken_for_the_release(self, folder: Path, version: str) -> None:
        said = f"_C_torch2_14{SUFFIX} was built for torch 2.14.1, and torch {version} may differ from it"
        assert choose(folder, version, True) == (None, said)

    def test_a_pre_release_is_served_by_what_was_built_for_it_which_serves_nothing_else(self, tmp_path: Path) -> None:
        path = put(tmp_path, "_C_torch2_16", "2.16.0a0+git1234567")
        assert choose(tmp_path, "2.16.0a0+git1234567", True) == (path, None)
        for version in ("2.16.0", "2.16.0a0+git7654321"):
            assert choose(tmp_path, version, True)[0] is None

    def test_the_other_abi_is_refused(self, folder: Path) -> None:
        assert choose(folder, "2.14.1", False) == (
            None,
            f"_C_torch2_14{SUFFIX} was built for the other C++ ABI than torch 2.14.1",
        )

    def test_the_name_alone_is_not_believed(self, tmp_path: Path) -> None:
        put(tmp_path, "_C_torch2_14", "2.13.0")
        assert choose(tmp_path, "2.14.0", True)[0] is None
        (tmp_path / f"_C_torch2_15{SUFFIX}").write_bytes(b"no stamp")
        assert choose(tmp_path, "2.15.0", True)[0] is None

    def test_modules_of_another_python_are_not_seen(self, tmp_path: Path) -> None:
        put(tmp_path, "_C_torch2_14", "2.14.0").rename(tmp_path / "_C_torch2_14.cpython-39-x86_64-linux-gnu.so")
        assert choose(tmp_path, "2.14.0", True) == (None, "the compiled module fusedopt._C is not built")


class Lying(ModuleType):
    """The compiled module, but for one thing that it reads."""

    def __init__(self, what: str) -> None:
        super().__init__("fusedopt._C")
        self.what = what
        self.TENSOR_OBJECT_BYTES = module.TENSOR_OBJECT_BYTES + (8 if what == "object" else 0)

    def probe(self, tensor: torch.Tensor, follow: bool) -> dict[str, Any]:
        read = module.probe(tensor, follow)
        if self.what == "count" and follow:
            torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version - 1,))
        if self.what in read:
            right = read[self.what]
            read[self.what] = right[::-1] if isinstance(right, tuple) and right != right[::-1] else object()
        return read


@pytest.fixture
def untouched() -> Iterator[None]:
    """The module in use stays the one in use."""
    yield
    assert sys.modules.get("fusedopt._C") is module


@pytest.mark.skipif(module is None, reason="the compiled module is not built")
@pytest.mark.usefixtures("untouched")
class TestProbe:
    @pytest.mark.parametrize(
        "mode",
        [nullcontext, torch.inference_mode, FakeTensorMode, lambda: torch.device("meta")],
        ids=["plain", "inference_mode", "fake", "meta"],
    )
    def test_the_module_passes_in_whatever_mode_it_is_imported(self, mode: Any) -> None:
        context: AbstractContextManager[Any] = mode()
        with context:
            assert misread(module) is None

    def test_everything_it_reads_is_compared(self) -> None:
        read = set(module.probe(torch.zeros(2), True))
        for what in read:
            assert what in (misread(Lying(what)) or ""), what
        assert len(read) == 18

    def test_objects_of_another_size_are_found_before_one_is_read(self) -> None:
        lying = Lying("object")
        lying.probe = None  # type: ignore[assignment,method-assign]
        assert "a tensor object has" in str(misread(lying))

    def test_versions_that_are_not_counted_up_are_found(self) -> None:
        assert misread(Lying("count")) == "it does not count up the version of a tensor"

    @pytest.mark.parametrize("name", ["_C", f"_C_torch{MINOR}"])
    def test_a_module_that_lies_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        path = put(tmp_path, name, torch.__version__)
        monkeypatch.setattr(binding, "_import", lambda path: Lying("strides"))
        said = f"{path.name} does not fit torch {torch.__version__}: strides of a tensor is"
        if name == "_C":
            with pytest.raises(ImportError, match=r"strides of a tensor is .* build it for this torch: pip install"):
                binding.load(tmp_path)
        else:
            loaded, reason = binding.load(tmp_path)
            assert loaded is None
            assert reason is not None
            assert reason.startswith(said)


def test_a_wheels_module_serves_a_torch_of_another_patch_level(copied_package: Path) -> None:
    if module is None:
        pytest.skip("the compiled module is not built")
    built = Path(module.__file__)
    stamp = Stamp.of(built)
    assert stamp is not None
    major, minor, rest = stamp.torch.split(".", 2)
    old, new = (f"fusedopt built for torch {each};".encode() for each in (stamp.torch, f"{major}.{minor}.9{rest[1:]}"))
    path = copied_package / "fusedopt" / f"_C_torch{MINOR}{SUFFIX}"
    path.write_bytes(built.read_bytes().replace(old, new))
    for kernels in built.parent.glob("libfusedopt_kernels.so"):
        shutil.copy(kernels, path.parent)
    result = run_python(TRAIN + "from fusedopt import _C; print(_C.__file__); import fusedopt._C", path=copied_package)
    assert "native [-0.1" in result.stdout
    assert str(path) in result.stdout
    assert result.stderr == ""


def test_a_wheels_module_that_does_not_load_is_left_out_and_one_from_source_is_an_error(tmp_path: Path) -> None:
    path = put(tmp_path, f"_C_torch{MINOR}", torch.__version__)
    loaded, reason = binding.load(tmp_path)
    assert loaded is None
    assert reason is not None
    assert reason.startswith(f"{path.name} cannot be loaded (")
    put(tmp_path, "_C", torch.__version__)
    with pytest.raises(ImportError, match=r"fusedopt\._C cannot be loaded .*; build it for this torch: pip install"):
        binding.load(tmp_path)


def test_a_wheel_without_this_torch_has_a_reason(tmp_path: Path) -> None:
    put(tmp_path, "_C_torch9_99", "9.99.0")
    said = f"fusedopt has no compiled module for torch {torch.__version__} here, only for torch 9.99"
    assert binding.load(tmp_path) == (None, said)


def test_a_module_of_an_older_fusedopt_has_no_stamp_that_is_known(tmp_path: Path) -> None:
    (tmp_path / f"_C{SUFFIX}").write_bytes(f"fusedopt built for torch {torch.__version__};".encode())
    with pytest.raises(ImportError, match=r"fusedopt\._C is of another fusedopt; build it"):
        binding.load(tmp_path)


def test_the_module_here_is_stamped_for_the_torch_here() -> None:
    if module is None:
        pytest.skip("the compiled module is not built")
    stamp = Stamp.of(Path(module.__file__))
    assert stamp is not None
    assert stamp.torch == module.build_info()["torch"]
    assert stamp.cxx11_abi == torch.compiled_with_cxx11_abi()
