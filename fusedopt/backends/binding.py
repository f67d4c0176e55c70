"""Which compiled module serves the torch that runs: finding, loading and probing it.

A build from source has one, ``_C``, for exactly the torch that was installed. A wheel has one for each minor release of
torch, ``_C_torch2_13`` and so on, beside the library of kernels that they share. Either is imported as ``fusedopt._C``;
one from source comes first.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import torch

from .probe import misread

__all__ = ["REBUILD", "Stamp", "choose", "load"]

#: What to type where no module serves.
REBUILD = (
    "build it for this torch: pip install --no-build-isolation --force-reinstall --no-deps --no-binary fusedopt "
    "fusedopt (or -e . in a clone)"
)

_NAME = "fusedopt._C"
_FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stamp:
    """What a module says it was built for.

    Args:
        torch: the ``__version__`` of that torch.
        cxx11_abi: whether it had the C++11 ABI.
    """

    torch: str
    cxx11_abi: bool

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """The stamp in a module's file, which can be read when the module does not load; None without one."""
        match = re.search(rb"fusedopt built for torch ([^;]+); C\+\+11 ABI ([01]);", path.read_bytes())
        return cls(match[1].decode(), match[2] == b"1") if match else None


def _release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a release, whatever its patch level and build; None for pre-releases and the like."""
    match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+)*(\+.*)?", version)
    return (int(match[1]), int(match[2])) if match else None


def _of_wheel(folder: Path) -> dict[tuple[int, int], Path]:
    """A wheel's modules in ``folder``, by torch's major and minor number."""
    found = {}
    for suffix in EXTENSION_SUFFIXES:
        for path in folder.glob(f"_C_torch*{suffix}"):
            if match := re.fullmatch(r"_C_torch(\d+)_(\d+)" + re.escape(suffix), path.name):
                found[int(match[1]), int(match[2])] = path
    return found


def choose(folder: Path, version: str, cxx11_abi: bool) -> tuple[Path | None, str | None]:
    """The module of a wheel that serves a torch: (its file, None), or (None, why none does).

    Any patch release and build of a minor release is served by one module. A pre-release may differ from the release
    that follows, so it is served only by a module that was built for it.

    Args:
        folder: where the modules are.
        version: ``torch.__version__``.
        cxx11_abi: whether that torch has the C++11 ABI.
    """
    found = _of_wheel(folder)
    if not found:
        return None, "the compiled module fusedopt._C is not built"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    path = found.get((int(numbers[1]), int(numbers[2]))) if numbers else None
    if path is None:
        known = " and ".join(", ".join(f"{a}.{b}" for a, b in sorted(found)).rsplit(", ", 1))
        return None, f"fusedopt has no compiled module for torch {version} here, only for torch {known}"
    stamp = Stamp.of(path)
    if stamp is None or (stamp.torch != version and _release(stamp.torch) is None):
        return None, f"{path.name} does not say that it was built for torch {version}"
    if stamp.cxx11_abi != cxx11_abi:
        return None, f"{path.name} was built for the other C++ ABI than torch {version}"
    if stamp.torch == version or _release(stamp.torch) == _release(version):
        return path, None
    return None, f"{path.name} was built for torch {stamp.torch}, and torch {version} may differ from it"


def _import(path: Path) -> ModuleType:
    """Import a file as ``fusedopt._C``, whatever its name; the same module again where fusedopt is reloaded."""
    loaded = sys.modules.get(_NAME)
    if loaded is not None and loaded.__file__ == str(path):
        return loaded
    loader = ExtensionFileLoader(_NAME, str(path))
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def load(folder: Path = _FOLDER) -> tuple[ModuleType | None, str | None]:
    """Import the compiled module that serves this torch: (module, None), or (None, why there is none).

    Raises:
        ImportError: a module that was built from source is for another torch, does not load, or misreads torch's
            tensors; the message says how to build it again. A wheel's module is left out for a reason instead.
    """
    # As text: torch's own object compares by the rules of versions.
    version, cxx11_abi = str(torch.__version__), bool(torch.compiled_with_cxx11_abi())
    source = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").is_file()), None)
    if source is not None:
        stamp = Stamp.of(source)
        if stamp is None:
            raise ImportError(f"fusedopt._C is of another fusedopt; {REBUILD}")
        if stamp != Stamp(version, cxx11_abi):
            raise ImportError(
                f"fusedopt._C was built for torch {stamp.torch} but torch {version} is installed; {REBUILD}"
            )
        path = source
    else:
        chosen, reason = choose(folder, version, cxx11_abi)
        if chosen is None:
            return None, reason
        path = chosen
    try:
        module = _import(path)
    except ImportError as error:
        reason = f"{path.name if source is None else _NAME} cannot be loaded ({error})"
    else:
        if (wrong := misread(module)) is None:
            sys.modules[_NAME] = module
            sys.modules[_NAME.partition(".")[0]]._C = module  # type: ignore[attr-defined]
            return module, None
        reason = f"{path.name} does not fit torch {version}: {wrong}"
    if source is not None:
        raise ImportError(f"{reason}; {REBUILD}")
    return None, reason
