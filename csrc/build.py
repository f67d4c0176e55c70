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
    FUSEDOPT_BUILD_DIR: where CMake works, so that a second build can reuse it.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def build(target: Path, scratch: Path) -> None:
    """Build the module into ``target``; CMake works in ``FUSEDOPT_BUILD_DIR``, or in ``scratch``.

    Raises:
        SystemExit: there is no torch to build against.
        subprocess.CalledProcessError: CMake or the compiler failed, and has said why.
    """
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "fusedopt builds against the torch you run with. Install torch first, then: "
            "pip install --no-build-isolation ."
        ) from error
    scratch = Path(os.environ.get("FUSEDOPT_BUILD_DIR", scratch)).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    options = {
        "CMAKE_INSTALL_PREFIX": target,
        "FUSEDOPT_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
        "FUSEDOPT_TORCH_LIB": ";".join(cpp_extension.library_paths()),
        "FUSEDOPT_TORCH_VERSION": torch.__version__,
        "FUSEDOPT_TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        "FUSEDOPT_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "FUSEDOPT_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
    }
    defaults = {
        "CUDA": "auto",
        "CUDA_ARCHS": "",
        "EMULATOR": "0",
        "WERROR": "0",
        "BUILD_TYPE": "Release",
        "SANITIZE": "",
    }
    options |= {f"FUSEDOPT_{key}": os.environ.get(f"FUSEDOPT_{key}", value) for key, value in defaults.items()}
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(scratch)]
    subprocess.run([*configure, *(f"-D{key}={value}" for key, value in options.items())], check=True)
    subprocess.run(["cmake", "--build", str(scratch), "--target", "install"], check=True)


if __name__ == "__main__":
    build(ROOT / "fusedopt", ROOT / "build" / "native")
