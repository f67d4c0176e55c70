"""Bytes that an optimizer holds and moves, counted by the tensors that there will be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..messages import local_of
from ..rules import CARRIED, Precision, Rule

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["Memory", "memory_of", "memory_of_recipe"]

#: Elements of the parameter that a recipe is counted by.
_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes for each element of an optimizer's parameters, as far as they are in this process.

    Args:
        parameters: the parameters themselves.
        gradients: their gradients, in the dtype that they have, or else that of the parameters.
        states: the states of the rule with their scales, and step counts.
        carried: masters and averages.
        elements: of all parameters.
        written_back: whether a step writes the gradients, too.
        average_interval: steps from one update of the average to the next.
        average: of ``carried``, the average.
        frozen: of ``parameters``, those that no step writes.
    """

    parameters: float
    gradients: float
    states: float
    carried: float
    elements: int
    written_back: bool = False
    average_interval: int = 1
    average: float = 0.0
    frozen: float = 0.0

    @property
    def held(self) -> float:
        """What is in memory from the backward pass to the step."""
        return self.held_between_steps + self.gradients

    @property
    def held_between_steps(self) -> float:
        """What is in memory when the gradients are freed."""
        return self.parameters + self.states + self.carried

    @property
    def moved_bare(self) -> float:
        """What a step reads and writes that finds nothing out first, on an average of steps."""
        average = self.average / self.average_interval
        both_ways = self.parameters - self.frozen + self.states + self.carried - self.average + average
        return 2 * both_ways + self.gradients * (2 if self.written_back else 1)

    @property
    def moved_check(self) -> float:
        """The same of a step that first looks for gradients that are not finite."""
        return self.moved_bare + self.gradients

    @property
    def moved_full(self) -> float:
        """The same of a step that first finds the norm of the gradients, which reads them as often."""
        return self.moved_check

    def __str__(self) -> str:
        parts = [("parameters", self.parameters), ("gradients", self.gradients), ("states", self.states)]
        parts += [("master and average", self.carried)]
        listed = ", ".join(f"{name} {value:.3g}" for name, value in parts if value)
        return (
            f"bytes per parameter: {self.held:.4g} held ({listed}), "
            f"{self.moved_bare:.4g} moved in a step, {self.moved_full:.4g} in one that clips or checks"
        )


def memory_of(optimizer: FusedOptimizer) -> Memory:
    """See :meth:`FusedOptimizer.bytes_per_parameter`."""
    counted = [
        _bytes_of(optimizer.rule, optimizer._precision, group, param, optimizer.state.get(param) or {})
        for group in optimizer.param_groups
        for param in group["params"]
        if not torch.nn.parameter.is_lazy(param)
    ]
    average = optimizer._precision.average
    interval = 1 if average is None else average.interval
    return _summed(counted, optimizer.write_back_grads, interval)


def memory_of_recipe(rule: Rule, precision: Precision, settings: Mapping[str, Any], dtype: torch.dtype) -> Memory:
    """What an optimizer of one large parameter of a dtype would hold and move.

    Args:
        rule: the maths.
        precision: the form of the state.
        settings: of the group.
        dtype: of the parameter.
    """
    param = torch.empty(_ELEMENTS, dtype=dtype, device="meta", requires_grad=True)
    return _summed([_bytes_of(rule, precision, settings, param, {})], False, 1)


def _size(tensor: Tensor) -> int:
    local = local_of(tensor)
    return local.numel() * local.element_size()


def _bytes_of(
    rule: Rule, precision: Precision, group: Mapping[str, Any], param: Tensor, entry: Mapping[Any, Any]
) -> dict[str, int]:
    """Bytes of one parameter by kind; frozen ones have neither gradients nor state."""
    count = {"elements": local_of(param).numel(), "parameters": _size(param)}
    if not param.requires_grad and param.grad is None:
        return {**count, "frozen": count["parameters"]}
    count["gradients"] = _size(param if param.grad is None else param.grad)
    keys = rule.needed_keys(group, param, precision)
    local = local_of(param.detach())
    stand_in = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device="meta")
    for key in keys:
        there = entry.get(key)
        size = _size(there if isinstance(there, Tensor) else precision.new_state(rule, stand_in, key))
        kind = "carried" if key in CARRIED else "states"
        count[kind] = count.get(kind, 0) + size
        if key == "ema":
            count["average"] = size
    if keys:
        step = entry.get("step")
        count["states"] = count.get("states", 0) + (_size(step) if isinstance(step, Tensor) else _new_count_size())
    return count


def _new_count_size() -> int:
    return 8 if torch.get_default_dtype() == torch.float64 else 4


def _summed(counted: Iterable[Mapping[str, int]], written_back: bool, interval: int) -> Memory:
    counted = list(counted)
    elements = sum(each["elements"] for each in counted)

    def per_element(kind: str) -> float:
        return sum(each.get(kind, 0) for each in counted) / max(elements, 1)

    return Memory(
        parameters=per_element("parameters"),
        gradients=per_element("gradients"),
        states=per_element("states"),
        carried=per_element("carried"),
        elements=elements,
        written_back=written_back,
        average_interval=interval,
        average=per_element("average"),
        frozen=per_element("frozen"),
    )
