"""The CPU kernels on another architecture: cross-compiled for aarch64, run by qemu, with the bits of this processor."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CROSS, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not (REPOSITORY / "csrc").exists(), reason="not in a source tree"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares x86-64 with aarch64"),
    pytest.mark.skipif(
        not shutil.which(CROSS) or not shutil.which(QEMU),
        reason=f"{CROSS} or {QEMU} is missing: apt-get install g++-aarch64-linux-gnu qemu-user",
    ),
]


def run(*command: str | Path) -> str:
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def flags_of(target: str) -> list[str]:
    """The options that CMakeLists.txt compiles a target with."""
    text = (REPOSITORY / "CMakeLists.txt").read_text()
    match = re.search(rf"target_compile_options\({target} PRIVATE\s+([^)]*)\)", text)
    assert match is not None
    return match[1].split()


#: Those of CMakeLists.txt on x86-64; elsewhere these sources have no kernels.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def cases(folder: Path, compiler: str, emulator: list[str], *more: str) -> dict[str, dict[str, str]]:
    """What the program prints: instruction set -> case -> hash."""
    common = ["-std=c++20", "-O3", "-DNDEBUG"]
    objects = []
    for isa, flags in ISA_FLAGS.items():
        objects.append(folder / f"{isa}.o")
        own = flags if compiler == "g++" else []
        source = f"csrc/cpu/kernels_{isa}.cpp"
        run(compiler, *common, *flags_of("fusedopt_kernels"), *own, *more, "-c", source, "-o", objects[-1])
    program = folder / "bits"
    sources = ["tests/kernels/bits.cpp", "csrc/rule_interface.cpp"]
    run(compiler, "-static", "-std=c++20", "-Wall", "-Wextra", "-Werror", *sources, *objects, "-o", program)
    found: dict[str, dict[str, str]] = {}
    for line in run(*emulator, program).strip().split("\n"):
        isa, case, bits = line.split(", ", 2)
        found.setdefault(isa, {})[case] = found.get(isa, {}).get(case, "") + bits
    return found


def test_aarch64_has_the_bits_of_x86(tmp_path: Path) -> None:
    for name in ("here", "there", "contracted"):
        (tmp_path / name).mkdir()
    here = cases(tmp_path / "here", "g++", [])
    there = cases(tmp_path / "there", CROSS, [QEMU])
    assert set(there) == {"baseline"}
    assert len(there["baseline"]) > 300
    for isa in here:
        assert here[isa] == there["baseline"], isa
    # A fault would show: with contraction into fused multiply-adds, the bits are others.
    contracted = cases(tmp_path / "contracted", CROSS, [QEMU], "-ffp-contract=fast")
    assert contracted != there
