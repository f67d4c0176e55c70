"""An optimizer whose model was sharded after it was made: it holds parameters that no model has any more."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..messages import is_dtensor, parameter_name

__all__ = ["refuse_what_was_left_behind"]


def refuse_what_was_left_behind(param_groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise RuntimeError if the parameters, none of which has a gradient, were replaced by shards.

    ``fully_shard`` and tensor parallelism put DTensors in the place of a model's parameters. An optimizer of the former
    ones would train nothing, and say nothing. It is told from one that has no gradients yet by the models of this
    process, looked up among all objects: none has its first parameter, and one has a DTensor of the same shape.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    place = next(((group, g) for g, group in enumerate(param_groups) if group["params"]), None)
    if place is None:
        return
    group, g = place
    first = group["params"][0]
    replaced = False
    for module in gc.get_objects():
        if issubclass(type(module), nn.Module):
            for param in module.__dict__.get("_parameters", {}).values():
                if param is first:
                    return
                replaced |= is_dtensor(param) and param.shape == first.shape
    if replaced:
        raise RuntimeError(
            f"{parameter_name(group, g, 0)} has no gradient, and no model has it; one has a DTensor of its shape "
            "instead: was the model sharded (fully_shard, parallelize_module) after this optimizer was made? Expected "
            "an optimizer of the sharded model's parameters"
        )
