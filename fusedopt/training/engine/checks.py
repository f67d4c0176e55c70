"""Whether a run can be resumed from a checkpoint; everything is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...messages import one_line, some
from ..errors import CheckpointError
from ..sharding import has_shards
from ..unwrapping import bare_state_dict, named_parameters
from ..wrappers import OptimWrapper, OptimWrapperDict
from .checkpoint import unloadable_parts
from .random_states import check_random_states
from .weights import check_weights, misfit

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["check_training", "optimizer_names", "wrappers_by_name"]

_META_KEYS = ("epoch", "iter", "position", "validation_due", "seed", "by_epoch", "epoch_length", "optimizers")
_UNITS = {True: "epochs", False: "iterations"}


def wrappers_by_name(runner: Runner) -> dict[str, OptimWrapper]:
    """The optimizer wrappers by name; a single one has the name ``''``."""
    wrapper = runner.optim_wrapper
    assert wrapper is not None
    return dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {"": wrapper}


def optimizer_names(runner: Runner) -> dict[str, str]:
    """The class name of each optimizer, without ``Fused``, by the name of its wrapper."""
    names = {}
    for name, wrapper in wrappers_by_name(runner).items():
        optimizer = getattr(wrapper.optimizer, "optim", wrapper.optimizer)  # inside a ZeroRedundancyOptimizer
        names[name] = type(optimizer).__name__.removeprefix("Fused")
    return names


def check_training(runner: Runner, filename: str | Path, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint fits this run and has everything that resuming needs."""
    loop = runner.train_loop
    assert loop is not None
    kinds: dict[str, Any] = dict.fromkeys(("meta", "state_dict", "message_hub", "optimizer", "accumulation"), Mapping)
    kinds["processes"] = list
    if checkpoint.get("gradients") is not None:  # only of sharded models, in the middle of an accumulation
        kinds["gradients"] = Mapping
    if runner.param_schedulers is not None and not runner.resume_overrides:
        kinds["param_schedulers"] = (Mapping, list)
    missing = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if "meta" not in missing:
        missing += [f"meta[{key!r}]" for key in _META_KEYS if key not in checkpoint["meta"]]
    if missing:
        raise CheckpointError(
            f"{filename} cannot be resumed from: it lacks {', '.join(missing)}. load_from without resume loads "
            "only the weights"
        )
    for part in unloadable_parts(checkpoint, "checkpoint"):
        raise CheckpointError(f"{filename} cannot be resumed from: {one_line(part, 300)} is neither a tensor nor plain")
    meta = checkpoint["meta"]
    names = wrappers_by_name(runner).keys()
    if set(checkpoint["accumulation"]) != set(names):
        found, expected = (some(list(filter(None, each))) or "one" for each in (checkpoint["accumulation"], names))
        raise CheckpointError(f"{filename} is from other optimizers: {found} instead of {expected}")
    _check_kinds(filename, checkpoint)
    if meta["by_epoch"] != loop.by_epoch:
        raise CheckpointError(
            f"{filename} is from training by {_UNITS[meta['by_epoch']]}, but this run is by {_UNITS[loop.by_epoch]}"
        )
    if meta["optimizers"] != (own := optimizer_names(runner)):
        raise CheckpointError(
            f"{filename} is from other optimizers: {one_line(meta['optimizers'], 300)} instead of {own}"
        )
    check_weights(runner, filename, checkpoint, strict=True)
    if len(checkpoint["processes"]) == runner.world_size:
        _check_process(runner, filename, checkpoint["processes"][runner.rank])
    parameters = _parameters(runner)
    _check_tensors(filename, "gradients", checkpoint.get("gradients") or {}, parameters)
    if has_shards(parameters.values()):  # they get the mean of all processes
        for process in checkpoint["processes"]:
            _check_tensors(filename, "gradients", process["gradients"], parameters)
    if meta["epoch_length"] != len(loop.dataloader):
        runner.logger.warning(
            f"{filename} is from a run with {meta['epoch_length']} batches in an epoch, but this run has "
            f"{len(loop.dataloader)}: it continues with other data"
        )


def _check_kinds(filename: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError if an entry that is loaded without further checks has the wrong type."""
    meta = checkpoint["meta"]
    count = dict.fromkeys(("epoch", "iter", "seed", "epoch_length"), int)
    wanted: dict[str, tuple[Any, dict[str, Any]]] = {
        "meta": (meta, {**count, "by_epoch": bool, "validation_due": bool, "optimizers": Mapping}),
        "meta['position']": (meta["position"], {"passes": int, "batches": int}),
        "accumulation": (checkpoint["accumulation"], dict.fromkeys(checkpoint["accumulation"], int)),
    }
    for rank, process in enumerate(checkpoint["processes"]):
        parts = dict.fromkeys(("random", "pass_random", "gradients", "buffers"), Mapping)
        wanted[f"processes[{rank}]"] = process, parts
    for name, (value, kinds) in wanted.items():
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{filename} cannot be resumed from: {name} is {_told(value)}, not a dict")
        for key, kind in kinds.items():
            item = value.get(key)
            if not isinstance(item, kind) or (kind is int and (isinstance(item, bool) or item < 0)):
                expected = {int: "a whole number of at least 0", bool: "True or False"}.get(kind, "a dict")
                raise CheckpointError(
                    f"{filename} cannot be resumed from: {name}[{key!r}] is {_told(item)}; expected {expected}"
                )


def _check_process(runner: Runner, filename: str | Path, process: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the state of this process can be loaded."""
    for key in ("random", "pass_random"):
        try:
            check_random_states(process[key])
        except Exception as error:  # whatever a generator raises
            raise CheckpointError(
                f"{filename} cannot be resumed from: the states of random generators in {key!r} are not as they were "
                f"written ({type(error).__name__}: {one_line(error, 200)})"
            ) from error
    _check_tensors(filename, "gradients", process["gradients"], _parameters(runner))
    _check_tensors(filename, "buffers", process["buffers"], bare_state_dict(runner.bare_model))


def _parameters(runner: Runner) -> dict[str, Tensor]:
    return {name: param for name, param in named_parameters(runner.bare_model) if isinstance(param, Tensor)}


def _check_tensors(filename: str | Path, part: str, tensors: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in tensors.items():
        told = misfit(value, own[name]) if name in own else None
        if told is not None or not isinstance(name, str):
            raise CheckpointError(
                f"{filename} cannot be resumed from: {part}[{one_line(name, 100)!r}] {told or 'has no such name'}"
            )


def _told(value: Any) -> str:
    """A number or text as it is; what else may be long, by its type."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return one_line(repr(value), 80)
    return f"a {type(value).__name__}"
