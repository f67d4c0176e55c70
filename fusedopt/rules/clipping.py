"""Gradient clipping settings, as in MMEngine's ``clip_grad``, and the one definition of the clip coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..messages import check_number, did_you_mean, plain

__all__ = [
    "CLIP_EPS",
    "NormClip",
    "ValueClip",
    "clip_coefficient",
    "norm_of",
    "parse_clip_grad",
    "total_of",
]

#: Added to the norm before dividing, as in ``torch.nn.utils.clip_grad_norm_``. The kernels' copy is tested equal.
CLIP_EPS = 1e-6


def total_of(grads: Iterable[Tensor], norm_type: float | None, device: torch.device) -> Tensor:
    """What a statistics pass finds in some gradients: (total, 1.0 if an element is not finite), float64 on ``device``.

    The total is the sum of the powers of magnitudes, for ``norm_type=inf`` the largest, and for None 0.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for grad in grads:
        if not grad.numel():
            continue
        magnitudes = grad.detach().double().abs()
        if norm_type == math.inf:
            total[0] = torch.maximum(total[0], magnitudes.amax().to(device))
        elif norm_type is not None:
            total[0] += magnitudes.pow(norm_type).sum().to(device)
        total[1] = torch.maximum(total[1], magnitudes.isfinite().all().logical_not().to(device, torch.float64))
    return total


def norm_of(pairs: Tensor, norm_type: float) -> Tensor:
    """The norm that the totals of pairs, (n, 2), make together."""
    totals = pairs[:, 0]
    return totals.amax() if norm_type == math.inf else totals.sum().pow(1 / norm_type)


def clip_coefficient(grad_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """``min(1, max_norm / (grad_norm + 1e-6))``; NaN when the norm is NaN, so that NaN reaches every gradient."""
    if not isinstance(max_norm, Tensor):
        max_norm = torch.full_like(grad_norm, max_norm)
    clipped = torch.clamp(max_norm.to(grad_norm) / (grad_norm + CLIP_EPS), max=1.0)
    # inf / inf would be NaN; an infinite bound only reports. A NaN norm stays NaN.
    return torch.where(max_norm.isinf(), torch.where(grad_norm.isnan(), grad_norm, 1.0), clipped)


@dataclass(frozen=True)
class NormClip:
    """Scale all gradients together so that their global norm is at most ``max_norm``.

    Args:
        max_norm: bound > 0, a float or 0-dim tensor; ``inf`` only reports the norm.
        norm_type: 1, 2, any p > 0, or ``inf``.
        error_if_nonfinite: raise before anything is changed when the norm is NaN or infinite (costs one host read).
    """

    max_norm: float | Tensor
    norm_type: float = 2.0
    error_if_nonfinite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", check_number("clip_grad max_norm", self.max_norm, exclusive=True))
        object.__setattr__(self, "error_if_nonfinite", plain(self.error_if_nonfinite))
        try:
            norm_type = float(self.norm_type)  # "inf" is allowed, as in torch
        except (TypeError, ValueError):
            norm_type = math.nan
        if not norm_type > 0:
            raise ValueError(f"Invalid clip_grad norm_type: {self.norm_type!r}; expected 1, 2, any p > 0, or inf")
        object.__setattr__(self, "norm_type", norm_type)

    def as_dict(self) -> dict[str, Any]:
        """The settings in the form :func:`parse_clip_grad` takes."""
        return {
            "type": "norm",
            "max_norm": self.max_norm,
            "norm_type": self.norm_type,
            "error_if_nonfinite": self.error_if_nonfinite,
        }


@dataclass(frozen=True)
class ValueClip:
    """Clamp every gradient element to ``[-clip_value, clip_value]``; NaN stays NaN, ±inf becomes ±clip_value."""

    clip_value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip_value", check_number("clip_grad clip_value", self.clip_value, exclusive=True))

    def as_dict(self) -> dict[str, Any]:
        """The settings in the form :func:`parse_clip_grad` takes."""
        return {"type": "value", "clip_value": self.clip_value}


_KINDS: dict[str, type[NormClip] | type[ValueClip]] = {"norm": NormClip, "value": ValueClip}
# Accepted for configs written for torch's functions: both only choose an implementation there.
_IGNORED = {"foreach"}


def parse_clip_grad(clip_grad: Mapping[str, Any] | NormClip | ValueClip | None) -> NormClip | ValueClip | None:
    """Validate a ``clip_grad`` setting; the caller's dict is not changed.

    Args:
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` (``type='norm'`` is the
            default) or ``dict(type='value', clip_value=…)``.

    Raises:
        TypeError: not a dict, or a key missing.
        ValueError: unknown type or key, or a value out of range.
    """
    if clip_grad is None or isinstance(clip_grad, (NormClip, ValueClip)):
        return clip_grad
    if not isinstance(clip_grad, Mapping):
        raise TypeError(f"clip_grad must be a dict or None, got {type(clip_grad).__name__}")
    settings = {key: value for key, value in clip_grad.items() if key not in _IGNORED}
    kind = settings.pop("type", "norm")
    if kind not in _KINDS:
        raise ValueError(f"clip_grad: unknown type {kind!r}; expected 'norm' or 'value'")
    fields = list(_KINDS[kind].__dataclass_fields__)
    for key in settings:
        if key not in fields:
            raise ValueError(f"clip_grad: unknown key {key!r} for type {kind!r}; {did_you_mean(key, fields)}")
    if fields[0] not in settings:
        raise TypeError(f"clip_grad of type {kind!r} needs {fields[0]!r}")
    return _KINDS[kind](**settings)
