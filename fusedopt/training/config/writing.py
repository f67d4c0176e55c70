"""Configs as text: their values in plain form, and as Python source."""

from __future__ import annotations

import keyword
import os
import sys
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from ...messages import plain
from .placeholders import has_placeholder
from .python_files import NO_SETTING

__all__ = ["first_difference", "is_argument", "python_source", "writable"]

_LINE_WIDTH = 100

#: Methods that return the value of a subclass, such as an Enum's member, which may have its own ``__str__``.
_VALUE_OF: dict[type, Callable[[Any], Any]] = {int: int.__int__, float: float.__float__, str: str.__str__}


def _import_path(value: Any) -> str | None:
    """The import path of a class or function, or None if it leads elsewhere."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    if found is None or not isinstance(value, NO_SETTING):
        return None
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return f"{value.__module__}.{value.__qualname__}" if found is value else None


def _scalar(value: Any) -> Any:
    """A number or string as Python's own, without its class; other values unchanged."""
    if isinstance(value, bool):
        return value
    for kind, value_of in _VALUE_OF.items():
        if isinstance(value, kind):
            return value_of(value)
    try:
        number = plain(value)  # NumPy's, fractions and decimals
    except (OverflowError, ValueError):  # beyond the range of floats
        return value
    return number if number is not value and (number == value or number != number) else value


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
    value = _scalar(value)
    if isinstance(value, os.PathLike) and isinstance(name := os.fspath(value), str):
        value = name
    if isinstance(value, str) and refuse is not None and has_placeholder(value):
        refuse(where, f"{value!r} holds a placeholder, which would be replaced when the file is read")
    if isinstance(value, int):
        try:
            repr(value)
        except ValueError as error:
            return hex(value) if refuse is None else refuse(where, str(error))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [writable(item, f"{where}.{index}", refuse, keys) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        written = {}
        for key, item in value.items():
            key = _scalar(key)
            if refuse is not None:
                writable(key, where, refuse)
                if not isinstance(key, keys):
                    refuse(where, f"the key {key!r} cannot be written there; expected a string")
            written[key] = writable(item, f"{where}.{key}".lstrip("."), refuse, keys)
        return written
    path = _import_path(value)
    if path is None and refuse is not None:
        refuse(where, f"{value!r} cannot be written to a file")
    return path or repr(value)


def first_difference(written: Any, read: Any, where: str = "") -> str | None:
    """The key of the first value that was read back differently, or None. Tuples may come back as lists."""
    if isinstance(written, dict) and isinstance(read, dict):
        found = {repr(key): item for key, item in read.items()}
        for key, item in written.items():
            name = f"{where}.{key}".lstrip(".")
            if repr(key) not in found:
                return name
            if (difference := first_difference(item, found.pop(repr(key)), name)) is not None:
                return difference
        return where if found else None
    if isinstance(written, (list, tuple)) and isinstance(read, (list, tuple)) and len(written) == len(read):
        pairs = enumerate(zip(written, read, strict=True))
        differences = (first_difference(*pair, f"{where}.{index}") for index, pair in pairs)
        return next((each for each in differences if each is not None), None)
    return None if repr(written) == repr(read) else where


def is_argument(key: Any) -> bool:
    """Whether Python reads ``key=...`` as this key."""
    if not isinstance(key, str) or not key.isidentifier() or keyword.iskeyword(key) or key == "__debug__":
        return False
    return unicodedata.normalize("NFKC", key) == key  # as Python reads identifiers


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
