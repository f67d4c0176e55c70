"""What of an optimizer's state goes into its state dict."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import local_of, plain_groups
from ..rules import CARRIED, keys_of

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["is_unreal", "leave_out_unreal_state", "make_settings_plain"]


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


def is_unreal(optimizer: FusedOptimizer, param: Tensor, state: dict[str, Any]) -> bool:
    """Whether no step has touched this state of a parameter, so that to leave it out is the same."""
    columns = [key for column in optimizer.rule.columns for key in keys_of(column.name)]
    counts = optimizer._counts
    count = state.get("step") if counts is None else counts.of_entry(param, state)
    if not isinstance(count, Tensor) or not state.keys() <= {*columns, *CARRIED, "step"}:
        return False
    tensors = [count, *(state[key] for key in (*columns, "master_low") if key in state)]
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
