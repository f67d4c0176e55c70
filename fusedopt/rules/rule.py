"""What an update rule is: its hyperparameters, its state declared as data, and its maths in plain tensors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .plain import plain_settings

__all__ = ["Hyperparameters", "Rule", "StateColumn", "compute_dtype", "scalar"]


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype a rule calculates in: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def scalar(value: float | Tensor) -> float:
    """The Python float of a number or one-element tensor (a device tensor is read, which synchronizes)."""
    return float(value)


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Base of the frozen dataclasses that hold, and on creation validate, one parameter group's settings.

    Their fields are torch's param-group keys; ``foreach``, ``fused``, ``capturable`` and ``differentiable`` belong to
    torch's layout and have no effect here.
    """

    def as_defaults(self) -> dict[str, Any]:
        """The settings as the ``defaults`` dict of a ``torch.optim.Optimizer`` (values by reference, not copied)."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _make_plain(self) -> None:
        """First of the checks: numbers of other packages become Python's, see Note [Plain numbers]."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain_settings(getattr(self, field.name)))

    def check_flags(self) -> None:
        """Refuse the two torch flags that ask for what a fused kernel cannot do."""
        if getattr(self, "differentiable", False):
            raise RuntimeError("differentiable=True is not supported: a fused step records no autograd graph")
        if getattr(self, "fused", None) and getattr(self, "foreach", None):
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """The validated settings of a param group; keys that are not settings are left aside."""
        return cls(**{field.name: group[field.name] for field in dataclasses.fields(cls) if field.name in group})


@dataclasses.dataclass(frozen=True)
class StateColumn:
    """One tensor of per-parameter state, shaped like its parameter and zero before the first step.

    Args:
        name: torch's state name, such as ``exp_avg``.
        needed: tells from a param group whether its parameters carry this column.
    """

    name: str
    needed: Callable[[Mapping[str, Any]], bool] = lambda group: True


class Rule(abc.ABC):
    """One optimizer's maths. Subclasses are stateless; every backend is tested against :meth:`update`.

    Attributes:
        name: the rule's name in the compiled module and in messages.
        hyperparameters: the frozen dataclass of its settings.
        columns: its state, in the order the kernels use.
        hides_step: True when torch keeps no ``step`` for this rule; it is then left out of ``state_dict()``.
    """

    name: ClassVar[str]
    hyperparameters: ClassVar[type[Hyperparameters]]
    columns: ClassVar[tuple[StateColumn, ...]]
    hides_step: ClassVar[bool] = False

    @abc.abstractmethod
    def update(
        self, group: Mapping[str, Any], param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int
    ) -> None:
        """Apply one step in place.

        Args:
            group: the parameter's group.
            param: parameter values in the compute dtype.
            grad: gradient in the compute dtype, unscaled and clipped; not written.
            state: this rule's columns in the compute dtype, by name.
            step: number of this step, from 1.
        """

    def init_state(
        self, group: Mapping[str, Any], param: Tensor, state: MutableMapping[Tensor, dict[str, Any]]
    ) -> dict[str, Any]:
        """Complete ``state[param]``, the optimizer's state of one parameter, and return it.

        Missing columns are created as zeros and the step count as a 0-dim tensor; a column that is there keeps its
        dtype. A ``step`` that is a Python number or on another device is converted; one that is missing beside a
        column that is there (torch's SGD keeps none) counts as 1. Nothing is created for a rule without state.
        """
        columns = [column.name for column in self.columns if column.needed(group)]
        if not columns:
            return {}
        mine = state[param]
        step = mine.get("step")
        if not isinstance(step, Tensor):
            if step is None:
                step = any(isinstance(mine.get(name), Tensor) for name in columns)
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            mine["step"] = torch.full((), float(step), dtype=dtype, device=param.device)  # waits for no device
        elif step.dim() or step.device != param.device or step.dtype not in (torch.float32, torch.float64):
            dtype = torch.float64 if step.dtype == torch.float64 else torch.float32
            mine["step"] = step.detach().reshape(()).to(device=param.device, dtype=dtype, copy=True)
        for name in columns:
            if not isinstance(mine.get(name), Tensor):
                mine[name] = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
        return mine
