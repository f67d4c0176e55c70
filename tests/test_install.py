"""Installing from source as a user does: in a fresh environment, with torch and the documented prerequisites alone."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from test_package import TRAIN

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not (REPOSITORY / "setup.py").exists(), reason="not in a source tree"),
]

#: What README names.
PREREQUISITES = ("torch", "setuptools", "cmake", "ninja")
#: What g++ and CMake run.
TOOLS = ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "nm", "strip", "objcopy", "objdump", "readelf", "sh")


def link(names: tuple[str, ...], site: Path, programs: Path) -> None:
    """Put packages of this environment, and what they require, into another one, without a copy of torch."""
    waiting, done = list(names), set()
    while waiting:
        name = waiting.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for other systems or Pythons
        if name in done:
            continue
        done.add(name)
        for file in distribution.files or ():
            program = file.parts[0] == ".."
            if program and file.parts[-2] != "bin":
                continue
            original = os.path.abspath(str(distribution.locate_file(file if program else file.parts[0])))
            path = (programs if program else site) / os.path.basename(original)
            if not path.exists():
                path.symlink_to(original)
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[\w.-]+", requirement)[0])  # type: ignore[index]
    assert done >= set(names), f"this environment lacks {set(names) - done}"


def test_a_fresh_environment_builds_and_installs_the_sdist(tmp_path: Path) -> None:
    source, home, tools = tmp_path / "source", tmp_path / "venv", tmp_path / "tools"
    ignore = shutil.ignore_patterns(".venv", ".git", "build", "dist", "*.so", "*.egg-info", "__pycache__", "work_dirs")
    shutil.copytree(REPOSITORY, source, ignore=ignore)
    venv.create(home, with_pip=True, symlinks=True)
    site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for old in site.glob("setuptools*"):
        shutil.rmtree(old)
    link(PREREQUISITES, site, home / "bin")
    tools.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (tools / tool).symlink_to(Path(found).resolve())
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FUSEDOPT"))}
    environment = {**kept, "PATH": f"{home / 'bin'}:{tools}", "FUSEDOPT_CUDA": "0"}

    def python(*args: str | Path, folder: Path = source) -> str:
        command = [str(home / "bin" / "python"), *map(str, args)]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    python("-c", "import setuptools.build_meta as b; b.build_sdist('dist')")
    (sdist,) = (source / "dist").glob("*.tar.gz")
    # From the sdist, so that a file missing there shows.
    python("-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index", sdist)
    said = python("-c", TRAIN, folder=tmp_path)
    assert str(site) in said
    assert "native [-0.1" in said
    assert "backend native on cpu     available" in python("-m", "fusedopt", "info", folder=tmp_path)
