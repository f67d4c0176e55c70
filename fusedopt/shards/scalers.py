"""torch's loss scalers, where a gradient has parts in other processes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .callers import locals_of_caller
from .flat import named_flat_shard

__all__ = ["refuse_scaling_by_shares", "refuse_scaling_of_flat_shards", "tell_calling_scaler"]

#: Where a scaler calls an optimizer's step, or asks what it supports.
_STEP = "torch.amp.grad_scaler", "step"


def tell_calling_scaler(found_inf: Tensor) -> None:
    """Let the scaler of torch's that is stepping the optimizer know what the processes agreed on.

    Note [Scalers and shards]: a ``torch.amp.GradScaler`` hands over whether it found an overflow, but it looked at what
    is in its own process. The step asks the others. A scaler that does not hear of their overflows would keep its scale
    where theirs go down. Its step calls the optimizer's, and gives it no way to answer; so it is looked for among the
    callers, and its record, from which it updates the scale, is corrected. In a process without a gradient there is
    nothing in that record, for which the scaler would raise an error, and in the next step all others would wait.

    Args:
        found_inf: 0-dim, 1 or 0.
    """
    caller = locals_of_caller(*_STEP)
    record: Any = caller["self"]._per_optimizer_states.get(id(caller["optimizer"])) if caller else None
    if record is None:
        return
    flags = record["found_inf_per_device"]
    for flag in flags.values():
        flag.copy_(found_inf.reshape(flag.shape))
    if not flags:
        flags[found_inf.device] = found_inf.clone()  # the scaler adds to it


def refuse_scaling_by_shares(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if a scaler calls that decides on its own whether these flat shards are stepped."""
    scaler = locals_of_caller(*_STEP).get("self")
    module = sys.modules.get("torch.distributed.fsdp.sharded_grad_scaler")
    if scaler is not None and (module is None or not isinstance(scaler, module.ShardedGradScaler)):
        refuse_scaling_of_flat_shards(param_groups, "a GradScaler that unscales the gradients itself")


def refuse_scaling_of_flat_shards(param_groups: Iterable[Mapping[str, Any]], who: str) -> None:
    """Raise ValueError if a parameter is a flat shard: ``who`` would skip the step of one process only."""
    name = named_flat_shard(param_groups)
    if name is not None:
        raise ValueError(
            f"{who} cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and an overflow in one "
            "process would skip the step of that process only; expected "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )
