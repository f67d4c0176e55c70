"""ConfigDict: a dict whose items are attributes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from ...messages import did_you_mean

__all__ = ["MOST_LEVELS", "ConfigDict", "levels"]

#: How deep a config may be nested, which keeps every recursion over it below Python's limit.
MOST_LEVELS = 100


class ConfigDict(dict[str, Any]):
    """A dict whose items are also attributes, as ``mmengine.ConfigDict``.

    Every dict put into it, even in a list or tuple, is copied to a ConfigDict, so that changes to the config do not
    change the original. :meth:`update` merges dicts that both sides have. An item with the name of a method can only be
    read as ``config['items']``.

    Args:
        args, kwargs: items, as of a dict.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.update(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, _converted(value))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = [key for key in self if isinstance(key, str)]
            hint = f"; {did_you_mean(name, known)}" if known and not name.startswith("__") else ""
            raise AttributeError(f"the config has no {name!r} here{hint}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"{name!r} belongs to {type(self).__name__}; an item is set with [{name!r}]")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            self.__getattr__(name)
        del self[name]

    def __ior__(self, other: Any) -> ConfigDict:  # type: ignore[override,misc]
        for key, value in dict(other).items():
            self[key] = value
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As ``dict.update``, but a dict value updates an existing dict."""
        for key, value in dict(*args, **kwargs).items():
            if isinstance(self.get(key), ConfigDict) and isinstance(value, Mapping):
                self[key].update(value)
            else:
                self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As ``dict.setdefault``."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> ConfigDict:
        """A copy that shares no dicts, lists or tuples with this one."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, including those inside lists and tuples."""
        return _plain(self)


def levels(value: Any) -> int:
    """How deep ``value`` is nested in dicts, lists and tuples; deeper than ``MOST_LEVELS`` counts as one level more."""
    containers = [value]
    for level in range(MOST_LEVELS + 1):
        containers = [each for each in containers if isinstance(each, (dict, list, tuple))]
        if not containers:
            return level
        containers = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    return MOST_LEVELS + 1


def _converted(value: Any) -> Any:
    if isinstance(value, ConfigDict) or type(value) in (dict, OrderedDict):
        return ConfigDict(value)
    return type(value)(map(_converted, value)) if type(value) in (list, tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value
