"""What of an optimizer's state goes into its state dict."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import is_dtensor, local_of, plain_groups
from ..rules import CARRIED, keys_of
from ..rules.codes import marked_order
from ..rules.masters import master_of
from ..shards import is_flat_shard
from .conversion import CODES_ORDER, CODES_SHAPE, plain_values

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["as_torch_has_it", "is_unreal", "leave_out_unreal_state", "make_settings_plain", "make_state_portable"]


def make_settings_plain(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State-dict post hook: what somebody wrote to the groups since, see Note [Plain numbers]."""
    plain_groups(optimizer.param_groups)
    plain_groups(state_dict.get("param_groups", ()))


def leave_out_unreal_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State-dict post hook: drop state as it is created, which no step has touched.

    State is created before it is known whether the step is skipped; to leave it out is the same as to load it.
    """
    own: FusedOptimizer = optimizer  # type: ignore[assignment]
    states: Any = state_dict.get("state")
    params = [param for group in own.param_groups for param in group["params"]]
    for key, state in list(states.items()) if isinstance(states, dict) else ():
        # Another hook may have made something else of the dict.
        ours = isinstance(key, int) and key < len(params) and own.state.get(params[key]) is state
        if ours and is_unreal(own, params[key], state) and not _asked_for_all():
            del state_dict["state"][key]


def make_state_portable(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """State-dict post hook: what another process, or another optimizer, needs to read the state.

    Note [State dicts]: the state dict of a whole model has the optimizer's tensors as they are, so that a training goes
    on with the same bits. Where parameters are dealt out, and for torch.distributed.checkpoint, which may deal them out
    in another way when it loads, codes and roots are decoded, and a master is a float32 copy. What is decoded is
    encoded to the same codes again, see :func:`fusedopt.rules.codes.encode_again`. A rule that hides its step count
    has it in the state dict where the count matters: for random bits, and for the average.
    """
    own: FusedOptimizer = optimizer  # type: ignore[assignment]
    states: Any = state_dict.get("state")
    if own._precision.is_plain or not isinstance(states, dict):
        return
    params = [param for group in own.param_groups for param in group["params"]]
    for_all = _asked_for_all()
    for key, state in list(states.items()):
        ours = isinstance(key, int) and key < len(params) and own.state.get(params[key]) is state
        if not ours:
            continue  # another hook has made something else of it
        param, entry = params[key], dict(state)
        if for_all or is_dtensor(param) or is_flat_shard(param):
            entry = _portable(own, param, entry)
        elif coded := [stored for name, stored in entry.items() if str(name).endswith("_codes")]:
            entry[CODES_SHAPE] = list(local_of(param).shape)
            order = marked_order(local_of(param), coded[0])
            if order != sorted(order):
                entry[CODES_ORDER] = order
        if "ema" in entry and entry["ema"] is None:
            entry["ema"] = master_of(param, state)  # the next step begins with it
        counts = own._counts
        if counts is not None and (own._precision.average is not None or own._precision.draws(own.rule)):
            count = counts.of_entry(param, state)
            if count is not None:
                entry["step"] = count
        states[key] = entry


@torch.no_grad()
def _portable(optimizer: FusedOptimizer, param: Tensor, entry: dict[Any, Any]) -> dict[Any, Any]:
    """A state with values in plain floating point under torch's keys, and the whole master."""
    for column in optimizer.rule.columns:
        for key in keys_of(column.name)[1:]:
            if isinstance(entry.get(key), Tensor):
                entry[column.name] = plain_values(column, param, key, entry.pop(key))
    if isinstance(entry.get("master_low"), Tensor):
        entry["master"] = master_of(param, entry)
        del entry["master_low"]
    return entry


@torch.no_grad()
def as_torch_has_it(optimizer: FusedOptimizer, param: Tensor, state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of a parameter with the keys that torch's optimizer has, in float32 or float64."""
    entry = _portable(optimizer, param, dict(state))
    for key in (*CARRIED, CODES_ORDER, CODES_SHAPE, *(("step",) if optimizer.rule.hides_step else ())):
        entry.pop(key, None)
    for column in optimizer.rule.columns:
        value = entry.get(column.name)
        if isinstance(value, Tensor) and value.dtype != torch.float64:
            entry[column.name] = value.to(torch.float32)
    return entry


def is_unreal(optimizer: FusedOptimizer, param: Tensor, state: dict[str, Any]) -> bool:
    """Whether no step has touched this state of a parameter, so that to leave it out is the same."""
    counts = optimizer._counts
    count = state.get("step") if counts is None else counts.of_entry(param, state)
    if not isinstance(count, Tensor):
        return False
    count = local_of(count)
    if bool(count.item() if count.numel() == 1 else count.any()):  # first, since it tells in nearly all cases
        return False
    columns = [key for column in optimizer.rule.columns for key in keys_of(column.name)]
    if not state.keys() <= {*columns, *CARRIED, "step"}:
        return False
    tensors = [state[key] for key in (*columns, "master_low") if key in state]
    if not all(isinstance(tensor, Tensor) and not bool(local_of(tensor).any()) for tensor in tensors):
        return False
    # An average begins anew with the first step, whatever it is; a master may be more than its parameter.
    master = state.get("master")
    return master is None or bool((local_of(master) == local_of(param)).all())


def _asked_for_all() -> bool:
    """Whether torch.distributed.checkpoint asks.

    Its functions look for the same keys in every state dict of an optimizer that has any state: a checkpoint without
    those that a skipped step has left could not be loaded. It makes them zeros for stock optimizers, too. They call
    ``state_dict()`` as anybody does, so the only sign of them is that they are among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
