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

#: The most modules, nested and shared ones counted each time, in a model that was saved as an object.
MOST_MODULES = 1_000_000


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

    def told(self) -> str:
        """One line: how many weights, from where, and what was left out."""
        told = f"{len(self.state_dict)} weights"
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
    kept: Any = OrderedDict((str(name), value) for name, value in found.items() if not isinstance(value, StandIn))
    if isinstance(versions := getattr(found, "_metadata", None), dict):
        kept._metadata = versions
    dropped = [f"{name} ({value.name})" for name, value in found.items() if isinstance(value, StandIn)]
    left_out = [some(others, 10)] if others else []
    left_out += [some(dropped)] if dropped else []
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
    """The entries of the state dict that a module would have."""
    pending = [("", module)]
    seen = 0
    while pending:
        prefix, each = pending.pop()
        seen += 1
        if seen > MOST_MODULES or prefix.count(".") > 100:
            raise CheckpointError("a model with too many modules, or modules that are nested too deeply")
        passing = each.state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in (_parts(each, kind) or {}).items():
                if value is not None and not (isinstance(passing, set) and kind == "_buffers" and name in passing):
                    yield f"{prefix}{name}", value
        children = [(f"{prefix}{name}.", child) for name, child in (_parts(each, "_modules") or {}).items()]
        pending += [(name, child) for name, child in reversed(children) if _parts(child, "_parameters") is not None]
