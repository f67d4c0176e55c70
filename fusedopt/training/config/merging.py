"""Merging a config into what it inherits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .naming import config_error

__all__ = ["merged"]

#: A dict with this key replaces what it would be merged into.
_DELETE = "_delete_"


def _without_directives(value: Any) -> Any:
    """``value`` without ``_delete_`` keys, for where nothing is inherited."""
    if isinstance(value, dict):
        return {key: _without_directives(item) for key, item in value.items() if key != _DELETE}
    return type(value)(map(_without_directives, value)) if type(value) in (list, tuple) else value


def merged(base: Any, new: Any, where: str, filename: str | Path | None, allow_list_keys: bool = False) -> Any:
    """``new`` merged into ``base``, in a copy; ``where`` is the key of both."""
    if not isinstance(new, dict) or new.get(_DELETE):
        return _without_directives(new)
    changes = {key: value for key, value in new.items() if key != _DELETE}

    def over(old: Any, key: Any) -> Any:
        return merged(old, changes[key], f"{where}.{key}".lstrip("."), filename, allow_list_keys)

    if isinstance(base, dict):
        replaced = {key: over(base[key], key) if key in base else _without_directives(changes[key]) for key in changes}
        return {**base, **replaced}
    if not (allow_list_keys and isinstance(base, (list, tuple))):
        raise config_error(
            filename,
            where,
            f"a dict cannot be merged into {base!r}, which is not a dict; `{_DELETE}=True` in the dict makes it "
            "replace what is there",
        )
    items = list(base)
    for key in changes:
        if not (isinstance(key, str) and key.isdecimal() and int(key) < len(items)):
            raise config_error(
                filename, f"{where}.{key}", f"expected an index below {len(items)}, the length of the list"
            )
        items[int(key)] = over(items[int(key)], key)
    return type(base)(items)
