"""The build: what it needs, each missing thing in a sentence that says what to type; and the torches of a wheel."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
if not CSRC.exists():
    pytest.skip("not in a source tree", allow_module_level=True)

needs: Any = SimpleNamespace(**runpy.run_path(str(CSRC / "prerequisites.py")))
torches: Any = SimpleNamespace(**runpy.run_path(str(CSRC / "torches.py"), run_name="torches"))


def refused(action: Any, *args: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        action(*args)
    said = str(caught.value)
    assert "\n" not in said
    return said


def program(folder: Path, name: str, code: int = 0) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nexit {code}\n")
    path.chmod(0o755)
    return path


class TestPrerequisites:
    def test_a_program_that_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        said = refused(needs.tool, "cmake", "cmake>=3.18")
        assert said == "fusedopt's build needs cmake, which is not on PATH: pip install 'cmake>=3.18'"

    def test_a_program_that_pip_put_beside_a_python_that_is_not_activated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "bin").mkdir()
        path = program(tmp_path / "bin", "cmake")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "bin"))
        assert needs.tool("cmake", "cmake") == str(path)

    def test_no_compiler(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert "none of c++, g++, clang++ is on PATH: apt-get install g++" in refused(needs.compiler)
        monkeypatch.setenv("CXX", "g++-99 -m64")
        assert "none of g++-99 is on PATH" in refused(needs.compiler)

    def test_a_compiler_without_cxx20(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program(tmp_path, "g++-7", 1)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("CXX", "g++-7")
        said = refused(needs.compiler)
        assert f"{tmp_path / 'g++-7'} is not one" in said
        assert "CXX=g++-12 pip install" in said

    def test_no_headers_of_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        assert f"apt-get install python3.{sys.version_info[1]}-dev" in refused(needs.python_headers)

    def test_no_setuptools(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "setuptools", None)
        assert refused(needs.setuptools_is_new).endswith("which this Python lacks: pip install 'setuptools>=77'")

    def test_no_torch_as_in_a_build_that_pip_isolates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert refused(needs.torch_to_build_against).endswith(": pip install --no-build-isolation .")

    def test_an_old_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.7.1+cpu"))
        said = refused(needs.torch_to_build_against)
        assert said == "fusedopt needs torch 2.8 or newer, and 2.7.1+cpu is installed: pip install 'torch>=2.8'"

    @pytest.mark.parametrize("what", ["import build_backend", "import runpy; runpy.run_path('../setup.py')"])
    def test_an_old_setuptools_is_named_before_it_reads_the_tree(self, tmp_path: Path, what: str) -> None:
        (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'")
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{CSRC}"}
        result = subprocess.run([sys.executable, "-c", what], cwd=CSRC, env=environment, capture_output=True, text=True)
        assert result.returncode == 1
        assert result.stderr == (
            "fusedopt's build needs setuptools 77 or newer, and this Python has 65.5.0: pip install 'setuptools>=77'\n"
        )

    def test_pip_puts_no_torch_of_its_own_into_a_build(self) -> None:
        text = (CSRC.parent / "pyproject.toml").read_text()
        (requires,) = (line for line in text.split("\n") if line.startswith("requires = "))
        assert "torch" not in requires


def unpacked(folder: Path, version: str) -> Path:
    (folder / "include").mkdir(parents=True)
    (folder / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    return folder


class TestTorches:
    def test_by_folder(self, tmp_path: Path) -> None:
        one = unpacked(tmp_path / "one" / "torch", "2.13.0+cpu")
        two = unpacked(tmp_path / "two" / "lib" / "python3.11" / "site-packages" / "torch", "2.8.1")
        found = torches.find(f"{one} {tmp_path / 'two'}", tmp_path)
        assert [(torch.version, torch.folder, torch.module) for torch in found] == [
            ("2.13.0+cpu", one, "_C_torch2_13"),
            ("2.8.1", two, "_C_torch2_8"),
        ]

    def test_by_release_from_what_was_downloaded(self, tmp_path: Path) -> None:
        name = f"torch-2.13-cp{sys.version_info[0]}{sys.version_info[1]}"
        folder = unpacked(tmp_path / name / "torch", "2.13.1")
        assert torches.find("2.13", tmp_path) == [torches.Torch("2.13.1", folder)]

    def test_what_is_none(self, tmp_path: Path) -> None:
        assert "expected one such as 2.13 or 2.13.0, or a folder" in refused(torches.find, "latest", tmp_path)
        assert "has no torch" in refused(torches.find, str(tmp_path), tmp_path)

    def test_two_of_one_minor_release(self, tmp_path: Path) -> None:
        names = [str(unpacked(tmp_path / version / "torch", version)) for version in ("2.13.0", "2.13.1")]
        said = refused(torches.find, " ".join(names), tmp_path)
        assert said == "a wheel has one module for each minor release of torch; 2.13.0 and 2.13.1 are of one"


def test_the_sizes_of_a_wheel(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "fusedopt-1-cp311-cp311-linux_x86_64.whl", "w") as files:
        files.writestr("fusedopt/_C_torch2_13.cpython-311-x86_64-linux-gnu.so", b"0" * 1_500_000)
        files.writestr("fusedopt/version.py", b"")
    said = subprocess.run(
        [sys.executable, CSRC / "sizes.py", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    assert "_C_torch2_13.cpython-311-x86_64-linux-gnu.so: 1.50 MB, packed" in said
    assert "version.py" not in said
