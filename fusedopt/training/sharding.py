"""Tensors that torch.distributed shards over processes: gathering them, and cutting whole ones like them.

Those of ``fully_shard`` (FSDP2) and of tensor parallelism are DTensors, which know how they are sharded. Those of
``FullyShardedDataParallel`` (FSDP1) are plain tensors, and do not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..messages.names import parameter_name

__all__ = [
    "flat_shard",
    "gathered",
    "has_shards",
    "is_sharded",
    "local_part",
    "mapped",
    "sharded_as",
    "sharded_like",
    "state_like_params",
    "whole",
]


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor."""
    tensors = sys.modules.get("torch.distributed.tensor")  # it takes half a second to import
    return tensors is not None and isinstance(value, tensors.DTensor)


def has_shards(tensors: Iterable[Tensor]) -> bool:
    """Whether one of ``tensors`` is a DTensor."""
    return any(map(is_sharded, tensors))


def flat_shard(param_groups: Iterable[Mapping[str, Any]]) -> str | None:
    """The first parameter of an optimizer that FullyShardedDataParallel has flattened and sharded, as errors name it.

    None if there is none.
    """
    for group_index, group in enumerate(param_groups):
        for index, param in enumerate(group["params"]):
            if getattr(param, "_fsdp_flattened", False):
                return parameter_name(group, group_index, index)
    return None


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A DTensor as a plain tensor, with the same elements in every process; any other tensor itself.

    All processes of the tensor's mesh must call this.
    """
    if not is_sharded(tensor):
        return tensor
    shard: Any = tensor.detach()
    if shard.device.type != shard.device_mesh.device_type:  # offloaded to the CPU, where the mesh cannot communicate
        shard = shard.to(shard.device_mesh.device_type)
    return shard.full_tensor()


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` of each DTensor in its dicts, lists and tuples; these are copied where one is."""
    if is_sharded(value):
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
    if not is_sharded(like) or not isinstance(tensor, Tensor) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shard = distribute_tensor(tensor.detach(), like.device_mesh, like.placements, src_data_rank=None)
    # A copy, since a shard that shares memory with the whole tensor would keep all of it.
    return shard.to(local_part(like).device).clone()


def sharded_as(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """``state_dict`` with its tensors cut as those of the same names in ``own``, see :func:`sharded_like`."""
    changed = {name: sharded_like(value, own[name]) for name, value in state_dict.items() if is_sharded(own.get(name))}
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
        if is_sharded(param) and isinstance(state.get(key), Mapping):
            state[key] = {name: _like_param(value, param, key, name) for name, value in state[key].items()}
    return {**state_dict, "state": state}


def _like_param(value: Any, param: Tensor, key: Any, name: str) -> Any:
    if not isinstance(value, Tensor) or is_sharded(value):
        return value
    if value.shape == param.shape and value.dim():
        return sharded_like(value, param)
    if value.numel() == 1:  # a step count
        return value
    raise ValueError(
        f"state[{key!r}][{name!r}] has shape {tuple(value.shape)}, but its parameter, which is sharded, has shape "
        f"{tuple(param.shape)}; expected the parameter's shape, or one element"
    )
