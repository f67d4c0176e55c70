"""The numbers of a shard's elements in the parameter that it is a part of; see Note [Random bits] in csrc/storage.h."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..messages import is_dtensor, local_of
from .flat import is_flat_shard

__all__ = ["numbers_of"]

#: The number of the first element, and sizes and steps between neighbours by dimension, outermost first.
Numbers = tuple[int, tuple[int, ...], tuple[int, ...]]


def numbers_of(param: Tensor) -> Numbers | None:
    """Which elements of the whole parameter this process has: numbers in the canonical order of the whole.

    The elements here are taken in their own canonical order, along dimensions sorted by the strides of the part. The
    first has the number that is returned, and the others are at steps from it, as in a Layout of csrc/tables.h.

    Args:
        param: a parameter: a DTensor, a flat shard of FullyShardedDataParallel, or any other tensor.

    Returns:
        (first, sizes, steps), or None where they count from 0 by ones.

    Raises:
        ValueError: nobody could know. The message is the end of a sentence about the parameter.
    """
    if is_dtensor(param):
        found = _of_dtensor(param)
    elif is_flat_shard(param):
        found = _of_flat_shard(param)
    else:
        return None
    numel = local_of(param).numel()
    return None if numel == 0 or found == (0, (numel,), (1,)) else found


def _of_dtensor(param: Any) -> Numbers:
    shape, local = param.shape, local_of(param)
    offsets, sizes = _place_of(param)
    if list(sizes) != list(local.shape):
        raise ValueError(
            f"has a part of shape {tuple(local.shape)} here where its placements {tuple(param.placements)} make one of "
            f"{tuple(sizes)}: which elements these are is not known, and rounding by chance needs them; expected no "
            "stochastic_rounding and no second moments in 'int8', or a DTensor as distribute_tensor makes it"
        )
    # Of the whole, as Note [Canonical order] in csrc/tables.h has it.
    steps, step = [0] * len(shape), 1
    for d in reversed(_sorted(param.stride(), shape)):
        steps[d] = step
        step *= shape[d]
    first = sum(offset * each for offset, each in zip(offsets, steps, strict=True))
    order = [d for d in _sorted(local.stride(), local.shape) if local.shape[d] != 1]
    return first, *_merged([local.shape[d] for d in order], [steps[d] for d in order])


def _sorted(strides: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Dimensions by their strides, largest first; those of one element, whose strides mean nothing, last."""
    return sorted(range(len(sizes)), key=lambda d: (sizes[d] == 1, -strides[d]))


def _merged(sizes: Sequence[int], steps: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same with neighbouring dimensions made one where they are evenly spaced together; at least one."""
    merged: list[tuple[int, int]] = []
    for size, step in zip(sizes, steps, strict=True):
        if merged and merged[-1][1] == step * size:
            merged[-1] = merged[-1][0] * size, step
        else:
            merged.append((size, step))
    merged = merged or [(1, 1)]
    return tuple(size for size, _ in merged), tuple(step for _, step in merged)


def _place_of(param: Any) -> tuple[list[int], list[int]]:
    """Where a DTensor's part begins in the whole, and its sizes: each dimension of the mesh cuts what those before
    left."""
    from torch.distributed.tensor import Replicate, Shard

    offsets, sizes = [0] * param.dim(), list(param.shape)
    coordinate = param.device_mesh.get_coordinate()
    for mesh_dim, placement in enumerate(param.placements):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            raise ValueError(
                f"has the placement {placement} ({type(placement).__name__}), with which rounding by chance does not "
                "know the numbers of its elements; expected Shard or Replicate (shard first over the outer dimension "
                "of the mesh), or no stochastic_rounding and no second moments in 'int8'"
            )
        if coordinate is None:  # this process is not in the mesh, and has nothing of it
            return offsets, [0] * param.dim()
        d, parts = placement.dim % param.dim(), param.device_mesh.size(mesh_dim)
        most = -(-sizes[d] // parts)
        begin = min(most * coordinate[mesh_dim], sizes[d])
        offsets[d] += begin
        sizes[d] = min(most, sizes[d] - begin)
    return offsets, sizes


def _of_flat_shard(param: Any) -> Numbers:
    """Of a parameter that FullyShardedDataParallel has flattened: its own, or the flat one's. See Note [Finding the
    handle]."""
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    handles = [] if module is None else [each for each in gc.get_objects() if type(each) is module.FlatParamHandle]
    for handle in handles:
        flat = handle.flat_param
        if param is flat:
            first = handle.rank * flat._sharded_size.numel() if handle.uses_sharded_strategy else 0
            return first, (param.numel(),), (1,)
        for own, info in zip(flat._params or (), flat._shard_param_infos if flat._params else (), strict=False):
            if own is param:
                if not handle.uses_sharded_strategy or not info.in_shard:
                    return 0, (param.numel(),), (1,)
                return info.intra_param_start_idx, (param.numel(),), (1,)
    raise ValueError(
        "is a shard of a FullyShardedDataParallel model that is not found, so the numbers of its elements are not "
        "known, and rounding by chance needs them; expected torch.distributed.fsdp.fully_shard, or no "
        "stochastic_rounding and no second moments in 'int8'"
    )
