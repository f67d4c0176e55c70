"""Gradient clipping settings, as in MMEngine's ``clip_grad``, and the one definition of the clip coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..messages import check_number, did_you_mean, plain

__all__ = ["CLIP_EPS", "NormClip", "ValueClip", "clip_coefficient", "global_norm", "parse_clip_grad"]

#: Added to the norm before dividing, as in ``torch.nn.utils.clip_grad_norm_``. The kernels' copy is tested equal.
CLIP_EPS = 1e-6


def global_norm(grads: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The norm of all gradients together, in float64 from the first addition, on ``device``."""
    norms = [torch.linalg.vector_norm(grad.double(), norm_type).to(device) for grad in grads if grad.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def clip_coefficient(grad_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """``min(1, max_norm / (grad_norm + 1e-6))``; NaN when the norm is NaN, so that NaN reaches every gradient."""
    max_norm = float(max_norm)
    if math.isinf(max_norm):
        # inf / inf would be NaN; an infinite bound only reports. A NaN norm stays NaN.
        return torch.where(grad_norm.isnan(), grad_norm, torch.ones_like(grad_norm))
    return torch.clamp(max_norm / (grad_norm + CLIP_EPS), max=1.0)


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
