"""Finds the weights in what a file holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...messages import one_line, some
from ..errors import CheckpointError
from .files import Contents
from .standins import StandIn

__all__ = ["Weights", "find_weights"]

#: Keys under which trainers save a state dict or a module, those of MMEngine and Lightning first.
WEIGHT_KEYS = ("state_dict", "model", "model_state_dict", "module", "net", "params")

#: Bounds on a model that was saved as an object: characters of all names, shared modules counted each time, and of one.
MOST_CHARACTERS = 50_000_000
LONGEST_NAME = 10_000


@dataclass
class Weights:
    """The weights in a file.

    Attributes:
        state_dict: tensors, and plain values of modules with extra state, by name; with the versions that torch
            attaches to a state dict, if the file has them.
        key: where they were found; None if the file holds nothing else.
        left_out: what else is in the file, in words.
    """

    state_dict: OrderedDict[str, Any]
    key: str | None
    left_out: list[str] = field(default_factory=list)

    def told(self, loaded: int | None = None) -> str:
        """One line: how many weights, from where, and what was left out.

        Args:
            loaded: number of weights that were loaded; all by default.
        """
        told = f"{len(self.state_dict)} weights"
        told = told if loaded in (None, len(self.state_dict)) else f"{loaded} of {told}"
        told += "" if self.key is None else f" from its {self.key!r}"
        return told + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")


def find_weights(contents: Contents) -> Weights:
    """The state dict in a file: under one of the usual keys, the whole file, or that of a model saved as an object.

    Raises:
        CheckpointError: there is none.
    """
    value = contents.value
    entries = _entries(value)
    for key in WEIGHT_KEYS:
        found = _state_dict(entries.get(key))
        if _has_tensors(found):
            return _weights(contents, found, key, [other for other in entries if other != key])
    found = _state_dict(value)
    if not _has_tensors(found):
        what = f"a {one_line(value.name if isinstance(value, StandIn) else type(value).__name__, 200)}"
        what += f" with {some(list(entries))}" if entries else ""
        keys = ", ".join(map(repr, WEIGHT_KEYS))
        raise CheckpointError(
            f"{contents.path} has no weights: it holds {what}, and no tensors at its top or under {keys}"
        )
    return _weights(contents, found, None, [])


def _weights(contents: Contents, found: Mapping[Any, Any], key: str | None, others: list[Any]) -> Weights:
    dropped = {str(name): value.name for name, value in found.items() if isinstance(value, StandIn)}
    names = [name for name, value in found.items() if not isinstance(value, StandIn)]
    kept: Any = OrderedDict((str(name), found[name]) for name in names)
    if len(kept) != len(names):
        raise CheckpointError(f"{contents.path} has no weights that can be told apart: of two names one is text")
    if hasattr(found, "_metadata"):
        kept._metadata = found._metadata
    left_out = [some(others, 10)] if others else []
    left_out += [some(list(dropped), told=lambda name: f"{name} ({dropped[name]})")] if dropped else []
    left_out += [f"objects of {some(list(contents.not_built))}"] if contents.not_built else []
    return Weights(kept, key, left_out)


def _entries(value: Any) -> Mapping[Any, Any]:
    """The items of a dict, or of an object whose class is a kind of dict."""
    if isinstance(value, StandIn):
        return value.entries
    return value if isinstance(value, Mapping) else {}


def _has_tensors(state_dict: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state_dict.values())


def _state_dict(value: Any) -> Mapping[Any, Any]:
    """``value`` as a state dict: itself, or that of a module that was saved as an object."""
    if isinstance(value, StandIn) and _parts(value, "_parameters") is not None:
        return OrderedDict(_named_tensors(value))
    return _entries(value)


def _parts(module: Any, kind: str) -> Mapping[Any, Any] | None:
    """``_parameters``, ``_buffers`` or ``_modules`` of a module; None if it is not one."""
    state = module.state if isinstance(module, StandIn) else None
    parts = state.get(kind) if isinstance(state, Mapping) else None
    return parts if isinstance(parts, Mapping) else None


def _named_tensors(module: StandIn) -> Iterator[tuple[str, Any]]:
    """The entries of the state dict that a module would have; a part of it that is no module is an entry, too."""
    pending = [("", module)]
    characters = 0
    while pending:
        prefix, each = pending.pop()
        passing = each.state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in (_parts(each, kind) or {}).items():
                if value is not None and not (isinstance(passing, set) and kind == "_buffers" and name in passing):
                    characters += len(prefix) + 10
                    yield f"{prefix}{name}", value
        children = list((_parts(each, "_modules") or {}).items())
        characters += sum(len(prefix) + 10 for _ in children)
        if characters > MOST_CHARACTERS or len(prefix) > LONGEST_NAME:
            raise CheckpointError("a model with too many modules, or modules that are nested too deeply")
        for name, child in children:
            if _parts(child, "_parameters") is None and isinstance(child, StandIn):
                yield f"{prefix}{name}", child
        parts = [(f"{prefix}{name}.", child) for name, child in children if _parts(child, "_parameters") is not None]
        pending += reversed(parts)
