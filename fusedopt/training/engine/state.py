"""The contents of a checkpoint, and resuming from it; see Note [Resuming bit for bit]."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ...messages import one_line
from ...version import __version__
from ..config import Config
from ..portable import as_before, portable
from ..unwrapping import bare_state_dict, fitted_state_dict, named_parameters
from ..wrappers import OptimWrapper, OptimWrapperDict
from . import distributed
from .checkpoint import CheckpointError, check_fit, unloadable_parts
from .data import moved, reseed
from .overrides import GroupSettings, check_replay, replay_schedules
from .settings import differing, settings_of_text

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["check_training", "check_weights", "load_training", "load_weights", "training_state"]

_META_KEYS = ("epoch", "iter", "position", "validation_due", "seed", "by_epoch", "epoch_length", "optimizers")
_UNITS = {True: "epochs", False: "iterations"}


def training_state(
    runner: Runner, save_optimizer: bool, save_param_scheduler: bool, meta: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Make a checkpoint of the run; all processes must call this.

    Args:
        runner: a runner that trains.
        save_optimizer: include the optimizer's state and everything else that resuming needs.
        save_param_scheduler: include the schedulers' states.
        meta: entries of ``meta``; they override those made here.
    """
    loop = runner.train_loop
    assert loop is not None
    assert runner.optim_wrapper is not None
    weights = bare_state_dict(runner.model)
    for name, part in runner.message_hub.unsaved().items():
        runner.warn_once(
            f"The information {name!r} of the message hub is not saved, so a resumed run lacks it: {part} is neither "
            "a tensor nor a plain value"
        )
    checkpoint: dict[str, Any] = {
        "meta": {
            **portable(loop.progress()),
            "by_epoch": loop.by_epoch,
            "epoch_length": len(loop.dataloader),
            "seed": runner.seed,
            "optimizers": _optimizer_names(runner),
            "settings": dict(runner.settings_in_effect),
            "experiment_name": runner.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "cfg": runner.cfg.pretty_text if isinstance(runner.cfg, Config) else "",
            "fusedopt_version": __version__,
            **(meta or {}),
        },
        "state_dict": _with_versions(moved(portable(weights), "cpu"), weights),
        "message_hub": moved(runner.message_hub.state_dict(), "cpu"),
    }
    if save_optimizer:
        checkpoint["optimizer"] = moved(portable(runner.optim_wrapper.state_dict()), "cpu")
        checkpoint["accumulation"] = {name: each.inner_count for name, each in _wrappers(runner).items()}
        checkpoint["processes"] = distributed.gather(
            {
                **portable(loop.process_state()),
                "gradients": moved(_gradients(runner.bare_model), "cpu"),
                "buffers": moved(portable(_buffers(runner.bare_model)), "cpu"),
            }
        )
    if save_param_scheduler and runner.param_schedulers is not None:
        checkpoint["param_schedulers"] = _scheduler_states(runner.param_schedulers)
    return checkpoint


def check_weights(runner: Runner, filename: str | Path, checkpoint: dict[str, Any], strict: bool) -> None:
    """Raise CheckpointError unless the weights fit the model; give them the names that they have there."""
    weights = checkpoint["state_dict"]
    if not isinstance(weights, Mapping) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{filename} has no weights: no tensors in its 'state_dict', or in all of it")
    own = bare_state_dict(runner.model)
    taken = fitted_state_dict(_with_versions({str(name): value for name, value in weights.items()}, weights), own)
    consume_prefix_in_state_dict_if_present(taken, "module.")
    prefix = _prefix(filename, taken, own)
    if prefix:
        runner.logger.info(f"{filename}: the prefix {prefix!r} of the weights' names is removed")
        consume_prefix_in_state_dict_if_present(taken, prefix)
    checkpoint["state_dict"] = taken
    differences = check_fit(taken, runner.bare_model)
    if differences and (strict or not any(name in own for name in _loadable(runner.bare_model, taken))):
        raise CheckpointError(f"{filename} does not fit the model: {'; '.join(differences)}")
    if differences:
        runner.logger.warning(f"{filename} does not fit the model: {'; '.join(differences)}")


def _prefix(filename: str | Path, weights: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The prefix that the model's names have in ``weights``, as a part of a larger model; ``''`` without one.

    Raises:
        CheckpointError: there are several.
    """
    if any(name in own for name in weights):
        return ""
    fitting: Counter[str] = Counter()
    for name in weights:
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) + "." for count in range(1, min(len(parts), 10)))
        fitting.update(prefix for prefix in prefixes if name.removeprefix(prefix) in own)
    (first, most), (second, next_most) = [*fitting.most_common(2), ("", 0), ("", 0)][:2]
    if most and most == next_most:
        raise CheckpointError(
            f"{filename} does not fit the model: its names fit without {first!r}, and as well without {second!r}"
        )
    return first


def load_weights(runner: Runner, checkpoint: Mapping[str, Any]) -> None:
    """Load the weights, except those whose shape does not fit the model."""
    model = runner.bare_model
    weights = fitted_state_dict(_loadable(model, checkpoint["state_dict"]), model.state_dict())
    model.load_state_dict(weights, strict=False)


def check_training(runner: Runner, filename: str | Path, checkpoint: dict[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint fits this run and has everything that resuming needs."""
    loop = runner.train_loop
    assert loop is not None
    kinds: dict[str, Any] = dict.fromkeys(("meta", "state_dict", "message_hub", "optimizer", "accumulation"), Mapping)
    kinds["processes"] = list
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
    meta = checkpoint["meta"]
    if meta["by_epoch"] != loop.by_epoch:
        raise CheckpointError(
            f"{filename} is from training by {_UNITS[meta['by_epoch']]}, but this run is by {_UNITS[loop.by_epoch]}"
        )
    names = _wrappers(runner).keys()
    if set(checkpoint["accumulation"]) != set(names):
        found, expected = (", ".join(filter(None, each)) or "one" for each in (checkpoint["accumulation"], names))
        raise CheckpointError(f"{filename} is from other optimizers: {found} instead of {expected}")
    if meta["optimizers"] != (own := _optimizer_names(runner)):
        raise CheckpointError(f"{filename} is from other optimizers: {meta['optimizers']} instead of {own}")
    _check_kinds(filename, checkpoint)
    for part in unloadable_parts(checkpoint, "checkpoint"):
        raise CheckpointError(f"{filename} cannot be resumed from: {one_line(part, 300)} is neither a tensor nor plain")
    check_weights(runner, filename, checkpoint, strict=True)
    if meta["epoch_length"] != len(loop.dataloader):
        runner.logger.warning(
            f"{filename} is from a run with {meta['epoch_length']} batches in an epoch, but this run has "
            f"{len(loop.dataloader)}: it continues with other data"
        )


def _check_kinds(filename: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError if an entry that is loaded last has the wrong type."""
    wanted: dict[str, tuple[Any, dict[str, Any]]] = {
        "meta['position']": (checkpoint["meta"]["position"], {"passes": int, "batches": int}),
        "accumulation": (checkpoint["accumulation"], dict.fromkeys(checkpoint["accumulation"], int)),
    }
    for rank, process in enumerate(checkpoint["processes"]):
        parts = dict.fromkeys(("random", "pass_random", "gradients", "buffers"), Mapping)
        wanted[f"processes[{rank}]"] = process, parts
        for key in ("random", "pass_random"):
            states = process.get(key) if isinstance(process, Mapping) else None
            wanted[f"processes[{rank}][{key!r}]"] = states, {"python": tuple, "torch": Tensor}
    for name, (value, kinds) in wanted.items():
        if not isinstance(value, Mapping) or any(not isinstance(value.get(key), kind) for key, kind in kinds.items()):
            raise CheckpointError(f"{filename} cannot be resumed from: {name} is not as it was written: {value!r:.80}")


def load_training(runner: Runner, filename: str | Path, checkpoint: dict[str, Any]) -> None:
    """Resume from a checkpoint that has passed :func:`check_training`.

    Raises:
        CheckpointError: a part of it cannot be loaded. Nothing has been loaded then, except by hooks that act before
            one that fails.
    """
    loop, wrapper = runner.train_loop, runner.optim_wrapper
    assert loop is not None
    assert wrapper is not None
    before = _settings_before(checkpoint["meta"])
    edits = None if before is None else differing(before, runner.settings)
    # Without edits the schedulers' states are loaded, if the file has them.
    overrides = runner.resume_overrides and (edits is None or bool(edits) or "param_schedulers" not in checkpoint)
    if overrides:
        check_replay(runner, filename)
    with _restored_on_error(runner, filename):
        built = GroupSettings(wrapper)
        state = as_before(checkpoint["optimizer"], wrapper.state_dict())
        if overrides and any(".loss_scale." in key for key in edits or ()):
            state = _without_scalers(state)
        wrapper.load_state_dict(state)
        if overrides:
            built.put_back()
            replay_schedules(runner, checkpoint["meta"])
        elif runner.param_schedulers is not None:
            _load_schedulers(runner.param_schedulers, checkpoint.get("param_schedulers"))
        runner.message_hub.load_state_dict(checkpoint["message_hub"])
        runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
    _tell_edits(runner, filename, edits or {}, overrides)
    runner.settings_in_effect = runner.settings if overrides or before is None else before
    if "ema_state_dict" in checkpoint:  # an EMAHook would have removed it
        runner.logger.warning(
            f"{filename} has the averaged weights of an EMAHook: without one the run continues from these, not from "
            "the model's own"
        )
    load_weights(runner, checkpoint)
    meta, processes = checkpoint["meta"], checkpoint["processes"]
    mine = processes[runner.rank] if len(processes) == runner.world_size else None
    for name, each in _wrappers(runner).items():
        # Without this process's state, the gradients of an incomplete accumulation are missing.
        each.resume_inner_count(checkpoint["accumulation"][name], restart_accumulation=mine is None)
    place = loop.progress()
    loop.resume({**meta, **as_before({key: meta[key] for key in place if key in meta}, place)}, mine)
    if mine is None and processes:
        runner.logger.warning(
            f"{filename} was written by {len(processes)} processes and is resumed by {runner.world_size}: the data are "
            "divided differently, so the result differs from that of an uninterrupted run"
        )
    if mine is not None:
        model = runner.bare_model
        if mine["buffers"]:
            buffers = fitted_state_dict(mine["buffers"], model.state_dict())
            model.load_state_dict(_with_versions(buffers, checkpoint["state_dict"]), strict=False)
        gradients = fitted_state_dict(mine["gradients"], [name for name, _ in named_parameters(model)])
        for name, param in named_parameters(model):
            if name in gradients:
                param.grad = gradients[name].to(param.device)
    seed = meta["seed"]
    if seed != runner.seed:
        if runner.seed_is_given:
            runner.logger.warning(f"{filename} has the seed {seed}, which is used instead of {runner.seed}")
        for each_loop in (loop, runner.val_loop, runner.test_loop):
            if each_loop is not None:
                reseed(each_loop.dataloader, runner.seed, seed)
        runner.seed = seed


def _settings_before(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings with which a checkpoint was written; None if unknown."""
    noted = meta.get("settings")
    return noted if isinstance(noted, Mapping) else settings_of_text(meta.get("cfg"), meta)


def _tell_edits(runner: Runner, filename: str | Path, edits: Mapping[str, tuple[Any, Any]], overrides: bool) -> None:
    if not edits:
        return
    listed = "; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in edits.items())
    if overrides:
        runner.logger.info(f"resume_overrides: the settings of the config apply, not those of {filename}: {listed}")
    else:
        runner.logger.warning(
            f"The config was edited since {filename} was written, without effect: the run continues with the settings "
            f"of the file: {listed}. With resume_overrides=True (--resume-overrides) those of the config apply"
        )


def _without_scalers(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a wrapper, or of several, without the loss scaler's."""
    if "param_groups" in state:
        return {key: value for key, value in state.items() if key != "loss_scaler"}
    return {name: _without_scalers(each) for name, each in state.items()}


@contextlib.contextmanager
def _restored_on_error(runner: Runner, filename: str | Path) -> Iterator[None]:
    """On an error, restore the states of the optimizer, the schedulers and the message hub."""
    assert runner.optim_wrapper is not None
    hub, wrapper = runner.message_hub.state_dict(), runner.optim_wrapper.state_dict()
    schedulers = _scheduler_states(runner.param_schedulers or [])
    try:
        yield
    except Exception as error:
        runner.optim_wrapper.load_state_dict(wrapper)
        _load_schedulers(runner.param_schedulers or [], schedulers)
        runner.message_hub.load_state_dict(hub)
        raise CheckpointError(f"{filename} cannot be resumed from: {error}") from error


def _wrappers(runner: Runner) -> dict[str, OptimWrapper]:
    """The optimizer wrappers by name; a single one has the name ``''``."""
    wrapper = runner.optim_wrapper
    assert wrapper is not None
    return dict(wrapper.items()) if isinstance(wrapper, OptimWrapperDict) else {"": wrapper}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients between two iterations: those of an incomplete accumulation."""
    return {name: param.grad for name, param in named_parameters(model) if param.grad is not None}


def _buffers(model: nn.Module) -> dict[str, Any]:
    """The model's state besides its parameters, if there are several processes, between which it may differ."""
    if distributed.world_size() == 1:
        return {}
    params = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    return {name: value for name, value in bare_state_dict(model).items() if name not in params}


def _with_versions(state_dict: Mapping[str, Any], source: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """``state_dict`` with the versions of modules that torch attaches to ``source``."""
    noted: Any = OrderedDict(state_dict)
    if hasattr(source, "_metadata"):
        noted._metadata = copy(source._metadata)
    return noted


def _loadable(model: nn.Module, state_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """The entries of ``state_dict`` to pass to the model, which may accept old names too."""
    own = bare_state_dict(model)
    fitting = {
        name: as_before(value, own.get(name))
        for name, value in state_dict.items()
        if name not in own or getattr(own[name], "shape", None) == getattr(value, "shape", None)
    }
    return _with_versions(fitting, state_dict)


def _optimizer_names(runner: Runner) -> dict[str, str]:
    """The class name of each optimizer, without ``Fused``, by the name of its wrapper."""
    names = {}
    for name, wrapper in _wrappers(runner).items():
        optimizer = getattr(wrapper.optimizer, "optim", wrapper.optimizer)  # inside a ZeroRedundancyOptimizer
        names[name] = type(optimizer).__name__.removeprefix("Fused")
    return names


def _scheduler_states(param_schedulers: Any) -> Any:
    """The state of each scheduler, in a list, or in a dict of lists for several optimizers."""
    if isinstance(param_schedulers, Mapping):
        return {name: _scheduler_states(listed) for name, listed in param_schedulers.items()}
    return [moved(portable(scheduler.state_dict()), "cpu") for scheduler in param_schedulers]


def _load_schedulers(param_schedulers: Any, states: Any) -> None:
    """Load states from :func:`_scheduler_states`.

    Raises:
        ValueError: the schedulers differ from those that were saved.
    """
    if isinstance(param_schedulers, Mapping) != isinstance(states, Mapping):
        raise ValueError("schedulers of one optimizer and schedulers of several do not fit")
    if isinstance(param_schedulers, Mapping):
        if set(param_schedulers) != set(states):
            raise ValueError(f"it has schedulers for {sorted(states)} instead of {sorted(param_schedulers)}")
        for name, listed in param_schedulers.items():
            _load_schedulers(listed, states[name])
        return
    if len(param_schedulers) != len(states):
        raise ValueError(
            f"it has {len(states)} schedulers instead of {len(param_schedulers)}; with resume_overrides=True those of "
            "the config apply"
        )
    for scheduler, state in zip(param_schedulers, states, strict=True):
        scheduler.load_state_dict(as_before(state, scheduler.state_dict()))
