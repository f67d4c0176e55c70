"""Import paths: from a path to its object and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

__all__ = ["dotted_name", "import_dotted", "import_registry_of"]


def import_dotted(path: str) -> Any:
    """The object at an import path such as ``torch.optim.AdamW``, or None if there is none."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise  # the module is there, and imports one that is not
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def import_registry_of(scope: str) -> None:
    """Import ``scope.registry``, which adds a package's registries to the tree, if that module exists."""
    name = f"{scope}.registry"
    if not scope.isidentifier():
        return
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in (scope, name):
            raise  # the module is there, and imports one that is not


def dotted_name(target: Callable[..., Any]) -> str:
    """The import path of a class or function; the ``repr`` of another object."""
    name = getattr(target, "__qualname__", None)
    return repr(target) if name is None else f"{target.__module__}.{name}"
