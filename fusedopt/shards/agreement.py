"""Whether the processes that step together mean the same: asked once, before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..messages import is_dtensor
from .domains import Domains
from .flat import is_flat_shard

__all__ = ["agree_on_parameters"]


def _described(param: Any) -> str:
    if is_dtensor(param):
        return f"shape {tuple(param.shape)}, {param.dtype}, {tuple(param.placements)}"
    # Shards of FSDP1 differ in shape from process to process.
    return f"a flat shard, {param.dtype}" if is_flat_shard(param) else f"shape {tuple(param.shape)}, {param.dtype}"


def _as_text(value: Any) -> str:
    """Tensors by what they hold: their devices differ from process to process."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_as_text(each)}" for key, each in value.items())
    return str(value.tolist() if isinstance(value, Tensor) else value)


def agree_on_parameters(
    domains: Domains, param_groups: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], *, shares: bool = False
) -> None:
    """Compare an optimizer with those of the other processes.

    They would add up other things under the same name, or wait for each other forever.

    Args:
        domains: of the optimizer; all processes of its groups must call this.
        param_groups: the optimizer's.
        settings: what else has to be the same, by name.
        shares: each process has other parameters, so that only their settings are compared.

    Raises:
        ValueError: in every process, naming what differs.
    """
    if not domains.groups:
        return
    mine = {name: _as_text(value) for name, value in settings.items()}
    mine |= {"number of parameter groups": str(len(param_groups))}
    for g, group in enumerate(() if shares else param_groups):
        mine[f"number of parameters in param_groups[{g}]"] = str(len(group["params"]))
        for i, param in enumerate(group["params"]):
            mine[f"param_groups[{g}]['params'][{i}]"] = _described(param)
    known = {dist.get_rank(): mine}
    for group in domains.groups:
        everyones: list[Any] = [None] * group.size()
        dist.all_gather_object(everyones, known, group=group)
        known = {rank: theirs for each in everyones for rank, theirs in each.items()}
    ranks = sorted(known)
    for rank in ranks[1:]:
        for what in {**known[ranks[0]], **known[rank]}:
            here, there = known[ranks[0]].get(what, "not there"), known[rank].get(what, "not there")
            if here != there:
                raise ValueError(
                    f"the optimizers of processes {ranks[0]} and {rank} differ in {what}: {here} and {there}; expected "
                    "the same in all processes"
                )
