"""What a 16-bit parameter exactly is, and the bits that it lacks of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..messages import local_of
from .codes import canonical_order, flattened, join, unflattened

__all__ = ["joined_with_master", "low_of", "master_of"]


@torch.no_grad()
def master_of(param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """What a parameter exactly is, with its master if its state has one: a new tensor in float32, float64 for float64.

    It is dealt out as the parameter.
    """
    param = param.detach()
    exact = torch.empty_like(param, dtype=torch.float64 if param.dtype == torch.float64 else torch.float32)
    local = local_of(param)
    joined = joined_with_master(local, entry)
    local_of(exact).copy_(local if joined is None else joined)
    return exact


def joined_with_master(local: Tensor, entry: Mapping[str, Any]) -> Tensor | None:
    """The float32 that a local 16-bit parameter and the master in its state are together; None without a master."""
    if isinstance(master := entry.get("master"), Tensor):
        # An element that is not its master rounded was changed by somebody else since.
        given = local_of(master)
        same = given.to(local.dtype).view(torch.int16) == local.view(torch.int16)
        return torch.where(same, given, local.float())
    if isinstance(low := entry.get("master_low"), Tensor):
        order = canonical_order(local)
        joined = join(flattened(local, order), flattened(local_of(low), order))
        return unflattened(joined, order, local.shape)
    return None


def low_of(high: Tensor, key: str, stored: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What stands at ``master_low``, made of another form of the master.

    Args:
        high: the bfloat16 parameter, which stays as it is.
        key: ``'master'`` or ``'master_low'``, where ``stored`` stood.
        stored: a float32 master, or the lower bits in int16 or uint8.
        dtype: torch.int16 for 16 bits, or torch.uint8 for 8.

    Returns:
        The lower bits; None if they cannot make the master of this parameter. A master half way between two bfloat16
        was rounded to the even one: 'split' has it to one unit of float32's last place then.
    """
    if key == "master_low":
        low = stored.to(torch.int64)
        if stored.dtype == torch.uint8:
            low = torch.where(low >= 128, low - 256, low) << 8
    else:
        upper = (high.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF) << 16
        low = (stored.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) - upper
        low = torch.where(high.isnan() & stored.isnan(), 0, low)
        if bool((low.abs() > 0x8000).any()):
            return None
    if dtype == torch.int16:
        return low.clamp(-0x8000, 0x7FFF).to(dtype)
    rounded = torch.round(low.to(torch.float64) / 256).clamp(-128, 127).to(torch.int64)
    return (rounded & 0xFF).to(dtype)
