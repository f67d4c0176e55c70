"""Files: their names in UTF-8 whatever the locale, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["UNFINISHED", "replace_file", "utf8_name"]

#: Suffix of a file that is being written; a leftover one is from a killed process.
UNFINISHED = ".unfinished"


def utf8_name(name: str) -> str:
    """The string that Python uses for the file whose name, in bytes, is ``name`` in UTF-8.

    It is ``name`` itself, except in a locale such as ``LC_ALL=C`` whose file names are ASCII.
    """
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # a surrogate that stands for no byte: no file has this name
        return name


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call ``write`` with a file that becomes ``path`` only when all of it is on disk; a link stays a link.

    Raises:
        OSError: it cannot be written. After this and any other error, ``path`` is unchanged.
    """
    path = Path(os.path.realpath(path))
    unfinished = path.with_name(path.name + UNFINISHED)
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(OSError):  # on a disk that became read-only
            unfinished.unlink(missing_ok=True)
        raise
