"""Bounds on what a file may hold; torch's, MMEngine's and other trainers' files are far below."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from ..errors import CheckpointError
from .standins import StandIn

__all__ = ["Budget", "check_extent", "checked_integer"]

MOST_LEVELS = 100
MOST_VALUES = 10_000_000
MOST_CONTAINERS = 1_000_000
MOST_BITS = 4096
MOST_IN_A_KEY = 64
LONGEST_KEY = 4096
#: Integers up to here are cheap as keys; an attacker would have too few of them to choose from.
SMALL_KEY = 2**20


def checked_integer(value: Any) -> Any:
    """``value``, which is not an integer that takes long to compute with or to print."""
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise CheckpointError(f"it has an integer of {value.bit_length()} bits; {MOST_BITS} are allowed")
    return value


class Budget:
    """What reading a file may cost, in bytes that are copied or compared.

    A pickle of a few bytes can refer to a long text again and again, and each time have it copied or compared.

    Args:
        size: bytes of the file.
    """

    def __init__(self, size: int):
        self._left = 256 * size + 2**24

    def charge(self, cost: int) -> None:
        """Raise CheckpointError if the file has cost too much."""
        self._left -= cost
        if self._left < 0:
            raise CheckpointError("reading it would take far longer than its size explains")

    def charge_copy(self, value: Any) -> None:
        """Charge a copy of ``value``."""
        if isinstance(value, (str, bytes, bytearray)):
            self.charge(len(value))
        elif isinstance(value, (list, tuple, dict, set, frozenset)):
            self.charge(64 * len(value))

    def key(self, value: Any, there: int) -> Any:
        """``value`` as a key beside ``there`` others; a :class:`StandIn` for what is neither text nor a number.

        Hashes are computed recursively, and those of numbers can be chosen to be found slowly, hence the bounds.
        """
        if value is None or type(value) is bool or (type(value) is int and abs(value) <= SMALL_KEY):
            return value
        if isinstance(value, (str, bytes)):
            if len(value) > LONGEST_KEY:
                raise CheckpointError(f"it has a key of {len(value):,} characters; {LONGEST_KEY:,} are allowed")
            self.charge(len(value))
            return value
        self.charge(there)
        if isinstance(value, (tuple, frozenset)):
            self._check_parts(value)
        elif isinstance(value, (list, dict, set, bytearray)):
            raise CheckpointError(f"it has a {type(value).__name__} as a key")
        elif isinstance(value, int) and value.bit_length() > 64:
            raise CheckpointError("it has an integer of more than 64 bits as a key")
        elif not isinstance(value, (int, float)):
            return value if isinstance(value, StandIn) else StandIn(f"{type(value).__module__}.{type(value).__name__}")
        return value

    def _check_parts(self, value: Any) -> None:
        pending, seen = [value], 0
        while pending:
            item = pending.pop()
            seen += 1
            if isinstance(item, (tuple, frozenset)):
                pending.extend(item)
            elif not isinstance(item, (str, bytes, int, float, type(None))):
                raise CheckpointError(f"it has a {type(item).__name__} in a key")
            elif isinstance(item, (str, bytes)):
                self.charge(len(item))
            elif isinstance(item, int) and item.bit_length() > 64:
                raise CheckpointError("it has an integer of more than 64 bits in a key")
            if seen + len(pending) > MOST_IN_A_KEY:
                raise CheckpointError(f"it has a key of more than {MOST_IN_A_KEY} values")


def check_extent(value: Any) -> None:
    """Raise CheckpointError if ``value`` is nested too deeply, contains itself, or is large when sharing is undone.

    Args:
        value: plain containers; stand-ins are not looked into.
    """
    # By id of a container: levels, values and containers in it; None while these are being computed.
    extents: dict[int, tuple[int, int, int] | None] = {}
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
        containers = 1 + sum(each[2] for each in known)
        if levels > MOST_LEVELS or values > MOST_VALUES or containers > MOST_CONTAINERS:
            raise CheckpointError(
                f"it is nested more than {MOST_LEVELS} levels deep, or has more than {MOST_VALUES:,} values in "
                f"{MOST_CONTAINERS:,} lists and dicts"
            )
        extents[id(container)] = levels, values, containers


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset)) and len(value) > 0


def _items(value: Any) -> Iterable[Any]:
    return chain(value, value.values()) if isinstance(value, dict) else value
