"""Weights from a file into a model: their names, whether they fit, and loading them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ...messages import some
from ..errors import CheckpointError
from ..portable import as_before
from ..sharding import sharded_as
from ..unwrapping import bare_state_dict, fitted_state_dict

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["check_fit", "check_weights", "load_weights", "misfit", "with_versions"]

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def check_weights(runner: Runner, filename: str | Path, checkpoint: dict[str, Any], strict: bool) -> None:
    """Raise CheckpointError unless the weights fit the model; give them the names that they have there.

    Args:
        runner: the runner with the model.
        filename: the file, for messages.
        checkpoint: its ``state_dict`` is replaced.
        strict: require all weights; otherwise, a warning lists those that do not fit.
    """
    weights = checkpoint["state_dict"]
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{filename} has no weights: no tensors in its 'state_dict', or in all of it")
    own = bare_state_dict(runner.model)
    taken = fitted_state_dict(with_versions({str(name): value for name, value in weights.items()}, weights), own)
    prefix = _prefix(filename, taken, own)
    if prefix:
        runner.logger.info(f"{filename}: the prefix {prefix!r} of the weights' names is removed")
        inside: Any = with_versions({name: taken[name] for name in taken if name.startswith(prefix)}, taken)
        rest = [name for name in taken if not name.startswith(prefix)]
        consume_prefix_in_state_dict_if_present(inside, prefix)
        taken = with_versions({**{name: taken[name] for name in rest if name not in inside}, **inside}, inside)
    checkpoint["state_dict"] = taken
    differences = check_fit(taken, own)
    if differences and (strict or not any(name in own for name in _loadable(taken, own))):
        raise CheckpointError(f"{filename} does not fit the model: {'; '.join(differences)}")
    if differences:
        runner.logger.warning(f"{filename} does not fit the model: {'; '.join(differences)}")


def _prefix(filename: str | Path, weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The prefix under which ``weights`` have at least half of the model's names, if more than without; or ``''``.

    Raises:
        CheckpointError: two prefixes fit equally well.
    """
    fitting: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) + "." for count in range(1, min(len(parts), 10)))
        fitting.update(prefix for prefix in prefixes if name.removeprefix(prefix) in own)
    (first, most), (second, next_most) = [*fitting.most_common(2), ("", 0), ("", 0)][:2]
    if 2 * most < len(own) or most <= sum(name in own for name in weights):
        return ""
    if most == next_most:
        raise CheckpointError(
            f"{filename} does not fit the model: its names fit without {first!r}, and as well without {second!r}"
        )
    return first


def load_weights(runner: Runner, checkpoint: Mapping[str, Any]) -> int:
    """Load the weights, except those that do not fit the model; return how many were loaded."""
    model = runner.bare_model
    own = bare_state_dict(model)
    fitting = _loadable(checkpoint["state_dict"], own)
    known = model.state_dict()
    model.load_state_dict(sharded_as(fitted_state_dict(fitting, known), known), strict=False)
    return sum(name in own for name in fitting)


def _loadable(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The entries to pass to the model whose state dict is ``own``; it may accept old names too."""
    fitting = {
        name: as_before(value, own.get(name))
        for name, value in state_dict.items()
        if name not in own or misfit(value, own[name]) is None
    }
    return with_versions(fitting, state_dict)


def with_versions(state_dict: Mapping[str, Any], source: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """``state_dict`` with the versions of modules that torch attaches to ``source``."""
    noted: Any = OrderedDict(state_dict)
    if hasattr(source, "_metadata"):
        noted._metadata = copy(source._metadata)
    return noted


def check_fit(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Why ``state_dict`` does not fit the model whose state dict is ``own``: a clause for each kind of difference."""
    others = [f"{name} {told}" for name in own if name in state_dict and (told := misfit(state_dict[name], own[name]))]
    missing = [name for name in own if name not in state_dict]
    unknown = [name for name in state_dict if name not in own]
    clauses = [f"it lacks {some(missing)}"] if missing else []
    clauses += [f"it has {some(unknown)}, which the model does not have"] if unknown else []
    return clauses + ([some(others)] if others else [])


def misfit(value: Any, own: Any) -> str | None:
    """Why ``value`` cannot be copied into ``own``, an entry of a state dict; None if it can."""
    if not isinstance(own, Tensor):
        return None if not isinstance(value, Tensor) else f"has {_shape(value)} instead of {_shape(own)}"
    if not isinstance(value, Tensor) or value.shape != own.shape:
        return f"has {_shape(value)} instead of {_shape(own)}"
    if value.layout != own.layout:
        return f"is {value.layout} instead of {own.layout}"
    if value.dtype != own.dtype and (value.is_complex() != own.is_complex() or not _is_number(value.dtype)):
        return f"is {value.dtype} instead of {own.dtype}"
    return None


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or dtype in _WHOLE


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
