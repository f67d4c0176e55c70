"""Clipping for optimizers that do not clip in their step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...messages import is_dtensor, whole
from ...rules import NormClip

__all__ = ["clip_norm"]


def clip_norm(params: Sequence[Tensor], clip: NormClip) -> Tensor:
    """Clip the gradients of ``params`` by their norm, as ``torch.nn.utils.clip_grad_norm_``; return the norm.

    The norm of DTensors is that of the whole tensors; all processes must call this. Unlike torch's function, this one
    takes DTensors of different meshes, and plain tensors beside them.

    Args:
        params: parameters with gradients.
        clip: the settings.

    Returns:
        The norm before clipping, a plain 0-dim tensor, the same in every process.

    Raises:
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    utils, norm_type = torch.nn.utils, float(clip.norm_type)
    groups: dict[Any, list[Tensor]] = {}
    for param in params:
        mesh = param.grad.device_mesh if is_dtensor(param.grad) else None  # type: ignore[union-attr]
        groups.setdefault(mesh, []).append(param)
    if list(groups) == [None]:
        return utils.clip_grad_norm_(params, clip.max_norm, norm_type, clip.error_if_nonfinite)  # type: ignore[arg-type]
    grads = [[param.grad for param in each if param.grad is not None] for each in groups.values()]
    norms = [whole(utils.get_total_norm(each, norm_type)) for each in grads]
    norm = norms[0]
    if len(norms) > 1:
        norm = torch.linalg.vector_norm(torch.stack([each.to(norm.device) for each in norms]), norm_type)
    if clip.error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )
    for each in groups.values():
        utils.clip_grads_with_norm_(each, clip.max_norm, norm)  # type: ignore[arg-type]
    return norm
