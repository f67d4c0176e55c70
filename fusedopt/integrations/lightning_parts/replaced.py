"""Methods of one object, replaced for a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from ..scalers import give_scaler_back, take_scaler

__all__ = ["is_replaced", "replace_methods", "restore_methods"]

#: By object: the methods that it got, what was in their place in the object itself, and the scaler that was taken.
_replaced: WeakKeyDictionary[Any, tuple[dict[str, Any], dict[str, Any], Any]] = WeakKeyDictionary()


def is_replaced(target: Any) -> bool:
    """Whether methods of the object are replaced."""
    return target in _replaced


def replace_methods(target: Any, scaler: Any, **methods: Callable[..., Any]) -> None:
    """Give one object other methods, and make its scaler a fused one. What was replaced before is restored first."""
    restore_methods(target)
    own = vars(target)
    _replaced[target] = methods, {name: own[name] for name in methods if name in own}, scaler
    own.update(methods)
    take_scaler(scaler)


def restore_methods(target: Any) -> None:
    """Undo :func:`replace_methods`; without it nothing happens. What somebody else has replaced since stays."""
    methods, before, scaler = _replaced.pop(target, ({}, {}, None))
    own = vars(target)
    for name, method in methods.items():
        if own.get(name) is method:
            del own[name]
            if name in before:
                own[name] = before[name]
    give_scaler_back(scaler)
