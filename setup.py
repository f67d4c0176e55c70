"""Builds fusedopt._C with CMake and Ninja against the torch that is installed.

Environment:
    FUSEDOPT_CUDA: auto (default; builds the CUDA sources when nvcc is there), 0, or 1 (fails without nvcc).
    FUSEDOPT_CUDA_ARCHS: architectures to build for, such as 90 or "80;90" (default: all from 80 that nvcc knows).
    FUSEDOPT_EMULATOR: 1 also builds the CUDA kernels as host code, which the tests run.
    FUSEDOPT_WERROR: 1 makes compiler warnings errors.
    FUSEDOPT_SANITIZE: sanitizers, such as address,undefined.
    FUSEDOPT_BUILD_DIR: where CMake works, so that a second build can reuse it.
"""

import os
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except ImportError as error:
            raise SystemExit(
                "fusedopt builds against the torch you run with. Install torch first, then: "
                "pip install --no-build-isolation ."
            ) from error
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("FUSEDOPT_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_INSTALL_PREFIX": target,
            "FUSEDOPT_TORCH_INCLUDE": ";".join(cpp_extension.include_paths()),
            "FUSEDOPT_TORCH_LIB": ";".join(cpp_extension.library_paths()),
            "FUSEDOPT_TORCH_VERSION": torch.__version__,
            "FUSEDOPT_TORCH_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
            "FUSEDOPT_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "FUSEDOPT_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "FUSEDOPT_CUDA": os.environ.get("FUSEDOPT_CUDA", "auto"),
            "FUSEDOPT_CUDA_ARCHS": os.environ.get("FUSEDOPT_CUDA_ARCHS", ""),
            "FUSEDOPT_EMULATOR": os.environ.get("FUSEDOPT_EMULATOR", "0"),
            "FUSEDOPT_WERROR": os.environ.get("FUSEDOPT_WERROR", "0"),
            "FUSEDOPT_SANITIZE": os.environ.get("FUSEDOPT_SANITIZE", ""),
        }
        configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build]
        subprocess.run([*map(str, configure), *(f"-D{key}={value}" for key, value in options.items())], check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
