"""Numbers of other packages become Python's where they come in, so that every checkpoint can be read again.

Note [Plain numbers]: NumPy's numbers pass for numbers everywhere in Python, and are refused by
``torch.load(weights_only=True)``. So what goes into ``param_groups``, ``defaults`` or a state dict is made plain at the
edge: by :func:`check_number` and :func:`check_whole_number`, which return it, by :func:`plain` and
:func:`plain_groups`. Others write to ``param_groups`` between two steps and no edge sees them; these numbers are made
plain, in the groups too, when a step reads them, when a scheduler moves them and when a state dict is made.
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
    """``value`` as a Python float, int or bool, if it is a number of another kind; else itself.

    Numbers of another kind are NumPy's scalars and arrays without dimensions, fractions, decimals, and subclasses of
    float and int other than enums. Tensors stay what they are.
    """
    kind = type(value)
    if kind in _PYTHONS or isinstance(value, Tensor):
        return value
    if isinstance(value, numbers.Integral):
        # An enum's member, or a bool that is not Python's, has a meaning beside its value.
        return value if hasattr(value, "name") else int(value)
    if isinstance(value, (numbers.Real, decimal.Decimal)):
        return float(value)
    # NumPy's, which is not imported for it: its bools and its arrays without dimensions are no numbers.Number.
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and hasattr(value, "item"):
        item = value.item()
        return item if type(item) in (float, int, bool) else value
    return value


def plain_settings(value: Any) -> Any:
    """As :func:`plain`, also within dicts, lists and tuples: these are copied where something in them is not plain."""
    if type(value) in _PYTHONS:
        return value
    if isinstance(value, Mapping):
        changed = {key: new for key, old in value.items() if (new := plain_settings(old)) is not old}
        if not changed:
            return value
        copied: Any = copy(value)  # a config's own kind of dict stays one
        for key, new in changed.items():  # a Counter's update adds
            copied[key] = new
        return copied
    if type(value) in (list, tuple):
        items = [plain_settings(each) for each in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return plain(value)


def plain_groups(groups: Iterable[MutableMapping[str, Any]]) -> None:
    """Make the settings in parameter groups plain, in place; a list of them stays the same list."""
    for group in groups:
        for key, value in group.items():
            if type(value) in _PYTHONS or key == "params":
                continue
            if type(value) is list:
                value[:] = [plain_settings(each) for each in value]
            else:
                group[key] = plain_settings(value)
