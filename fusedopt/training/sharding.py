"""Tensors that torch.distributed shards over processes: gathering them, and cutting whole ones like them.

Those of ``fully_shard`` (FSDP2) and of tensor parallelism are DTensors, which know how they are sharded. Those of
``FullyShardedDataParallel`` (FSDP1) are plain tensors, and do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..messages import deal_out_as, is_dtensor, whole

__all__ = [
    "gathered",
    "has_shards",
    "mapped",
    "sharded_as",
    "sharded_like",
    "state_like_params",
]


def has_shards(tensors: Iterable[Tensor]) -> bool:
    """Whether one of ``tensors`` is a DTensor."""
    return any(map(is_dtensor, tensors))


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` of each DTensor in its dicts, lists and tuples; these are copied where one is."""
    if is_dtensor(value):
        return function(value)
    if isinstance(value, Mapping):
        changed = {key: new for key, item in value.items() if (new := mapped(function, item)) is not item}
        if not changed:
            return value
        copied: Any = copy(value)  # which keeps the versions that torch attaches to a state dict
        copied.update(changed)
        return copied
    if type(value) in (list, tuple):
        items = [mapped(function, item) for item in value]
        return value if all(new is item for new, item in zip(items, value, strict=True)) else type(value)(items)
    return value


def gathered(value: Any, keep: bool = True) -> Any:
    """``value`` with each DTensor, in dicts, lists and tuples, as a whole tensor on the CPU.

    All processes must call this with the same DTensors in the same order.

    Args:
        value: not changed.
        keep: whether this process needs the elements; otherwise the tensors are on the device ``'meta'``, where they
            take no memory.
    """
    return mapped(lambda tensor: whole(tensor).to("cpu" if keep else "meta"), value)


def sharded_like(tensor: Any, like: Any) -> Any:
    """``tensor``, which every process has whole, cut as ``like`` if that is a DTensor; does not communicate.

    Args:
        tensor: a tensor with the shape of ``like``; DTensors, and values that are no tensors, are returned as they are.
        like: a tensor.
    """
    if not is_dtensor(like) or not isinstance(tensor, Tensor) or is_dtensor(tensor):
        return tensor
    return deal_out_as(like, tensor)


def sharded_as(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """``state_dict`` with its tensors cut as those of the same names in ``own``, see :func:`sharded_like`."""
    changed = {name: sharded_like(value, own[name]) for name, value in state_dict.items() if is_dtensor(own.get(name))}
    if not changed:
        return state_dict
    copied: Any = copy(state_dict)
    copied.update(changed)
    return copied


def state_like_params(state_dict: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The state dict of an optimizer, with whole tensors cut as the parameters of ``optimizer`` to which they belong.

    Args:
        state_dict: not changed. Its parameters have the optimizer's order.
        optimizer: the optimizer that will load it.

    Raises:
        ValueError: a tensor of a sharded parameter has neither the parameter's shape nor a single element, so that
            nothing says how to shard it.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not has_shards(params) or "state" not in state_dict:
        return state_dict
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    state = dict(state_dict["state"])
    for key, param in zip(keys, params, strict=False):  # a wrong number of them is an error when it is loaded
        if is_dtensor(param) and isinstance(state.get(key), Mapping):
            state[key] = {name: _like_param(value, param, key, name) for name, value in state[key].items()}
    return {**state_dict, "state": state}


def _like_param(value: Any, param: Tensor, key: Any, name: str) -> Any:
    if not isinstance(value, Tensor) or is_dtensor(value):
        return value
    if value.shape == param.shape and value.dim():
        return sharded_like(value, param)
    if value.numel() == 1:  # a step count
        return value
    raise ValueError(
        f"state[{key!r}][{name!r}] has shape {tuple(value.shape)}, but its parameter, which is sharded, has shape "
        f"{tuple(param.shape)}; expected the parameter's shape, or one element"
    )
