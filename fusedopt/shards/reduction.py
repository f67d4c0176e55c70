"""Adding up over processes. Everything stays on the device; no host waits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up", "combined"]


def combined(totals: Tensor, *, largest: bool) -> Tensor:
    """Pairs (…, n, 2) put together over the dimension ``-2`` to (…, 2): (total, whether something is not finite).

    Args:
        totals: float64; a total is a sum of powers, or with ``largest`` the largest magnitude. NaN stays NaN.
        largest: whether totals are maxima.
    """
    return totals.amax(-2) if largest else totals.sum(-2)


def _in_reach(part: Tensor, group: Any) -> Tensor:
    """``part`` on a device that the group's processes exchange tensors of: CPU offload may have only that of GPUs."""
    kinds = [device.type for device in getattr(group, "_device_types", ())]
    if not kinds or part.device.type in kinds:
        return part
    return part.to(torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device()))


def add_up(part: Tensor, group: Any, *, largest: bool) -> Tensor:
    """Rows of pairs, (k, 2), added up over the processes of a group, by one collective. A new tensor of that shape.

    The result is the same in all of them, to the bit.
    """
    here = _in_reach(part, group)
    if not largest:
        here = here.clone() if here is part else here
        dist.all_reduce(here, group=group)
        return here.to(part.device)
    # A maximum over processes may lose NaN, so all are gathered.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    count, size = part.shape[0], group.size()
    everyone = here.new_empty((size * count, 2))
    gather(everyone, here.contiguous(), group=group)
    return combined(everyone.view(size, count, 2).transpose(0, 1), largest=True).to(part.device)
