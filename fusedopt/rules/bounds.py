"""How far a kernel's result may be from the exact one: the one bound of the self-test and of the tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CLIPPED_ROUNDINGS", "ROUNDINGS", "error_bound", "unit_in_the_last_place"]

#: Roundings of the compute dtype that one result may have picked up on its way.
ROUNDINGS = 6
#: The same where gradients were multiplied with a clip coefficient: its norm is a sum in another order.
CLIPPED_ROUNDINGS = 64


def unit_in_the_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at each of these float64 values."""
    info = torch.finfo(dtype)
    return info.eps * torch.exp2(torch.floor(torch.log2(values.abs().clamp(min=info.tiny))))


def error_bound(
    exact: Tensor, magnitude: Tensor, stored: torch.dtype, compute: torch.dtype, roundings: int = ROUNDINGS
) -> Tensor:
    """How far a stored result may be off: rounded once to its dtype, and before that in the compute dtype.

    Args:
        exact: the result, in float64.
        magnitude: of the terms it was added up from.
        stored: dtype that it is stored in.
        compute: dtype of the arithmetic.
        roundings: of the compute dtype.
    """
    info = torch.finfo(compute)
    return (
        0.5 * unit_in_the_last_place(exact, stored)
        + roundings * info.eps * magnitude
        + roundings * info.tiny * info.eps
    )
