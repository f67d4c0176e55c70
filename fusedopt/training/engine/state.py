"""The contents of a checkpoint, and resuming from it; see Note [Resuming bit for bit]."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...messages import is_dtensor, one_line
from ...version import __version__
from ..config import Config
from ..portable import as_before, portable
from ..sharding import sharded_like, state_like_params
from ..unwrapping import bare_state_dict, fitted_state_dict, named_parameters
from . import distributed
from .checkpoint import CheckpointError
from .checks import optimizer_names, wrappers_by_name
from .data import moved, reseed
from .overrides import GroupSettings, check_replay, replay_schedules
from .settings import differing, settings_of_text
from .weights import load_weights, with_versions

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["load_training", "shards_by_place", "training_state"]


def training_state(
    runner: Runner, save_optimizer: bool, save_param_scheduler: bool, meta: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Make a checkpoint of the run; all processes must call this.

    The tensors of a sharded model are DTensors in it. Everything else is on the CPU.

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
            "optimizers": optimizer_names(runner),
            "settings": dict(runner.settings_in_effect),
            "experiment_name": runner.experiment_name,
            "time": time.strftime("%Y%m%d_%H%M%S"),
            "cfg": runner.cfg.pretty_text if isinstance(runner.cfg, Config) else "",
            "fusedopt_version": __version__,
            **(meta or {}),
        },
        "state_dict": with_versions(moved(portable(weights), "cpu"), weights),
        "message_hub": moved(runner.message_hub.state_dict(), "cpu"),
    }
    if save_optimizer:
        checkpoint["optimizer"] = moved(portable(runner.optim_wrapper.state_dict()), "cpu")
        checkpoint["accumulation"] = {name: each.inner_count for name, each in wrappers_by_name(runner).items()}
        gradients = _gradients(runner.bare_model)
        summed = {name: grad for name, grad in gradients.items() if is_dtensor(grad)}
        if summed:  # over the processes, each of which has a part
            checkpoint["gradients"] = summed
        checkpoint["processes"] = distributed.gather(
            {
                **portable(loop.process_state()),
                "gradients": moved({name: gradients[name] for name in gradients if name not in summed}, "cpu"),
                "buffers": moved(portable(_buffers(runner.bare_model)), "cpu"),
            }
        )
    if save_param_scheduler and runner.param_schedulers is not None:
        checkpoint["param_schedulers"] = _scheduler_states(runner.param_schedulers)
    return checkpoint


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
        state = _cut(runner, as_before(checkpoint["optimizer"], wrapper.state_dict()))
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
    parameters = dict(named_parameters(runner.bare_model))
    gradients = _waiting(checkpoint, mine, parameters)
    for name, each in wrappers_by_name(runner).items():
        each.resume_inner_count(checkpoint["accumulation"][name], restart_accumulation=gradients is None)
    for name, gradient in fitted_state_dict(gradients or {}, parameters).items():
        if name in parameters:
            param = parameters[name]
            param.grad = sharded_like(gradient, param) if is_dtensor(param) else gradient.to(param.device)
    place = loop.progress()
    loop.resume({**meta, **as_before({key: meta[key] for key in place if key in meta}, place)}, mine)
    if mine is None and processes:
        runner.logger.warning(
            f"{filename} was written by {len(processes)} processes and is resumed by {runner.world_size}: the data are "
            "divided differently, so the result differs from that of an uninterrupted run"
        )
    if mine is not None and mine["buffers"]:
        model = runner.bare_model
        buffers = fitted_state_dict(mine["buffers"], model.state_dict())
        model.load_state_dict(with_versions(buffers, checkpoint["state_dict"]), strict=False)
    seed = meta["seed"]
    if seed != runner.seed:
        if runner.seed_is_given:
            runner.logger.warning(f"{filename} has the seed {seed}, which is used instead of {runner.seed}")
        for each_loop in (loop, runner.val_loop, runner.test_loop):
            if each_loop is not None:
                reseed(each_loop.dataloader, runner.seed, seed)
        runner.seed = seed


def shards_by_place(runner: Runner, checkpoint: Mapping[str, Any]) -> dict[tuple[Any, ...], Tensor]:
    """The DTensors of a run by their places in a checkpoint: the model's parameters, for all that has their shape.

    Args:
        runner: the runner, whose model may be sharded.
        checkpoint: a checkpoint; its tensors do not matter.
    """
    own = {name: value for name, value in bare_state_dict(runner.model).items() if is_dtensor(value)}
    found: dict[tuple[Any, ...], Tensor] = {}
    for name, value in own.items():
        places = (("state_dict", name), ("ema_state_dict", name), ("ema_state_dict", f"module.{name}"))
        found.update(dict.fromkeys((*places, ("gradients", name)), value))
    saved = checkpoint.get("optimizer")
    if runner.optim_wrapper is None or not own or not isinstance(saved, Mapping):
        return found
    for name, wrapper in wrappers_by_name(runner).items():
        place = ("optimizer", name) if name else ("optimizer",)
        state = saved.get(name) if name else saved
        if not isinstance(state, Mapping) or "param_groups" not in state:  # of other optimizers: an error later
            continue
        params = [param for group in wrapper.optimizer.param_groups for param in group["params"]]
        keys = [key for group in state["param_groups"] for key in group["params"]]
        for key, param in zip(keys, params, strict=False):  # a wrong number of them is an error when it is loaded
            entries = state["state"].get(key, {}) if is_dtensor(param) else {}
            found.update({(*place, "state", key, entry): param for entry in entries})
    return found


def _cut(runner: Runner, state: Any) -> Any:
    """The state of the optimizers with whole tensors cut as the parameters are."""
    if not isinstance(state, Mapping):
        return state
    wrappers = wrappers_by_name(runner)
    if "" in wrappers:
        return state_like_params(state, wrappers[""].optimizer)
    return {
        name: state_like_params(each, wrappers[name].optimizer)
        if name in wrappers and isinstance(each, Mapping)
        else each
        for name, each in state.items()
    }


def _waiting(
    checkpoint: Mapping[str, Any], mine: Mapping[str, Any] | None, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The gradients of an incomplete accumulation, by parameter name; None if they are lost.

    Those of a sharded parameter are the mean over the processes; those of another one are a process's own, until the
    last backward pass of the accumulation makes the mean. So a mean may serve as each process's own.
    """
    processes = checkpoint["processes"]
    gradients = dict(checkpoint.get("gradients") or {})
    sharded = {name for name, param in parameters.items() if is_dtensor(param)}
    if not sharded and mine is not None:
        return {**gradients, **mine["gradients"]}
    others = [process["gradients"] for process in processes]
    names = {name for each in others for name in each}
    if mine is None and (names - sharded or not (names or gradients)):
        return None
    for name in names & sharded:
        gradients[name] = sum(each[name] for each in others if name in each) / len(others)
    own = {} if mine is None else mine["gradients"]
    return {**gradients, **{name: own[name] for name in names - sharded if name in own}}


def _settings_before(meta: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings with which a checkpoint was written; None if unknown."""
    noted = meta.get("settings")
    return noted if isinstance(noted, Mapping) else settings_of_text(meta.get("cfg"), meta)


def _tell_edits(runner: Runner, filename: str | Path, edits: Mapping[str, tuple[Any, Any]], overrides: bool) -> None:
    if not edits:
        return
    listed = one_line("; ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in edits.items()))
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


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients between two iterations: those of an incomplete accumulation."""
    return {name: param.grad for name, param in named_parameters(model) if param.grad is not None}


def _buffers(model: nn.Module) -> dict[str, Any]:
    """The model's state besides its parameters, if there are several processes, between which it may differ."""
    if distributed.world_size() == 1:
        return {}
    params = {name for name, _ in named_parameters(model, remove_duplicate=False)}
    state = bare_state_dict(model)
    return {name: value for name, value in state.items() if name not in params and not is_dtensor(value)}


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
