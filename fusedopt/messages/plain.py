"""Numbers of other packages become Python numbers on entry, so that every checkpoint can be loaded again.

Note [Plain numbers]: Python code accepts NumPy's numbers everywhere, but ``torch.load(weights_only=True)`` rejects
them. So whatever enters ``param_groups``, ``defaults`` or a state dict is made plain at the edge: by
:func:`check_number` and :func:`check_whole_number`, which return it, and by :func:`plain` and :func:`plain_groups`.
Other code may write to ``param_groups`` between two steps, where no edge sees it; these numbers are made plain, in the
groups too, when a step reads them, when a scheduler changes them and when a state dict is made.
"""

from __future__ import annotations

import decimal
import numbers
from collections.abc import Iterable, Mapping, MutableMapping
from copy import copy
from typing import Any

from torch import Tensor

__all__ = ["plain", "plain_groups", "plain_settings"]

_PYTHONS = frozenset({float, int, bool, str, type(None), Tensor})


def plain(value: Any) -> Any:
    """``value`` as a Python float, int or bool if it is another type of number; otherwise unchanged.

    Other types of number are NumPy's scalars and 0-dim arrays, fractions, decimals, and subclasses of float and int
    other than enums. Tensors stay tensors.
    """
    kind = type(value)
    if kind in _PYTHONS or isinstance(value, Tensor):
        return value
    if isinstance(value, numbers.Integral):
        # An enum's member, or a bool that is not Python's, means more than its value.
        return value if hasattr(value, "name") else int(value)
    if isinstance(value, (numbers.Real, decimal.Decimal)):
        return float(value)
    # NumPy's, without importing NumPy: its bools and 0-dim arrays are not registered as numbers.Number.
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and hasattr(value, "item"):
        item = value.item()
        return item if type(item) in (float, int, bool) else value
    return value


def plain_settings(value: Any) -> Any:
    """As :func:`plain`, also inside dicts, lists and tuples, which are copied if something in them is not plain."""
    kind = type(value)
    if kind in _PYTHONS or (kind is tuple and _PYTHONS.issuperset(map(type, value))):  # nearly all there is
        return value
    if isinstance(value, Mapping):
        changed = {key: new for key, old in value.items() if (new := plain_settings(old)) is not old}
        if not changed:
            return value
        copied: Any = copy(value)  # keeps the class, such as ConfigDict
        for key, new in changed.items():  # one by one: a Counter's update() adds
            copied[key] = new
        return copied
    if kind in (list, tuple):
        items = [plain_settings(each) for each in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else kind(items)
    return plain(value)


def plain_groups(groups: Iterable[MutableMapping[str, Any]]) -> None:
    """Make the settings in parameter groups plain, in place; a list of settings stays the same list."""
    for group in groups:
        for key, value in group.items():
            if type(value) in _PYTHONS or key == "params":
                continue
            if type(value) is list:
                value[:] = [plain_settings(each) for each in value]
            else:
                group[key] = plain_settings(value)
