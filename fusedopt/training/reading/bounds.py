"""Bounds on what a file may hold; torch's, MMEngine's and other trainers' files are far below."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from ..errors import CheckpointError

__all__ = ["check_extent", "checked_integer", "checked_key"]

MOST_LEVELS = 100
MOST_VALUES = 10_000_000
MOST_BITS = 4096
MOST_IN_A_KEY = 64


def checked_integer(value: Any) -> Any:
    """``value``, which is not an integer that takes long to compute with or to print."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise CheckpointError(f"it has an integer of {value.bit_length()} bits; {MOST_BITS} are allowed")
    return value


def checked_key(value: Any) -> Any:
    """``value``, which is to be a key. Python computes hashes recursively and without bounds, so keys are bounded."""
    pending, seen = [value], 0
    while pending:
        item = pending.pop()
        seen += 1
        if isinstance(item, (tuple, frozenset)):
            pending.extend(item)
        elif isinstance(item, (list, dict, set, bytearray, complex)):
            raise CheckpointError(f"it has a {type(item).__name__} as a key")
        elif isinstance(item, int) and item.bit_length() > 64:  # for larger ones, equal hashes could be chosen
            raise CheckpointError("it has an integer of more than 64 bits as a key")
        if seen + len(pending) > MOST_IN_A_KEY:
            raise CheckpointError(f"it has a key of more than {MOST_IN_A_KEY} values")
    return value


def check_extent(value: Any) -> None:
    """Raise CheckpointError if ``value`` is nested too deeply, contains itself, or is large when sharing is undone.

    Args:
        value: plain containers; stand-ins are not looked into.
    """
    # The extents of containers by id, (levels, values); None while they are being computed.
    extents: dict[int, tuple[int, int] | None] = {}
    pending = [(value, False)] if _is_container(value) else []
    depth = 0
    while pending:
        container, counted = pending.pop()
        if not counted and id(container) in extents:
            continue
        inside = [item for item in _items(container) if _is_container(item)]
        depth += -1 if counted else 1
        if not counted:
            extents[id(container)] = None
            pending.append((container, True))
            if any(extents.get(id(item), ()) is None for item in inside):
                raise CheckpointError("it has a value that contains itself")
            pending += [(item, False) for item in inside if id(item) not in extents]
            if depth > MOST_LEVELS:
                raise CheckpointError(f"it is nested more than {MOST_LEVELS} levels deep")
            continue
        known = [extent for item in inside if (extent := extents[id(item)])]
        levels = 1 + max((each[0] for each in known), default=0)
        values = len(container) + sum(each[1] for each in known)
        if levels > MOST_LEVELS or values > MOST_VALUES:
            raise CheckpointError(
                f"it is nested more than {MOST_LEVELS} levels deep, or has more than {MOST_VALUES:,} values"
            )
        extents[id(container)] = levels, values


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > 0


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value, value.values())
    return value if _is_container(value) else ()
