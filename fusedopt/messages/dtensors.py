"""DTensors: tensors that are dealt out over the processes of a mesh, of which each holds its local part."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["deal_out_as", "dealt_out", "dealt_out_alike", "is_dtensor", "local_of", "whole"]


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor. Imports nothing: torch's class takes long to import, and whoever has one has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """What of a DTensor lies in this process, without a copy and without autograd; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def dealt_out_alike(one: Any, other: Any) -> bool:
    """Whether both are plain tensors, or DTensors of one mesh with the same placements."""
    if not is_dtensor(one) or not is_dtensor(other):
        return is_dtensor(one) == is_dtensor(other)
    return one.device_mesh == other.device_mesh and tuple(one.placements) == tuple(other.placements)


def dealt_out(tensor: Any) -> str:
    """How a tensor lies in processes, for messages."""
    if not is_dtensor(tensor):
        return "a plain tensor"
    return f"a DTensor with placements {tuple(tensor.placements)} on {tensor.device_mesh}"


def whole(tensor: Any) -> Any:
    """A DTensor as a plain tensor, with the same elements in every process; any other tensor itself.

    All processes of the tensor's mesh must call this.
    """
    if not is_dtensor(tensor):
        return tensor
    tensor = tensor.detach()
    if tensor.device.type != tensor.device_mesh.device_type:  # offloaded to the CPU, where the mesh cannot communicate
        tensor = tensor.to(tensor.device_mesh.device_type)
    return tensor.full_tensor()


def deal_out_as(param: Any, value: Any) -> Any:
    """``value``, of the parameter's shape, as the parameter is: over the same mesh, with the same placements, or plain.

    A plain tensor is taken to be whole, and the same in every process; to deal it out needs no communication. All
    processes must call this for a DTensor that is dealt out in another way: they exchange its parts.
    """
    if dealt_out_alike(param, value):
        return value
    if not is_dtensor(param):
        return whole(value)
    from torch.distributed.tensor import distribute_tensor

    dealt_out = distribute_tensor(whole(value.detach()), param.device_mesh, param.placements, src_data_rank=None)
    # A copy, since a part that shares memory with the whole tensor would keep all of it.
    return dealt_out.to(local_of(param).device).clone()
