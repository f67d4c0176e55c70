"""Parameters of which each process has a part only, and what cannot be done with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .names import parameter_name

__all__ = ["refuse_norm_of_shards", "refuse_scaling_of_shards", "sharded_parameter"]


def sharded_parameter(param_groups: Iterable[Mapping[str, Any]]) -> str | None:
    """How errors call the first parameter that FullyShardedDataParallel has flattened and sharded; None without."""
    for group_index, group in enumerate(param_groups):
        for index, param in enumerate(group["params"]):
            if getattr(param, "_fsdp_flattened", False):
                return parameter_name(group, group_index, index)
    return None


def refuse_norm_of_shards(name: str | None) -> None:
    """Raise a ValueError where ``name`` is that of a sharded parameter, whose process knows no norm but its own."""
    if name is not None:
        raise ValueError(
            f"clip_grad with max_norm cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and "
            "the norm of one process' shards is not that of the gradients. Leave clip_grad out, and call the model's "
            "own clip_grad_norm_(max_norm) before the step"
        )


def refuse_scaling_of_shards(name: str | None) -> None:
    """Raise a ValueError where ``name`` is that of a sharded parameter, whose process does not see all overflows."""
    if name is not None:
        raise ValueError(
            f"this GradScaler cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and an "
            "overflow in one process would skip the step of that process only; expected "
            "torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler"
        )
