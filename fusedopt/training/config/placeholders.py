"""Placeholders in config files: ``{{ fileDirname }}`` and its kin, and MMEngine's ``{{_base_.key}}``.

File names are inserted as data: the parser sees an identifier in place of each placeholder, and the identifiers are
replaced in the strings that it returns. So quotes and backslashes in a file name cannot change what the file means.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["BASE_VALUE", "FileNames", "has_placeholder"]

#: MMEngine's notation for an inherited value.
BASE_VALUE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")

_FILE_NAME = re.compile(r"\{\{\s*(fileDirname|fileBasename|fileBasenameNoExtension|fileExtname)\s*\}\}")


def has_placeholder(text: str) -> bool:
    """Whether a config file cannot hold ``text`` as it is."""
    return bool(BASE_VALUE.search(text) or _FILE_NAME.search(text))


class FileNames:
    """The file names of a config file, and its text with an identifier in place of each placeholder for them.

    Args:
        text: the content of the file.
        path: the file.

    Attributes:
        text: the content to parse.
    """

    def __init__(self, text: str, path: Path):
        mark = "_file_name"
        while mark in text:
            mark += "_"
        values = {
            "fileDirname": str(path.absolute().parent),
            "fileBasename": path.name,
            "fileBasenameNoExtension": path.stem,
            "fileExtname": path.suffix,
        }
        self._values = {f"{mark}_{name}_": value for name, value in values.items()}
        self._identifier = re.compile("|".join(self._values))
        self.text = _FILE_NAME.sub(lambda match: f"{mark}_{match[1]}_", text)

    def occur_in(self, text: str) -> bool:
        """Whether ``text``, which was parsed, has a placeholder."""
        return self._identifier.search(text) is not None

    def fill(self, text: str) -> str:
        """``text``, which was parsed, with the file names."""
        return self._identifier.sub(lambda match: self._values[match[0]], text)
