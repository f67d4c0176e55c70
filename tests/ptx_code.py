"""nvcc's PTX of the kernels, for the interpreter in csrc/ptx. It is kept in build/ptx for sources that do not change.

docs/ptx.md says what running it shows.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusedopt.backends.native import compiled_module

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
SOURCES = ("statistics", "update", "carried", "upload")
# Those of CMakeLists.txt.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "--fmad=false")
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
#: What the interpreter runs of nvcc's: the first with each kind of instruction, and one with slow double arithmetic.
WANTED = ("80", "86", "90")


@functools.cache
def known_architectures() -> frozenset[str]:
    """What this nvcc compiles for, such as "90"; nothing without nvcc or the sources."""
    if NVCC is None or not CUDA.exists():
        return frozenset()
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"compute_(\d+)", listed))


@functools.cache
def _fingerprint() -> str:
    """Of all that the PTX depends on."""
    assert NVCC is not None
    version = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    found = hashlib.sha256(version + repr(FLAGS).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in {".h", ".cu"} and not {"cpu", "emulator", "ptx"} & set(path.parts):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def compile_ptx(source: str, arch: str) -> Path:
    """nvcc's PTX of one source; compiled once for the sources as they are."""
    folder = ROOT / "build" / "ptx" / _fingerprint()
    path = folder / f"{source}-{arch}.ptx"
    if not path.exists():
        assert NVCC is not None
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        command = [NVCC, *FLAGS, f"-arch=compute_{arch}", "-ptx", "-o", unfinished, CUDA / f"{source}.cu"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        unfinished.replace(path)
    return path


def compile_all(arch: str) -> dict[str, Path]:
    """The PTX of every source for an architecture, by source."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(SOURCES, pool.map(lambda source: compile_ptx(source, arch), SOURCES), strict=True))


@functools.cache
def nvcc_modules(arch: str) -> list[Any]:
    """The same, read by the interpreter: what ``emulator.use_ptx`` takes."""
    module, reason = compiled_module()
    assert module is not None, reason
    return [module.ptx.Module(path.read_text(), path.name) for path in compile_all(arch).values()]
