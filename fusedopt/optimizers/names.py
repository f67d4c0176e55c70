"""Parameters' names in a state dict and in an optimizer: by them, state finds its parameter in another order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..messages import group_names
from ..messages.wrapping import barest_name

__all__ = ["in_the_order_of"]


def in_the_order_of(groups: Sequence[Mapping[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved groups, and the parameters in each, in the order that these groups' parameters have by their names.

    Names that only one side has say nothing, and then the order counts, as in torch. But state never goes to another
    parameter than that of its name.

    Args:
        groups: an optimizer's.
        saved: as many, out of a state dict; may be changed.

    Raises:
        ValueError: the names contradict the order, and there is none in which they fit.
    """
    theirs: list[list[Any]] = []
    ours: list[list[Any]] = []
    for g, (group, saved_group) in enumerate(zip(groups, saved, strict=True)):
        names, saved_names = _names(group), _names(saved_group)
        if names is None or saved_names is None:
            # Nothing to compare: each place is its own name.
            names, saved_names = ([(g, i) for i in range(len(each["params"]))] for each in (group, saved_group))
        ours.append(names)
        theirs.append(saved_names)
    if theirs == ours:
        return saved
    if _all(theirs) != _all(ours):
        theirs, ours = ([[_bare(name) for name in names] for names in side] for side in (theirs, ours))
    if _all(theirs) == _all(ours):
        return _sorted_by_name(groups, saved, theirs, ours)
    known, wanted = _all(theirs), _all(ours)
    for g in range(len(saved)):
        for i, (name, mine) in enumerate(zip(theirs[g], ours[g], strict=False)):
            if name != mine and (name in wanted or mine in known):
                raise ValueError(
                    f"loaded state dict has parameter {name!r} where this optimizer has {mine!r} "
                    f"(param_groups[{g}]['params'][{i}]), and their names differ otherwise, too"
                )
    return saved


def _sorted_by_name(
    groups: Sequence[Mapping[str, Any]], saved: list[dict[str, Any]], theirs: list[list[Any]], ours: list[list[Any]]
) -> list[dict[str, Any]]:
    twice = [name for name, times in _all(ours).items() if times > 1]
    if twice:
        if theirs == ours:
            return saved
        raise ValueError(f"loaded state dict has another order of parameters, of which two are called {twice[0]!r}")
    of = {frozenset(names): g for g, names in enumerate(theirs) if names}
    empty = iter([g for g, names in enumerate(theirs) if not names])
    ordered = []
    for g, names in enumerate(ours):
        source = of.get(frozenset(names)) if names else next(empty, None)
        if source is None:
            raise ValueError(
                f"loaded state dict has the parameters of param_groups[{g}] ({', '.join(map(repr, names))}) in other "
                "groups"
            )
        group = saved[source]
        places = [theirs[source].index(name) for name in names]
        for key in ("params", "param_names"):
            if len(group.get(key) or ()) == len(places):
                group[key] = [group[key][place] for place in places]
        ordered.append(group)
    return ordered


def _names(group: Mapping[str, Any]) -> list[Any] | None:
    """The names of a group's parameters, or None when it does not have one for each.

    A state dict that names parameters in ``params`` itself, as those of ``torch.distributed.checkpoint``, is sorted.
    """
    names = group_names(group)
    params = group["params"]
    if len(names) != len(params) or any(isinstance(param, str) for param in params):
        return None
    return names


def _all(side: list[list[Any]]) -> Counter[Any]:
    return Counter(name for names in side for name in names)


def _bare(name: Any) -> Any:
    """The name without what wrappers of the model have added."""
    return barest_name(name) if isinstance(name, str) else name
