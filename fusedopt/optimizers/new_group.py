"""What a parameter group must be before an optimizer takes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import GeneratorType
from typing import Any

from torch import Tensor

from ..messages import check_no_model, check_parameter, parameter_name
from ..rules import Precision, Rule

__all__ = ["check_new_group"]


def check_new_group(
    rule: Rule, precision: Precision, defaults: Mapping[str, Any], param_group: dict[str, Any], number: int
) -> None:
    """Check the settings and parameters of a group; an iterator of parameters in it becomes a list.

    Args:
        rule: the optimizer's.
        precision: the optimizer's.
        defaults: of the settings.
        param_group: the group, as it is handed to ``add_param_group``.
        number: of the group in the optimizer.

    Raises:
        TypeError, ValueError: see :meth:`FusedOptimizer.add_param_group`.
    """
    check_no_model(param_group, "an entry of params")
    if isinstance(param_group, dict) and "clip_grad" in param_group:
        raise ValueError(
            "clip_grad is no setting of a parameter group: it is that of the optimizer, over all groups. (torch's "
            "ZeroRedundancyOptimizer hands it on in the groups; expected "
            "fusedopt.ZeroRedundancyOptimizer(params, optimizer_type=..., clip_grad=...))"
        )
    for name, own in precision.settings(rule).items() if isinstance(param_group, dict) else ():
        if name in param_group and Precision.parse(rule, **{name: param_group[name]}).settings(rule)[name] != own:
            raise ValueError(
                f"{name} is no setting of a parameter group: it is that of the optimizer, over all groups, here "
                f"{own!r}; got {param_group[name]!r}"
            )
    if isinstance(param_group, dict) and "params" in param_group:
        params = param_group["params"]
        check_no_model(params, "params of a parameter group")
        if isinstance(params, GeneratorType) and inspect.getgeneratorstate(params) == inspect.GEN_CLOSED:
            raise ValueError(
                "params of a parameter group is a generator that was used up before; pass a list to use it twice"
            )
        if isinstance(params, Iterator):
            params = param_group["params"] = list(params)
        rule.hyperparameters.from_group({**defaults, **param_group})
        if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
            entries = [entry if isinstance(entry, tuple) else (None, entry) for entry in params]
            named = {
                **param_group,
                "params": [tensor for _, tensor in entries],
                "param_names": [name for name, _ in entries if name is not None] or param_group.get("param_names", []),
            }
            seen = set()
            for index, (_, tensor) in enumerate(entries):
                check_no_model(tensor, "an entry of params")
                if isinstance(tensor, Tensor):
                    name = parameter_name(named, number, index)
                    check_parameter(name, tensor)
                    if id(tensor) in seen:  # torch warns; two threads would write one parameter here
                        raise ValueError(f"{name} appears twice in its group")
                    seen.add(id(tensor))
