"""`python csrc/build.py`: fusedopt._C by CMake and Ninja, against the torch that is installed, without setuptools.

The module lands in fusedopt/, for a checkout that is on PYTHONPATH. setup.py does the same for a wheel or an editable
installation.

Environment:
    FUSEDOPT_CUDA: auto (default; builds the CUDA sources when nvcc is there), 0, or 1 (fails without nvcc).
    FUSEDOPT_CUDA_ARCHS: architectures to build for, such as 90 or "80;90" (default: all from 80 that nvcc knows).
    FUSEDOPT_EMULATOR: 1 also builds the CUDA kernels as host code, which the tests run.
    FUSEDOPT_WERROR: 1 makes compiler warnings errors.
    FUSEDOPT_BUILD_TYPE: Release (default), RelWithDebInfo (the same with symbols), or Debug (not optimized, with
        symbols and assertions); see docs/debugging.md.
    FUSEDOPT_SANITIZE: sanitizers, such as address,undefined.
    FUSEDOPT_TORCHES: for a wheel: the torches that it serves, such as "2.13 2.14", in place of the one that is
        installed; see torches.py, and docs/design.md for how such a wheel is put together.
    FUSEDOPT_BUILD_DIR: where CMake works, so that a second build can reuse it.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import prerequisites
import torches

ROOT = Path(__file__).resolve().parents[1]

#: Variables of the environment that CMake gets as they are, and what they are when they are not set.
OPTIONS = {
    "FUSEDOPT_CUDA": "auto",
    "FUSEDOPT_CUDA_ARCHS": "",
    "FUSEDOPT_EMULATOR": "0",
    "FUSEDOPT_WERROR": "0",
    "FUSEDOPT_BUILD_TYPE": "Release",
    "FUSEDOPT_SANITIZE": "",
}


def of_installed_torch() -> dict[str, object]:
    """CMake's options for one module, for the torch that is installed.

    Raises:
        SystemExit: there is none, or it is too old.
    """
    torch = prerequisites.torch_to_build_against()
    from torch.utils import cpp_extension

    return {
        "FUSEDOPT_TORCHES": "",
        "FUSEDOPT_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
        "FUSEDOPT_TORCH_LIB": ";".join(cpp_extension.library_paths()),
        "FUSEDOPT_TORCH_VERSION": torch.__version__,
        "FUSEDOPT_TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
    }


def of_torches(names: str, scratch: Path) -> dict[str, object]:
    """CMake's options for a library of kernels and a module for each of these torches.

    Raises:
        SystemExit: the headers of one cannot be had.
    """
    found = torches.find(names, scratch / "torches")
    # All releases since 2.8 have the new ABI; fusedopt.backends.binding asks the torch that runs.
    modules = ";".join(f"{torch.module}|{torch.version}|{torch.folder}" for torch in found)
    return {"FUSEDOPT_TORCHES": modules, "FUSEDOPT_TORCH_CXX11_ABI": 1}


def build(target: Path, scratch: Path) -> None:
    """Build into ``target``; CMake works in ``FUSEDOPT_BUILD_DIR``, or in ``scratch``.

    Raises:
        SystemExit: something is missing, and the message says what to type; or CMake or the compiler failed, and has
            said why.
    """
    cmake, ninja = prerequisites.tool("cmake", "cmake>=3.18"), prerequisites.tool("ninja", "ninja")
    prerequisites.compiler()
    prerequisites.python_headers()
    scratch = Path(os.environ.get("FUSEDOPT_BUILD_DIR", scratch)).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    names = os.environ.get("FUSEDOPT_TORCHES")
    options: dict[str, object] = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "FUSEDOPT_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "FUSEDOPT_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        **(of_torches(names, scratch) if names else of_installed_torch()),
        **{key: os.environ.get(key, value) for key, value in OPTIONS.items()},
    }
    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(scratch)]
    try:
        subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        subprocess.run([cmake, "--build", str(scratch)], check=True)
        # What lies there of another kind of build would be taken for a part of this one.
        for old in (*target.glob("_C*.so"), *target.glob("libfusedopt_kernels.so")):
            old.unlink()
        strip = ["--strip"] if names else []
        subprocess.run([cmake, "--install", str(scratch), "--prefix", str(target), *strip], check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"fusedopt was not built: {Path(cmake).name} failed, for the reason above") from error


if __name__ == "__main__":
    build(ROOT / "fusedopt", ROOT / "build" / "native")
