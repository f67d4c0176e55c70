"""The headers of the torches that a wheel is built for. Nothing of them is run, and torch itself is not needed."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Torch", "find"]


@dataclass(frozen=True)
class Torch:
    """A torch to build a module for.

    Args:
        version: its ``__version__``.
        folder: the folder ``torch``, with ``include/`` and ``version.py``.
    """

    version: str
    folder: Path

    @property
    def module(self) -> str:
        """The name of its module: of its minor release, for all its patch releases and builds."""
        match = re.match(r"(\d+)\.(\d+)", self.version)
        assert match is not None
        return f"_C_torch{match[1]}_{match[2]}"


def find(names: str, scratch: Path) -> list[Torch]:
    """The torches that ``names`` lists, separated by spaces.

    Args:
        names: each a release, such as 2.13 (its newest patch release) or 2.13.0, whose headers pip downloads; or a
            folder: a virtual environment with torch, or the folder ``torch`` of an unpacked wheel.
        scratch: where downloaded headers are kept.

    Raises:
        SystemExit: one of them cannot be had, is not a torch, or is there twice.
    """
    torches = [_in_folder(Path(name)) if "/" in name else _downloaded(name, scratch) for name in names.split()]
    for module in {torch.module for torch in torches}:
        twice = " and ".join(torch.version for torch in torches if torch.module == module)
        if " and " in twice:
            raise SystemExit(f"a wheel has one module for each minor release of torch; {twice} are of one")
    return torches


def _version_in(folder: Path) -> str | None:
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    return match[1] if match and (folder / "include").is_dir() else None


def _in_folder(folder: Path) -> Torch:
    for place in (folder, folder / "torch", *sorted(folder.glob("lib/python*/site-packages/torch"))):
        if version := _version_in(place):
            return Torch(version, place.resolve())
    raise SystemExit(f"{folder} has no torch: expected a virtual environment with torch, or an unpacked wheel of it")


def _downloaded(name: str, scratch: Path) -> Torch:
    if not re.fullmatch(r"\d+\.\d+(\.\d+(\+\w+)?)?", name):
        raise SystemExit(f"{name!r} is no release of torch: expected one such as 2.13 or 2.13.0, or a folder")
    folder = scratch / f"torch-{name}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if not _version_in(folder / "torch"):
        wanted = f"torch=={name}" if name.count(".") > 1 else f"torch=={name}.*"
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        if subprocess.run([*download, "-d", str(folder), wanted]).returncode:
            raise SystemExit(f"pip finds no {wanted} for this Python ({sys.version.split()[0]}) and machine")
        (wheel,) = folder.glob("torch-*.whl")
        with zipfile.ZipFile(wheel) as files:
            for path in files.namelist():
                if path == "torch/version.py" or path.startswith("torch/include/"):
                    files.extract(path, folder)
        wheel.unlink()
    version = _version_in(folder / "torch")
    if version is None:
        raise SystemExit(f"{folder} has no headers of torch: remove it, and build again")
    return Torch(version, folder / "torch")
