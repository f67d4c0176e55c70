"""Parameters that are sharded over processes, and errors for what they do not support."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .names import parameter_name

__all__ = ["refuse_norm_of_shards", "refuse_scaling_of_shards", "sharded_parameter"]


def sharded_parameter(param_groups: Iterable[Mapping[str, Any]]) -> str | None:
    """The first parameter flattened and sharded by FullyShardedDataParallel, as errors name it; None if none is."""
    for group_index, group in enumerate(param_groups):
        for index, param in enumerate(group["params"]):
            if getattr(param, "_fsdp_flattened", False):
                return parameter_name(group, group_index, index)
    return None


def refuse_norm_of_shards(name: str | None) -> None:
    """Raise a ValueError if ``name``, a sharded parameter, is given: a process knows only its own shards' norm."""
    if name is not None:
        raise ValueError(
            f"clip_grad with max_norm cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and "
            "the norm of one process' shards is not the norm of the gradients. Omit clip_grad and call the model's "
            "own clip_grad_norm_(max_norm) before the step"
        )


def refuse_scaling_of_shards(name: str | None) -> None:
    """Raise a ValueError if ``name``, a sharded parameter, is given: a process does not see all overflows."""
    if name is not None:
        raise ValueError(
            f"this GradScaler cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and an "
            "overflow in one process would skip the step of that process only; expected "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )
