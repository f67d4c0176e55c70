"""DTensors: tensors that are dealt out over the processes of a mesh, of which each holds its local part."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

__all__ = ["dealt_out", "dealt_out_alike", "is_dtensor", "local_of"]


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
