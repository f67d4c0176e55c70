"""benchmarks/gpu compiles against the kernels without a warning, and names mistakes. Needs nvcc and no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "benchmarks" / "gpu" / "bandwidth.cu"
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,  # compiling the program takes half a minute
    pytest.mark.skipif(NVCC is None or not SOURCE.exists(), reason="nvcc or the sources are not here"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `.ci/gpu` compiles it, with warnings as errors."""
    assert NVCC is not None
    program = tmp_path_factory.mktemp("bandwidth") / "bandwidth"
    flags = ["-std=c++17", "-O3", "-DNDEBUG", "--fmad=false", "-arch=sm_90"]
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    command = [NVCC, *flags, *strict, "-o", program, SOURCE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


def run(program: Path, *arguments: str) -> tuple[int, str, str]:
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


def test_it_tells_how_to_use_it(program: Path) -> None:
    code, out, _ = run(program, "--help")
    assert code == 0
    assert out.startswith("usage: bandwidth [--elements N]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fast"], "what is --fast?"),
        (["--runs", "none"], "--runs needs a number above 0"),
        (["--elements", "-4"], "--elements needs a number above 0"),
        (["--tensors"], "--tensors needs a number above 0"),
        (["--json"], "--json needs the name of a file"),
        (["--elements", "1000", "--tensors", "10"], "fewer than 1024 elements to a tensor"),
    ],
)
def test_mistakes_are_named(program: Path, arguments: list[str], message: str) -> None:
    code, _, error = run(program, *arguments)
    assert code == 2
    assert f"bandwidth: {message}" in error
    assert "usage: " in error


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(program: Path) -> None:
    code, _, error = run(program)
    assert code == 1
    assert "cudaGetDeviceProperties" in error
