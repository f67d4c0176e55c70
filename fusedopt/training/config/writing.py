"""Configs as text: their values in plain form, and as Python source."""

from __future__ import annotations

import keyword
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from .python_files import NO_SETTING

__all__ = ["is_argument", "python_source", "writable"]

_LINE_WIDTH = 100


def _import_path(value: Any) -> str | None:
    """The import path of a class or function, or None if it leads elsewhere."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    if found is None or not isinstance(value, NO_SETTING):
        return None
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return f"{value.__module__}.{value.__qualname__}" if found is value else None


def writable(
    value: Any, where: str, refuse: Callable[[str, str], NoReturn] | None, keys: tuple[type, ...] = (object,)
) -> Any:
    """``value`` as plain dicts, lists, tuples, numbers, strings, bools and None.

    Args:
        value: the value.
        where: its key.
        refuse: called with the key and the reason for a value without such a form; if None, its ``repr`` is used.
        keys: allowed types of dict keys.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        items = [writable(item, f"{where}.{index}", refuse, keys) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        for key in value:
            if refuse is not None and not isinstance(key, keys):
                refuse(where, f"the key {key!r} cannot be written there; expected a string")
        return {key: writable(item, f"{where}.{key}".lstrip("."), refuse, keys) for key, item in value.items()}
    path = _import_path(value)
    if path is None and refuse is not None:
        refuse(where, f"{value!r} cannot be written to a file")
    return path or repr(value)


def is_argument(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def python_source(settings: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_source(value)}\n" for key, value in settings.items())


def _source(value: Any, indent: str = "") -> str:
    """Python source of a writable value."""
    inner = f"{indent}    "
    if isinstance(value, dict):
        if all(map(is_argument, value)):
            opening, closing, items = "dict(", ")", [f"{key}={_source(item, inner)}" for key, item in value.items()]
        else:
            opening, closing = "{", "}"
            items = [f"{_source(key)}: {_source(item, inner)}" for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        items = [_source(item, inner) for item in value]
    elif isinstance(value, float) and not float("-inf") < value < float("inf"):
        return f"float({str(value)!r})"
    else:
        return repr(value)
    flat = opening + ", ".join(items) + ("," if isinstance(value, tuple) and len(items) == 1 else "") + closing
    if len(indent) + len(flat) <= _LINE_WIDTH and "\n" not in flat:
        return flat
    return "\n".join([opening, *(f"{inner}{item}," for item in items), indent + closing])
