"""Text files and file names, in UTF-8 whatever the locale."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["replace_text", "utf8_name"]


def utf8_name(name: str) -> str:
    """The string that Python uses for the file whose name, in bytes, is ``name`` in UTF-8.

    It is ``name`` itself, except in a locale such as ``LC_ALL=C`` whose file names are ASCII.
    """
    try:
        return os.fsdecode(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # a surrogate that stands for no byte: no file has this name
        return name


def replace_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, whole or not at all.

    Raises:
        OSError: it cannot be written; an existing file is unchanged.
    """
    path = Path(os.path.realpath(path))  # a link stays a link
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_bytes(text.encode("utf-8"))
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
