"""What follows for a step from what was found, in plain tensors: of the reference backend, and of a process that has
no gradient while others have."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import NormClip, clip_coefficient, norm_of
from .base import StepReport, StepRequest

__all__ = ["Conclusions", "conclude"]


class Conclusions(NamedTuple):
    """0-dim float64 tensors; None for what nobody asked for."""

    norm: Tensor | None
    coefficient: Tensor | None
    found_inf: Tensor | None

    def skips(self) -> bool:
        """Whether the step changes nothing. Reads the device."""
        return self.found_inf is not None and bool(self.found_inf)

    def report(self, dtype: torch.dtype) -> StepReport:
        """As a step reports it, with the norm in ``dtype``."""
        scalars = None
        if self.norm is not None and self.coefficient is not None:
            scalars = torch.stack((self.norm, self.coefficient)).to(dtype)
        return StepReport(scalars, None if self.found_inf is None else self.found_inf.float())


def conclude(request: StepRequest, pairs: Tensor | None, device: torch.device) -> Conclusions:
    """What follows from the pairs that all found, or None where there was no gradient.

    Raises:
        RuntimeError: the norm is not finite under ``error_if_nonfinite``.
    """
    found_inf = None
    if request.found_inf is not None:
        found_inf = torch.as_tensor(request.found_inf, device=device).reshape(()).ne(0).double()
    if request.check and pairs is not None:
        found_inf = pairs[:, 1].amax().ne(0).double()
    clip = request.clip
    if not isinstance(clip, NormClip):
        return Conclusions(None, None, found_inf)
    pairs = torch.zeros((1, 2), dtype=torch.float64, device=device) if pairs is None else pairs
    scale = 1.0 if request.grad_scale is None else request.grad_scale
    if isinstance(scale, Tensor):  # stays on its device
        scale = scale.detach().to(device, torch.float64).reshape(())
    norm = norm_of(pairs, clip.norm_type) * (1.0 / scale)
    conclusions = Conclusions(norm, clip_coefficient(norm, clip.max_norm), found_inf)
    if clip.error_if_nonfinite and not norm.isfinite() and not conclusions.skips():
        raise RuntimeError(
            f"The total norm of order {clip.norm_type} of the gradients is {float(norm)}, so it cannot be clipped"
        )
    return conclusions
