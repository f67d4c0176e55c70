"""Resuming from a checkpoint that MMEngine's Runner wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages import one_line, some
from ..reading import StandIn
from .checkpoint import CheckpointError, unloadable_parts
from .data import InfiniteSampler, sampler_of
from .settings import config_of_text

if TYPE_CHECKING:
    from .runner import Runner

__all__ = ["as_own", "is_from_mmengine"]

# Note [Resuming from MMEngine's checkpoints]
# MMEngine saves the weights, the states of optimizers and schedulers, the numbers of epochs and iterations, and the
# message hub. What else Note [Resuming bit for bit] lists follows from these, or is not there: the position in the data
# follows from the numbers; the states of the random generators and the gradients of an incomplete accumulation are
# missing, so the accumulation begins anew, as in MMEngine. The class of an optimizer is in the text of the config, or
# shows in its parameter groups.

#: Entries of the checkpoint and of its meta that are used.
_KEYS = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
_META_KEYS = ("epoch", "iter", "seed", "cfg", "mmengine_version", "experiment_name", "time")


def is_from_mmengine(checkpoint: Mapping[str, Any]) -> bool:
    """Whether MMEngine's Runner wrote the checkpoint."""
    meta = checkpoint.get("meta")
    return isinstance(meta, Mapping) and "mmengine_version" in meta


def as_own(runner: Runner, filename: str | Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint in the form of this Runner's, as far as MMEngine's goes; a warning lists what is left out.

    Raises:
        CheckpointError: it lacks something, or its numbers of epochs and iterations do not fit the data.
    """
    meta = checkpoint["meta"]
    needed = ["state_dict", "optimizer", "message_hub"]
    missing = [key for key in needed if not isinstance(checkpoint.get(key), Mapping)]
    missing += [f"meta[{key!r}]" for key in ("epoch", "iter") if type(meta.get(key)) is not int or meta[key] < 0]
    if missing:
        raise CheckpointError(
            f"{filename} cannot be resumed from: this checkpoint of MMEngine lacks {some(missing)}. load_from without "
            "resume loads only the weights"
        )
    own = {key: checkpoint[key] for key in _KEYS if key in checkpoint}
    if "param_schedulers" in own:
        own["param_schedulers"] = _with_names(own["param_schedulers"])
    hub = checkpoint["message_hub"]
    infos = hub.get("runtime_info") if isinstance(hub.get("runtime_info"), Mapping) else {}
    plain_infos = {str(key): value for key, value in infos.items() if not any(unloadable_parts(value, ""))}
    bests = {key: Path(best).name for key, best in plain_infos.items() if _is_best(key, best)}
    left_out = [str(key) for key in checkpoint if key not in (*_KEYS, "meta", "message_hub")]
    left_out += [f"meta[{key!r}]" for key in meta if key not in _META_KEYS]
    left_out += [f"message_hub[{key!r}]" for key in infos if str(key) not in plain_infos]
    left_out += ["the logged values"] if hub.get("log_scalars") else []
    runner.logger.warning(
        f"{filename} was written by MMEngine, without states of random generators and gradients of an incomplete "
        f"accumulation, which begins anew. Left out: {some(left_out, 10) or 'nothing else'}"
    )
    config = config_of_text(meta.get("cfg"))
    optimizer = checkpoint["optimizer"]
    states = {"": optimizer} if "param_groups" in optimizer else optimizer
    return {
        **own,
        "meta": {
            **_place(runner, filename, meta, config, {**plain_infos, **bests}),
            "seed": meta["seed"] if type(meta.get("seed")) is int else runner.seed,
            "optimizers": {name: _optimizer(filename, name, state, config) for name, state in states.items()},
            "cfg": meta.get("cfg"),
        },
        # Files are named here, since those of the other run are not this run's to remove.
        "message_hub": {"log_scalars": {}, "runtime_info": {**plain_infos, **bests}},
        "accumulation": dict.fromkeys(states, meta["iter"]),
        "processes": [],
    }


def _with_names(states: Any) -> Any:
    """The states of schedulers, with the names of functions in place of these."""
    if isinstance(states, Mapping):
        return {key: _with_names(value) for key, value in states.items()}
    if isinstance(states, list):
        return [_with_names(value) for value in states]
    if not isinstance(states, StandIn):
        return states
    # A static method is written as getattr(its class, its name).
    arguments = states.arguments or (None,)
    return arguments[-1] if states.name == "builtins.getattr" and isinstance(arguments[-1], str) else states.name


def _is_best(key: str, value: Any) -> bool:
    return key.startswith("best_ckpt") and isinstance(value, str)


def _place(
    runner: Runner,
    filename: str | Path,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    infos: Mapping[str, Any],
) -> dict[str, Any]:
    """The entries of ``meta`` that say where in the training and in the data the checkpoint was written."""
    loop = runner.train_loop
    assert loop is not None
    train_cfg = config.get("train_cfg")
    train_cfg = train_cfg if isinstance(train_cfg, Mapping) else {}
    kinds = {"EpochBasedTrainLoop": True, "IterBasedTrainLoop": False}
    told = train_cfg.get("by_epoch", kinds.get(str(train_cfg.get("type"))))
    by_epoch = told if isinstance(told, bool) else loop.by_epoch
    epoch, done, length = meta["epoch"], meta["iter"], len(loop.dataloader)
    if not by_epoch:
        epoch = 0
        # The one pass of an InfiniteSampler has no end.
        passes, batches = (
            (0, done) if isinstance(sampler_of(loop.dataloader), InfiniteSampler) else divmod(done, length)
        )
    else:
        length = _epoch_length(infos) or length
        # An epoch whose batches are all done is complete for MMEngine only after the hooks at its end.
        passes, batches = epoch, done - epoch * length
        if not 0 <= batches <= length or (batches % length and length != len(loop.dataloader)):
            raise CheckpointError(
                f"{filename} cannot be resumed from: it was written after {done} iterations, in an epoch of {length} "
                f"batches, and this run has {len(loop.dataloader)}; the data or the batch size differ"
            )
        batches = len(loop.dataloader) if batches == length else batches
    count = epoch if by_epoch else done
    due = loop.validates_after(count) and not (by_epoch and batches)
    return {
        "epoch": epoch,
        "iter": done,
        "by_epoch": by_epoch,
        "epoch_length": length,
        "position": {"passes": passes, "batches": batches},
        # MMEngine writes a checkpoint before it validates, and again after a validation with the best metric so far.
        "validation_due": due and not _is_newest_best(infos, count),
    }


def _epoch_length(infos: Mapping[str, Any]) -> int | None:
    """Batches in an epoch of the run that wrote the checkpoint."""
    epochs, iters = infos.get("max_epochs"), infos.get("max_iters")
    if type(epochs) is not int or type(iters) is not int or epochs < 1 or iters < 1 or iters % epochs:
        return None
    return iters // epochs


def _is_newest_best(infos: Mapping[str, Any], count: int) -> bool:
    """Whether the checkpoint after ``count`` epochs or iterations is the best one, so that it has been validated."""
    bests = [value for key, value in infos.items() if _is_best(key, value)]
    return any(re.search(rf"(?<!\d){count}\.\w+$", value) for value in bests)


def _optimizer(filename: str | Path, name: str, state: Any, config: Mapping[str, Any]) -> str:
    """The class of the optimizer with this state, without ``Fused``; ``name`` is that of its wrapper."""
    section = config.get("optim_wrapper")
    if name and isinstance(section, Mapping):
        section = section.get(name)
    settings = section.get("optimizer") if isinstance(section, Mapping) else None
    if isinstance(settings, Mapping) and isinstance(settings.get("type"), str):
        return settings["type"].rpartition(".")[2].removeprefix("Fused")
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    group = groups[0] if isinstance(groups, list) and groups and isinstance(groups[0], Mapping) else {}
    if {"momentum", "dampening", "nesterov"} <= set(group):
        return "SGD"
    # RAdam and NAdam have decoupled_weight_decay, too, but not amsgrad.
    if {"betas", "eps", "amsgrad"} <= set(group) and isinstance(group.get("decoupled_weight_decay"), bool):
        return "AdamW" if group["decoupled_weight_decay"] else "Adam"
    which = f"the state {one_line(name, 100)!r}" if name else "its state"
    raise CheckpointError(
        f"{filename} cannot be resumed from: neither the text of its config nor the parameter groups say to which "
        f"optimizer {which} belongs"
    )
