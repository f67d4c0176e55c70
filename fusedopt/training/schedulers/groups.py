"""Arguments with an entry for each parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .watching import OptimizerLike, optimizer_of

__all__ = ["per_group"]


def per_group(name: str, value: Any, optimizer: OptimizerLike, key: str) -> list[Any]:
    """``value`` for each parameter group: itself, or its entries if it is a list.

    A wrapper's ``base_param_settings``, for which a list need not have an entry, takes that of a group whose tensor it
    shares, else the last one.

    Args:
        name: the argument's name.
        value: the argument's value.
        optimizer: the optimizer or wrapper with the groups.
        key: the key in the groups to which the argument applies.

    Raises:
        ValueError: the list has another length, or different entries for groups that share one tensor.
    """
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [value] * groups
    own = len(optimizer_of(optimizer).param_groups)
    if len(value) not in (own, groups):
        raise ValueError(f"{name} has {len(value)} entries; expected one for each of {own} parameter groups")
    owners: dict[Any, int] = {}
    entries = list(value)
    for index, group in enumerate(optimizer.param_groups):
        owner = owners.setdefault(_place_of(group, key, index), index)
        if index == len(entries):
            entries.append(entries[owner if owner < index else -1])
        elif entries[owner] != entries[index]:
            raise ValueError(
                f"{name} has {entries[owner]!r} for param_groups[{owner}] and {entries[index]!r} for "
                f"param_groups[{index}], which share one tensor as their {key!r}; expected equal entries, or a tensor "
                "for each"
            )
    return entries


def _place_of(group: Mapping[str, Any], key: str, index: int) -> Any:
    """Identifies where a group's value is: a tensor's memory, which groups may share, or the group's index."""
    value = group.get(key)
    if value is None and key == "momentum" and "betas" in group:
        value = group["betas"][0]
    return (value.device, value.data_ptr()) if isinstance(value, Tensor) else index
