"""Loading of a Python config file."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ..registry import check_config

__all__ = ["ConfigError", "load_config"]


class ConfigError(ValueError):
    """A config cannot be used; the message, one line, names the file and what is wrong."""


def _last_line_in(path: Path, error: Exception) -> int | None:
    """The line of the config file that ``error`` came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def _section(path: Path, config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    key = name.rpartition(".")[2]
    if key not in config:
        raise ConfigError(f"{path}: no `{name}`; expected {name} = dict(...)")
    try:
        check_config(name, config[key])
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config[key]


def load_config(path: str | Path) -> dict[str, Any]:
    """Run a Python config file and return its names, without modules and those that begin with an underscore.

    The file is Python and runs as such, with everything that Python may do: load only files you trust.

    Args:
        path: the file; it must set ``model`` and ``optim_wrapper``, dicts, the latter with an ``optimizer`` dict.

    Raises:
        ConfigError: the file is missing, is not valid Python, fails when run, or lacks one of these keys.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config file: {error.strerror}") from error
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    try:
        exec(compile(source, str(path), "exec"), namespace)
    except SyntaxError as error:
        where = path if error.filename in (None, str(path)) else error.filename
        raise ConfigError(f"{where}:{error.lineno or 1}: syntax error: {error.msg}") from error
    except Exception as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{path}:{_last_line_in(path, error) or 1}: {type(error).__name__}: {message}") from error
    config = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    _section(path, config, "model")
    _section(path, _section(path, config, "optim_wrapper"), "optim_wrapper.optimizer")
    return config
