"""An optimizer whose model was sharded after it was made: it holds parameters that no model has any more."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..messages import is_dtensor, parameter_name
from .flat import is_flat_shard

__all__ = ["refuse_what_was_left_behind"]

#: Modules of torch without which nothing is sharded.
_SHARDING = {"torch.distributed.tensor", "torch.distributed.fsdp"}


def refuse_what_was_left_behind(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError if a parameter without a gradient was replaced by a shard.

    ``fully_shard`` and tensor parallelism put DTensors in the place of a model's parameters, FullyShardedDataParallel
    flat ones. An optimizer of the former ones would not train them, and say nothing. They are told from those that have
    no gradient yet by the models of this process, looked up among all objects: none has the parameter, and one has a
    shard of its shape, while this optimizer has no shards.
    """
    if not _SHARDING.intersection(sys.modules) or not torch.distributed.is_initialized():
        return  # nothing has been sharded; to look through all objects takes a tenth of a second
    entries = [(group, g, i, p) for g, group in enumerate(param_groups) for i, p in enumerate(group["params"])]
    own = {id(param) for *_, param in entries}
    if any(is_dtensor(param) or is_flat_shard(param) for *_, param in entries):
        return  # it was made afterwards
    lonely = {
        id(param) for *_, param in entries if param.grad is None and param.requires_grad and not is_dtensor(param)
    }
    shapes: set[torch.Size] = set()
    for module in gc.get_objects() if lonely else ():
        if issubclass(type(module), nn.Module):
            for param in module.__dict__.get("_parameters", {}).values():
                lonely.discard(id(param))
                if id(param) not in own:
                    shapes.update([param.shape] if is_dtensor(param) else getattr(param, "_shapes", ()))
    for group, g, i, param in entries:
        if id(param) in lonely and param.shape in shapes:
            raise RuntimeError(
                f"{parameter_name(group, g, i)} has no gradient, and no model has it; one has a shard of its shape "
                "instead: was the model sharded (fully_shard, parallelize_module, FullyShardedDataParallel) after this "
                "optimizer was made? Expected an optimizer of the sharded model's parameters"
            )
