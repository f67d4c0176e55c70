"""Groups that an optimizer's constructor adds, compared with those before them without a walk over all of these.

Note [Groups while constructing]: torch's ``add_param_group`` compares a new group with every other one: it makes a set
of all their parameters, and looks whether all have names. A constructor that adds thousands of groups does so thousands
of times. So while one of ours runs, torch is shown no other groups, and what it would look for is looked up in a set
that grows with them. Only where it would find something is it shown all of them, and raises its own error. Each group
still goes through ``add_param_group``, which a subclass may override. Such a method may write to all groups, so all are
looked at again when its next one comes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Known", "add_group", "all_fit", "while_constructing"]


_OWN = __name__.partition(".")[0] + "."


class Known:
    """The parameters of the groups so far, and whether they have names."""

    def __init__(self) -> None:
        self._params: set[Tensor] = set()
        self._named: set[bool] = set()
        self._count = 0

    def fits(self, group: Mapping[str, Any]) -> bool:
        """Whether torch would have nothing against this group beside the others."""
        return self._named <= {"param_names" in group} and self._params.isdisjoint(group["params"])

    def take_in(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note those of ``groups`` that came since the last call."""
        for group in groups[self._count :]:
            self._params.update(group["params"])
            self._named.add("param_names" in group)
        self._count = len(groups)


def all_fit(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch would have nothing against these groups, as they are in an optimizer, beside each other."""
    params = [param for group in groups for param in group["params"]]
    return len({"param_names" in group for group in groups}) <= 1 and len(set(params)) == len(params)


@contextlib.contextmanager
def while_constructing(optimizer: Any) -> Iterator[None]:
    """``with while_constructing(optimizer):`` makes :func:`add_group` compare by a :class:`Known` inside."""
    optimizer._known = Known()
    try:
        yield
    finally:
        del optimizer._known


def add_group(optimizer: Any, add: Callable[[dict[str, Any]], None], param_group: dict[str, Any]) -> None:
    """``add(param_group)``; see Note [Groups while constructing].

    Args:
        optimizer: to which a group is added; its ``_known`` is None but in its constructor.
        add: the ``add_param_group`` of the class above it. If that is not torch's, it sees all groups.
        param_group: the group.
    """
    known: Known | None = optimizer._known
    if known is None or getattr(add, "__module__", "").partition(".")[0] != "torch":
        add(param_group)
        return
    groups = optimizer.param_groups
    if not type(optimizer).add_param_group.__module__.startswith(_OWN):
        known = optimizer._known = Known()
    known.take_in(groups)
    optimizer.param_groups = []
    try:
        add(param_group)  # makes tensors and names out of what it was given
        fits = known.fits(param_group)
    finally:
        optimizer.param_groups = groups
    if fits:
        groups.append(param_group)
    else:
        add(param_group)
