"""Config files and the files that they inherit."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import utf8_name
from .data_files import DataFile
from .dicts import ConfigDict
from .merging import merged
from .naming import config_error
from .python_files import BASE, PythonFile

__all__ = ["TOO_DEEP", "content_of", "load_text"]

TOO_DEEP = "the file is nested too deeply"


def content_of(path: Path, children: Sequence[Path] = ()) -> str:
    """The content of a file. ``children`` are the files that inherit from it, first one first."""
    try:
        if os.path.realpath(path) in map(os.path.realpath, children):
            chain = " -> ".join(map(str, (*children, path)))
            raise config_error(children[0], BASE, f"the file inherits from itself: {chain}")
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a FIFO would wait for a writer
            raise OSError(0, "not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError):
            reason = error.strerror
        else:  # names with a null byte, or with characters that no name has, are not found
            reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else "no file can have this name"
        if children:
            raise config_error(children[-1], BASE, f"cannot read {path}: {reason}") from error
        raise config_error(path, "", f"cannot read the config file: {reason}") from error


def load_text(text: str, path: Path, children: Sequence[Path] = ()) -> dict[str, Any]:
    """The settings in ``text``, the content of a file, merged into what it inherits; see :func:`content_of`."""
    if path.suffix not in (".py", ".json", ".yaml", ".yml"):
        raise config_error(path, "", f"unknown suffix {path.suffix!r}; expected .py, .json, .yaml or .yml")
    if not path.stem.strip("."):  # the work folder has this name: .. would be the parent
        raise config_error(path, "", "the name of a config must be more than dots and a suffix")
    variable = re.search(r"\{\{\s*\$\w+\s*:.*?\}\}", text)
    if variable is not None:
        line = text.count("\n", 0, variable.start()) + 1
        message = "environment variables are not inserted; a Python config can read os.environ itself"
        raise ConfigError(f"{path}:{line}: {variable[0]}: {message}")
    try:
        file = PythonFile(text, path) if path.suffix == ".py" else DataFile(text, path)
        names = file.take_bases()
    except (RecursionError, MemoryError) as error:  # MemoryError: from Python's parser
        raise config_error(path, "", TOO_DEEP) from error
    bases = ConfigDict()
    for base, scope in _base_paths(names, path):
        family = (*children, path)
        inherited = _scoped(load_text(content_of(base, family), base, family), scope)
        twice = [key for key in inherited if key in bases]
        if twice:
            raise config_error(path, twice[0], f"Duplicate key: {base} sets it, and so does another file of {BASE}")
        bases |= inherited
    try:
        return merged(bases, file.settings(bases), "", path)
    except (RecursionError, MemoryError) as error:
        raise config_error(path, "", TOO_DEEP) from error


def _base_paths(names: Any, path: Path) -> list[tuple[Path, str | None]]:
    """The files that ``path`` inherits from, and the package of those that are given as ``package::file``."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise config_error(path, BASE, f"expected a file name or a list of them, got {names!r}")
    bases = []
    for name in names:
        package, colons, within = name.partition("::")
        folder = _configs_of(package, path) if colons else path.parent
        base = Path(os.path.normpath(folder / utf8_name(within if colons else name)))
        if base.suffix == ".py" and path.suffix != ".py":
            raise config_error(path, BASE, f"a {path.suffix} file runs no code, so it cannot inherit from {base}")
        bases.append((base, package if colons else None))
    return bases


def _configs_of(package: str, path: Path) -> Path:
    """The folder where an OpenMMLab package keeps its configs; the package is not imported."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise config_error(path, BASE, f"{package}::...: there is no installed package {package!r}")
    return Path(spec.submodule_search_locations[0]) / ".mim" / "configs"


def _scoped(value: Any, scope: str | None) -> Any:
    """``value`` with ``scope`` as the ``_scope_`` of its outermost dicts that have a type, as in MMEngine."""
    if scope is None:
        return value
    if isinstance(value, dict) and "type" in value:
        return {"_scope_": scope, **value}
    if isinstance(value, dict):
        return {key: _scoped(item, scope) for key, item in value.items()}
    return type(value)(_scoped(item, scope) for item in value) if type(value) in (list, tuple) else value
