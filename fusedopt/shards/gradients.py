"""Gradients of DTensors, as the parameter needs them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..messages import dealt_out_alike, is_dtensor

__all__ = ["settle_gradient"]


def settle_gradient(param: Tensor) -> bool:
    """Put the gradient of a DTensor into the form that a step can use, as torch's optimizers do. Whether it was not.

    It may still be under way, or be dealt out in another way than its parameter: under sequence parallelism that of a
    norm's weight is ``Partial``, and has yet to be added up over the processes, which all have the same to do then.
    """
    grad: Any = param.grad
    if not is_dtensor(param) or not is_dtensor(grad):
        return False
    changed = False
    if not dealt_out_alike(param, grad):
        if grad.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
            return False
        grad = param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
        changed = True
    wait = getattr(grad._local_tensor, "wait", None)  # of an AsyncCollectiveTensor
    if wait is not None:
        grad._local_tensor = wait()
        changed = True
    return changed
