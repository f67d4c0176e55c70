"""A step whose caller knows the norm of the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import StepRequest
from ..backends.base import device_of, report_dtype
from ..messages import as_float, is_dtensor
from ..rules import NormClip, clip_coefficient

__all__ = ["with_given_norm"]


def with_given_norm(
    request: StepRequest, grad_norm: Tensor | float, param_groups: Sequence[Mapping[str, Any]]
) -> tuple[StepRequest, Tensor]:
    """The step that ``request`` asks for, without the pass that finds the norm, and what it is to report.

    Dividing by ``scale / coefficient`` unscales and clips, and a norm that is not finite tells of an overflow.

    Args:
        request: clips by a norm.
        grad_norm: the norm of the unscaled gradients, of the order that is clipped by.
        param_groups: what is stepped.

    Returns:
        the request; the norm and the coefficient, (2,).

    Raises:
        TypeError, ValueError: ``grad_norm`` is no norm, or the request does not clip by one.
        RuntimeError: it is not finite under ``error_if_nonfinite``.
    """
    clip, device = request.clip, device_of(param_groups)
    if not isinstance(clip, NormClip):
        raise ValueError(
            f"grad_norm is given, and clip_grad is {None if clip is None else clip.as_dict()}; expected clip_grad with "
            "max_norm, which the gradients are clipped to"
        )
    if is_dtensor(grad_norm):
        grad_norm = grad_norm.full_tensor()  # type: ignore[union-attr]
    if isinstance(grad_norm, Tensor):
        if grad_norm.numel() != 1 or not grad_norm.is_floating_point():
            raise ValueError(
                f"grad_norm is a tensor of shape {tuple(grad_norm.shape)} and {grad_norm.dtype}; expected one "
                "floating-point number"
            )
        norm = grad_norm.detach().reshape(()).to(device, torch.float64)
    else:
        number = as_float(grad_norm)
        if number is None or isinstance(grad_norm, bool):
            raise TypeError(f"grad_norm must be a number or a 0-dim tensor, got {grad_norm!r}")
        if number < 0:
            raise ValueError(f"Invalid grad_norm: {number}; expected a norm >= 0")
        norm = torch.full((), number, dtype=torch.float64, device=device)
    coefficient = clip_coefficient(norm, clip.max_norm)
    found_inf = request.found_inf
    if request.check or found_inf is not None:  # somebody looks for overflows, and the norm tells of them
        overflow = norm.isfinite().logical_not()
        if found_inf is not None:
            overflow = overflow | torch.as_tensor(found_inf, device=device).reshape(()).ne(0)
        found_inf = overflow.float()
    if clip.error_if_nonfinite and not norm.isfinite() and (found_inf is None or not bool(found_inf)):
        raise RuntimeError(f"grad_norm is {float(norm)}, so the gradients cannot be clipped to it")
    scale = 1.0 if request.grad_scale is None else request.grad_scale
    if isinstance(scale, Tensor):
        scale = scale.to(device, torch.float64)
    report = torch.stack((norm, coefficient)).to(report_dtype(param_groups))
    return request._replace(grad_scale=scale / coefficient, found_inf=found_inf, check=False, clip=None), report
