"""What a build needs of the machine. Whatever is missing is one sentence that says what to type.

Without third-party imports at the top: setuptools and torch are among what may be missing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

__all__ = ["compiler", "python_headers", "setuptools_is_new", "tool", "torch_to_build_against"]

SETUPTOOLS = 77
TORCH = (2, 8)

#: What of C++20, and of OpenMP, tells a compiler that is too old.
CXX = """
#include <omp.h>
#include <concepts>
static_assert(__cplusplus > 201703L);
static_assert(std::same_as<int, int>);
"""


def setuptools_is_new() -> None:
    """Check setuptools.

    Raises:
        SystemExit: it is missing or too old.
    """
    try:
        import setuptools
    except ImportError:
        raise SystemExit(
            f"fusedopt's build needs setuptools, which this Python lacks: pip install 'setuptools>={SETUPTOOLS}'"
        ) from None
    version = setuptools.__version__
    if int(version.split(".")[0]) < SETUPTOOLS:
        raise SystemExit(
            f"fusedopt's build needs setuptools {SETUPTOOLS} or newer, and this Python has {version}: "
            f"pip install 'setuptools>={SETUPTOOLS}'"
        )


def tool(name: str, requirement: str) -> str:
    """The path of a program: on PATH, or beside the Python that runs, where pip puts it.

    Args:
        name: of the program.
        requirement: what pip installs it by.

    Raises:
        SystemExit: it is missing.
    """
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise SystemExit(f"fusedopt's build needs {name}, which is not on PATH: pip install '{requirement}'")
    return found


def compiler() -> None:
    """Check the C++ compiler: the one that ``CXX`` names, or the first on PATH.

    Raises:
        SystemExit: there is none, or it is too old.
    """
    named = shlex.split(os.environ.get("CXX", ""))  # with options, perhaps, or behind ccache
    candidates = named[:1] or ["c++", "g++", "clang++"]  # in CMake's order
    found = next((path for name in candidates if (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit(
            f"fusedopt's build needs a C++ compiler with C++20, and none of {', '.join(candidates)} is on PATH: "
            "apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++"
        )
    command = [found, *named[1:], "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run(command, input=CXX, text=True, capture_output=True).returncode:
        raise SystemExit(
            f"fusedopt's build needs a compiler with C++20 and OpenMP (g++ 10 or newer), and {found} is not one: "
            "install a newer g++ and set CXX to its name, as in: CXX=g++-12 pip install --no-build-isolation ."
        )


def python_headers() -> None:
    """Check Python's headers.

    Raises:
        SystemExit: they are missing.
    """
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SystemExit(
            f"fusedopt's build needs the headers of Python {version}, and Python.h is not there: "
            f"apt-get install python{version}-dev (Debian, Ubuntu) or dnf install python{version}-devel"
        )


def torch_to_build_against() -> Any:
    """The torch that is installed.

    Raises:
        SystemExit: there is none, as where pip builds apart from what is installed, or it is too old.
    """
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "fusedopt builds against the torch that it will run with, and the build finds none: install torch, then "
            "keep pip from building apart from it: pip install --no-build-isolation ."
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        least = ".".join(map(str, TORCH))
        raise SystemExit(
            f"fusedopt needs torch {least} or newer, and {torch.__version__} is installed: pip install 'torch>={least}'"
        )
    return torch
