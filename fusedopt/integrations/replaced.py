"""Methods of one object, replaced for a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .scalers import give_scaler_back, take_scaler

__all__ = ["is_replaced", "replace_methods", "restore_methods"]

#: Where the object has what it needs to be as before: its new methods, those that were in their place in the object
#: itself, and the scaler. A table by objects would keep them alive, since the methods know the object.
_RECORD = "_fusedopt_replaced"


def is_replaced(target: Any) -> bool:
    """Whether methods of the object are replaced."""
    return _RECORD in vars(target)


def replace_methods(target: Any, methods: Mapping[str, Callable[..., Any]], scaler: Any = None) -> None:
    """Give one object other methods, and make a scaler a fused one. What was replaced before is restored first."""
    restore_methods(target)
    own = vars(target)
    own[_RECORD] = methods, {name: own[name] for name in methods if name in own}, scaler
    own.update(methods)
    take_scaler(scaler)


def restore_methods(target: Any) -> None:
    """Undo :func:`replace_methods`; without it nothing happens. What somebody else has replaced since stays."""
    own = vars(target)
    methods, before, scaler = own.pop(_RECORD, ({}, {}, None))
    for name, method in methods.items():
        if own.get(name) is method:
            del own[name]
            if name in before:
                own[name] = before[name]
    give_scaler_back(scaler)
