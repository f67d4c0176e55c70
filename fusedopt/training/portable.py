"""State in files: plain types for writing, and the original types after reading."""

from __future__ import annotations

import collections
import enum
import importlib
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..messages import plain

__all__ = ["as_before", "portable"]

# Note [Types on the way through a file]
# What is read of a checkpoint are dicts, lists, tuples, sets, OrderedDict, Counter, numbers, strings and tensors, as
# with weights_only=True. Everything else that a state may hold (a defaultdict, an enum, numpy's numbers and arrays) is
# written as a plain value. The object that loads a state has such a state itself, and so knows the types: a value from
# the file takes the type of the value that it replaces. So files that were written with other types load too.


def portable(value: Any) -> Any:
    """``value`` in types that ``torch.load(weights_only=True)`` reads; other values stay as they are.

    Args:
        value: dicts of any class, lists, tuples, sets, deques, enums, numpy's numbers and arrays, and plain values. Not
            changed.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str) or isinstance(value, Tensor):
        return value
    if isinstance(value, enum.Enum):
        return portable(value.value)
    value = plain(value)
    if isinstance(value, Mapping):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, (list, collections.deque)):
        return [portable(item) for item in value]
    if isinstance(value, tuple):
        # torch.Size can be read back.
        return value if kind.__module__.partition(".")[0] == "torch" else tuple(portable(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return {portable(item) for item in value}
    if kind.__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    for base in (int, float, str):  # a subclass, such as a string that compares without case
        if isinstance(value, base):
            return base(value)
    return value


def as_before(value: Any, before: Any) -> Any:
    """``value``, from a file, in the types of ``before``, which it replaces.

    Where the two do not correspond, ``value`` stays as it is. Neither is changed.

    Args:
        value: a state after :func:`portable`, and usually after a file.
        before: a corresponding state with the original types.
    """
    kind = type(before)
    if before is None or value is None or isinstance(before, Tensor) or isinstance(value, Tensor):
        return value
    if isinstance(before, enum.Enum):
        return _member(kind, value)
    if isinstance(before, Mapping):
        return _mapping_as_before(value, before) if isinstance(value, Mapping) else value
    if isinstance(before, (list, tuple, set, frozenset, collections.deque)):
        return _items_as_before(value, before)
    if kind.__module__.partition(".")[0] == "numpy":
        if kind.__name__ == "ndarray":
            return importlib.import_module("numpy").asarray(value, dtype=before.dtype)
        return kind(value) if isinstance(value, numbers.Number) else value
    if kind not in (bool, int, float, str) and isinstance(before, (int, float, str)) and not isinstance(value, kind):
        return kind(value)
    return value


def _member(kind: type[enum.Enum], value: Any) -> Any:
    """The enum member with this value."""
    if isinstance(value, kind):
        return value
    return next((member for member in kind if portable(member.value) == value), value)


def _mapping_as_before(value: Mapping[Any, Any], before: Mapping[Any, Any]) -> Any:
    # If all keys have one type, keys from the file take it: enums, or integers that JSON made strings.
    kinds = {type(key) for key in before}
    kind = kinds.pop() if len(kinds) == 1 else None

    def key_as_before(key: Any) -> Any:
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return _member(kind, key)
        if kind is int and isinstance(key, str) and key.lstrip("-").isdecimal():
            return int(key)
        return key

    keys = {key: key_as_before(key) for key in value}
    # A value without a counterpart takes the type of the others, if they all have the same.
    examples = list(before.values())
    example = examples[0] if examples and len({type(item) for item in examples}) == 1 else None
    items = {keys[key]: as_before(item, before.get(keys[key], example)) for key, item in value.items()}
    if isinstance(before, collections.defaultdict):
        return collections.defaultdict(before.default_factory, items)
    try:
        return items if type(before) is dict else type(before)(items)  # type: ignore[call-arg]
    except TypeError:  # a dict class with another constructor
        return items


def _items_as_before(value: Any, before: Any) -> Any:
    if not isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return value
    old = list(before)
    example = old[0] if old and len({type(item) for item in old}) == 1 else None
    if isinstance(before, (set, frozenset)):
        items = [as_before(item, example) for item in value]
    else:
        items = [as_before(item, old[index] if index < len(old) else example) for index, item in enumerate(value)]
    kind = type(before)
    if isinstance(before, collections.deque):
        return collections.deque(items, before.maxlen)
    if hasattr(before, "_fields"):
        return kind(*items) if len(items) == len(old) else tuple(items)
    return kind(items)
