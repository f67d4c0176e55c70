"""What an update rule is: its hyperparameters, its state declared as data, and its maths in plain tensors."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..messages import plain_settings
from .counts import HiddenCounts, fit_count, fit_problem, new_count
from .precision import CARRIED, PLAIN, Precision
from .state import state_problem

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

    Attributes:
        filled_in: keys that a loaded group may lack, because torch has added them over time: it then gets the default.
    """

    filled_in: ClassVar[tuple[str, ...]] = ("maximize", "foreach", "capturable", "differentiable", "fused")

    def as_defaults(self) -> dict[str, Any]:
        """The settings as the ``defaults`` dict of a ``torch.optim.Optimizer`` (values by reference, not copied)."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _make_plain(self) -> None:
        """First of the checks: numbers of other packages become Python's, see Note [Plain numbers]; flags are flags."""
        for field in dataclasses.fields(self):
            value = plain_settings(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            if isinstance(field.default, bool) and not (isinstance(value, int) and value in (0, 1)):
                raise TypeError(f"Invalid {field.name}: {value!r}; expected True or False")

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
        may_start_late: it is right as zeros, too, when its group asks for it only after some steps.
        squares: it is a mean of squares, which a few bits hold in their own way: Note [Means of squares] in
            csrc/storage.h.
        only_grows: it is a maximum over steps; ``'int8'`` keeps it in bfloat16.
    """

    name: str
    needed: Callable[[Mapping[str, Any]], bool] = lambda group: True
    may_start_late: bool = False
    squares: bool = False
    only_grows: bool = False

    def form_at(self, key: str) -> str | None:
        """The form, one of :data:`fusedopt.rules.codes.FORMS`, of what stands at a key; None for plain numbers."""
        if key.endswith("_codes"):
            return "int8_unsigned" if self.squares else "int8"
        return "float16_root" if key.endswith("_root") else None


class Rule(abc.ABC):
    """One optimizer's maths. Subclasses are stateless; every backend is tested against :meth:`update`.

    Attributes:
        name: the rule's name in the compiled module and in messages.
        hyperparameters: the frozen dataclass of its settings.
        columns: its state, in the order the kernels use.
        hides_step: True when torch keeps no ``step`` for this rule; it is then not in ``optimizer.state`` and
            ``state_dict()``. See Note [Hidden counts].
        trials: settings with which the kernels prove themselves on a GPU, first the usual ones; together they use
            every number of columns. See fusedopt/backends/selftest.py: parameters and gradients have one sign there,
            and nothing must cancel.
    """

    name: ClassVar[str]
    hyperparameters: ClassVar[type[Hyperparameters]]
    columns: ClassVar[tuple[StateColumn, ...]]
    hides_step: ClassVar[bool] = False
    trials: ClassVar[tuple[Mapping[str, Any], ...]] = ({"lr": 0.1},)

    def needed_columns(self, group: Mapping[str, Any]) -> list[str]:
        """Names of the columns that parameters of a group carry."""
        return [column.name for column in self.columns if column.needed(group)]

    def needed_keys(self, group: Mapping[str, Any], param: Tensor, precision: Precision = PLAIN) -> list[str]:
        """The keys of the state of a parameter, but for its step count: those of its columns, then what is carried."""
        columns = [precision.key_of(self, column) for column in self.needed_columns(group)]
        return [*columns, *precision.carried_keys(param)]

    def trial_settings(self) -> Iterator[dict[str, Any]]:
        """The settings of :attr:`trials`, complete; the first are the usual ones."""
        return (self.hyperparameters(**trial).as_defaults() for trial in self.trials)

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

    def problem(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        name: str,
        state: Mapping[Tensor, dict[str, Any]],
        counts: HiddenCounts | None = None,
        *,
        integers: bool = True,
        precision: Precision = PLAIN,
    ) -> str | None:
        """Why :meth:`init_state` cannot complete ``state[param]``, in a sentence, or None.

        Args:
            group: the parameter's group.
            param: the parameter.
            name: what messages call it.
            state: the optimizer's state.
            counts: where the step counts are when they are not in ``state``.
            integers: whether the backend counts in int64, too.
            precision: in what form the optimizer keeps its state.
        """
        if (refused := precision.refusal(self, group, param)) is not None:
            return f"{name} {refused}"
        entry = state.get(param)
        reason = state_problem(self, group, param, name, entry, hidden_step=counts is not None, precision=precision)
        step = entry.get("step") if reason is None and entry and counts is None else None
        if isinstance(step, Tensor):
            reason = fit_problem(step, param.device, integers=integers)
            reason = reason and f"state 'step' of {name} {reason}"
        return reason

    def init_state(
        self,
        group: Mapping[str, Any],
        param: Tensor,
        state: MutableMapping[Tensor, dict[str, Any]],
        counts: HiddenCounts | None = None,
        *,
        integers: bool = True,
        precision: Precision = PLAIN,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """Complete ``state[param]``, the optimizer's state of one parameter; return it and the parameter's step count.

        Missing columns are created as zeros, masters and averages from the parameter, and the step count as a 0-dim
        tensor; a column that is there keeps its dtype, and so does a step count that the backend can keep, see Note
        [Counts are not copied]. Nothing is created for a parameter without state.

        Args:
            group: the parameter's group.
            param: the parameter; :meth:`problem` had nothing against its state.
            state: the optimizer's state.
            counts: where the step counts are when they are not in ``state``.
            integers: whether the backend counts in int64, too.
            precision: in what form the optimizer keeps its state.
        """
        keys = self.needed_keys(group, param, precision)
        if not keys:
            return {}, None
        mine = state.get(param)
        if mine is None:
            mine = state[param] = {}
        count = None
        if counts is None:
            count = mine.get("step")
            if isinstance(count, Tensor):
                fit_count(count, param.device, integers=integers)
            else:
                count = mine["step"] = new_count(count or 0, param.device)
        forms = (keys[0], *CARRIED[:2]) if keys[0] in CARRIED[:2] else keys[:1]
        created = not any(isinstance(mine.get(key), Tensor) for key in forms)
        counted = None if counts is None or not created else counts.of_entry(param, mine)
        for key in keys:
            if not isinstance(mine.get(key), Tensor):
                mine[key] = precision.new_state(self, param, key, mine)
        if precision.master_key in keys:  # in another form until now
            mine.pop("master" if precision.master_key == "master_low" else "master_low", None)
        if counts is not None:
            if counted is not None:  # momentum that starts late beside a master or an average, which have counted
                counts.put(param, mine[keys[0]], counted)
                created = False
            count = counts.settle(param, mine[keys[0]], created=created, begins_as_zeros=keys[0] not in CARRIED)
        return mine, count
