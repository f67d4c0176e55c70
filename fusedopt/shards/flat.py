"""Parameters of FullyShardedDataParallel (FSDP1), which flattens them and deals the flat ones out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..messages import parameter_name

__all__ = ["flat_groups", "is_flat_shard", "named_flat_shard", "refuse_norm_of_flat_shards"]


def is_flat_shard(param: Tensor) -> bool:
    """Whether FullyShardedDataParallel has flattened it, or is it the flat parameter itself."""
    return bool(getattr(param, "_fsdp_flattened", False))


def flat_groups(params: Iterable[Tensor]) -> dict[int, Any]:
    """By the id of a parameter: the process group that it is dealt out over, None where each process has all of it.

    Note [Finding the handle]: a parameter of FullyShardedDataParallel does not know what it belongs to; what knows is
    the handle of its flat parameter, which the model holds, and an optimizer is not given the model. So the handles are
    looked up among all objects of Python (but those that gc.freeze() has put away), once for each set of parameters.
    One that is not found is not in the result,
    and its caller refuses the parameter: to guess the group would be a wrong norm where shards are in groups (HSDP).

    Args:
        params: shards.

    Raises:
        NotImplementedError: the flat parameter is made of DTensors.
    """
    wanted = {id(param) for param in params}
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    handles = [] if module is None else [each for each in gc.get_objects() if type(each) is module.FlatParamHandle]
    groups: dict[int, Any] = {}
    for handle in handles:
        flat = handle.flat_param
        mine = wanted.intersection(map(id, (flat, *(flat._params or ()))))
        if mine and getattr(handle, "_fsdp_extension", None) is not None:
            raise NotImplementedError(
                "FullyShardedDataParallel over tensor parallel parameters is not supported: the norm of its flat "
                "parameters cannot be told apart; expected torch.distributed.fsdp.fully_shard"
            )
        groups.update(dict.fromkeys(mine, handle.process_group if handle.uses_sharded_strategy else None))
    return groups


def named_flat_shard(param_groups: Iterable[Mapping[str, Any]]) -> str | None:
    """The first flat shard of an optimizer, as errors name it, or None."""
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            if is_flat_shard(param):
                return parameter_name(group, g, i)
    return None


def refuse_norm_of_flat_shards(param_groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError if a parameter is a flat shard: torch's own norm is over those of this process only."""
    name = named_flat_shard(param_groups)
    if name is not None:
        raise ValueError(
            f"clip_grad with max_norm cannot be used here: {name} is a shard of a FullyShardedDataParallel model, and "
            "the norm of one process' shards is not the norm of the gradients. Take a fused optimizer, which asks the "
            "other processes, or omit clip_grad and call the model's own clip_grad_norm_(max_norm) before the step"
        )
