"""Base of the schedulers: the value that they change, when, and how it is written back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ...messages import check_whole_number, did_you_mean, is_number, plain
from ...undo import unchanged_on_error
from ..portable import as_before
from ..wrappers import BaseOptimWrapper, OptimWrapperDict
from .lengths import in_iterations
from .watching import OptimizerLike, unwatch, warn_unless_stepped, watch

__all__ = [
    "INF",
    "LRSchedulerMixin",
    "MomentumSchedulerMixin",
    "_ParamScheduler",
    "check_same_keys",
    "refuse_new_groups",
]

#: ``end`` of a scheduler without an end, as in MMEngine.
INF = int(1e9)


class _ParamScheduler:
    """Base of the schedulers, as ``mmengine.optim._ParamScheduler``.

    A scheduler changes one entry of every parameter group, by a recursive rule on its current value, so that schedulers
    with overlapping spans multiply, in the order in which they step. It is active in steps ``begin <= step < end``,
    where step 0 is made at construction; outside this span it leaves the value as it is. It also changes a wrapper's
    ``base_param_settings``. A subclass defines :meth:`_factor`, :meth:`_next`, or :meth:`_get_value` for all groups at
    once.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: key of the parameter groups to change, such as ``'lr'``, ``'momentum'`` or ``'weight_decay'``. A
            tensor value is updated in place.
        begin: first active step.
        end: first step that is no longer active.
        last_step: number of active steps made before, minus one, to resume without a state dict; -1 for none. When
            resuming, the groups must have ``initial_<param_name>``.
        by_epoch: whether a step is an epoch or an iteration; for the code that steps the scheduler.
        verbose: print each new value.

    Raises:
        TypeError: ``optimizer`` is not an optimizer or a single wrapper, or a number has the wrong type.
        ValueError: ``begin`` is not below ``end``, or a number is out of range.
        KeyError: a parameter group has no ``param_name``, or, when resuming, no ``initial_<param_name>``.
    """

    #: Arguments in steps, besides ``begin`` and ``end``, that are multiplied when epochs are converted to iterations.
    _in_steps: ClassVar[tuple[str, ...]] = ()
    #: Those of them that may be fractions of an epoch, which MMEngine turns into fractions of an iteration.
    _may_be_fractions: ClassVar[tuple[str, ...]] = ()
    #: Arguments that may be lists with an entry for each parameter group.
    _per_group: ClassVar[tuple[str, ...]] = ()
    #: Other keys of the parameter groups that change too.
    moves_too: ClassVar[tuple[str, ...]] = ()
    #: Attributes that are not part of the state dict.
    _not_state: ClassVar[frozenset[str]] = frozenset({"optimizer"})

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ):
        _check_optimizer(optimizer)
        begin = check_whole_number("begin", begin, 0)
        end = INF if end == float("inf") else check_whole_number("end", end)
        if begin >= end:
            raise ValueError(f"Invalid begin={begin}, end={end}; expected begin < end")
        self.optimizer = optimizer
        self.param_name = param_name
        self.begin = begin
        self.end = end
        self.by_epoch = by_epoch = plain(by_epoch)
        self.verbose = verbose
        self.last_step = check_whole_number("last_step", last_step, -1)
        self._global_step = -1 if last_step == -1 else begin + last_step
        if not isinstance(by_epoch, bool):
            raise TypeError(f"Invalid by_epoch: {by_epoch!r}; expected True or False")
        self._check_groups()
        for index, group in enumerate(optimizer.param_groups):
            if last_step != -1 and self._initial not in group:
                raise KeyError(f"param_groups[{index}] has no {self._initial!r}, which last_step={last_step} needs")
        with unchanged_on_error(optimizer):  # see Note [What fails changes nothing]
            self._prepare()
            self._note_bases()
            self._first_step()

    @property
    def _initial(self) -> str:
        return f"initial_{self.param_name}"

    def _check_groups(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if self.param_name not in group:
                hint = did_you_mean(self.param_name, [key for key in group if key not in ("params", "param_names")])
                raise KeyError(f"param_groups[{index}] has no {self.param_name!r}; {hint}")
            value = group[self.param_name]
            if not is_number(value):
                raise TypeError(
                    f"param_groups[{index}][{self.param_name!r}] is a {type(value).__name__}; a scheduler moves "
                    "numbers and 1-element tensors"
                )
        self._make_values_plain()

    def _make_values_plain(self) -> None:
        """Convert numbers that other code wrote to the groups, see Note [Plain numbers]."""
        groups = self.optimizer.param_groups
        for key in (self.param_name, *self.moves_too):
            for group in groups:
                if type(group.get(key)) is not float and key in group:
                    group[key] = plain(group[key])

    def _prepare(self) -> None:
        """Check, and then set, attributes that depend on ``begin``, ``end`` and the parameter groups."""

    def _note_bases(self) -> None:
        """Store the value of each group before any schedule."""
        for group in self.optimizer.param_groups:
            group.setdefault(self._initial, _copied(group[self.param_name]))
        self.base_values = [_copied(plain(group[self._initial])) for group in self.optimizer.param_groups]

    def _take_in_new_groups(self) -> None:
        """Include groups that ``add_param_group`` added since the last step."""
        self._check_groups()
        self._note_bases()

    def _first_step(self) -> None:
        watch(self.optimizer)
        self.step()

    def step(self) -> None:
        """Advance by one step; call it after the optimizer's."""
        if hasattr(self, "_last_value"):  # not the step at construction
            warn_unless_stepped(self.optimizer)
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_values):
            self._take_in_new_groups()
        if self.param_name not in groups[0]:
            raise KeyError(
                f"param_groups[0] has no {self.param_name!r} any more: the state loaded into the optimizer was saved "
                f"without this {type(self).__name__}; build it after loading"
            )
        self._make_values_plain()
        self._global_step += 1
        if self.begin <= self._global_step < self.end:
            self.last_step += 1
            self._advance()
            self._follow()
        self._note_values()

    def _advance(self) -> None:
        self._write(self._get_value())

    def _write(self, values: Sequence[Any]) -> None:
        """Set the value of each group."""
        key = self.param_name
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            current = group[key]
            if type(current) is not float and isinstance(current, Tensor):  # the fast check first
                current.fill_(value)  # in place: a captured CUDA graph reads this tensor
            else:
                group[key] = value if type(value) is float else plain(value)

    def _follow(self) -> None:
        """Called when the values have changed."""
        if self.verbose:
            for index, group in enumerate(self.optimizer.param_groups):
                self.print_value(True, index, float(group[self.param_name]))

    def print_value(self, is_verbose: bool, group: int, value: float) -> None:
        """Print the value of a group, if ``is_verbose``."""
        if is_verbose:
            print(f"{type(self).__name__}: {self.param_name} of group {group} is now {value:.4e}")

    def _note_values(self) -> None:
        values = map(operator.itemgetter(self.param_name), self.optimizer.param_groups)
        self._last_value = [value if type(value) is float else _copied(value) for value in values]

    def _get_value(self) -> list[Any]:
        """The new value of each group, at ``last_step``."""
        values = map(operator.itemgetter(self.param_name), self.optimizer.param_groups)
        pairs = list(zip(values, self._bases(), strict=True))
        distinct = dict.fromkeys(pairs)  # hundreds of groups share a few values
        factor = self._factor() if type(self)._next is _ParamScheduler._next else None
        if factor is None:
            new = {pair: self._next(*pair) for pair in distinct}
        else:
            new = {pair: self._move(pair[1])(pair[0], factor) for pair in distinct}
        return list(map(new.__getitem__, pairs))

    def _bases(self) -> Sequence[Any]:
        """What the rule takes of each group beside its value: by default the value before any schedule."""
        return self.base_values

    def _next(self, value: Any, base: Any) -> Any:
        """The value at ``last_step``.

        Args:
            value: the current value, a float or a 0-dim tensor.
            base: the group's of :meth:`_bases`.
        """
        factor = self._factor()
        return value if factor is None else self._move(base)(value, factor)

    def _factor(self) -> Any:
        """What the rule is at ``last_step``, for all groups; None where the value stays, or :meth:`_next` knows."""
        raise NotImplementedError

    def _move(self, base: Any) -> Callable[[Any, Any], Any]:
        """What a factor makes of a value, in a group with this of :meth:`_bases`: by default the product."""
        return operator.mul

    def get_last_value(self) -> list[Any]:
        """The value of each group after the last step; tensors are copies."""
        return self._last_value

    def state_dict(self) -> dict[str, Any]:
        """All attributes except the optimizer, as in MMEngine."""
        return {key: value for key, value in vars(self).items() if key not in self._not_state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state from :meth:`state_dict`, or that of MMEngine's class of the same name.

        Its settings replace those given at construction. Values that a file has turned into plain dicts, lists or
        numbers get their types back, see Note [Types on the way through a file]. The values in the parameter groups are
        loaded with the optimizer.

        Raises:
            TypeError: it is not a dict.
            ValueError: it is the state of another type of scheduler, or has another number of groups. The scheduler has
                not changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        state_dict = self._from_mmengine(state_dict)
        self._check_state(state_dict)
        self._restore(as_before(dict(state_dict), self.state_dict()))

    def _from_mmengine(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of MMEngine's class, where it is built otherwise, as one of this class; others stay as they are."""
        return state_dict

    def _restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        unwatch(self.optimizer)

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        scheduled = state_dict.get("param_name", self.param_name)
        if scheduled != self.param_name:
            raise ValueError(
                f"state_dict is from a scheduler of {scheduled!r}; this {kind} schedules {self.param_name!r}"
            )
        check_same_keys(f"state_dict does not fit a {kind}: it", state_dict, self.state_dict())
        bases = state_dict["base_values"]
        if not isinstance(bases, list) or len(bases) != len(self.base_values):
            count = len(bases) if isinstance(bases, list) else repr(bases)
            raise ValueError(
                f"state_dict has base_values for {count} parameter groups; this {kind} drives {len(self.base_values)}"
            )

    @classmethod
    def build_iter_from_epoch(cls, optimizer: OptimizerLike, *, epoch_length: int, **kwargs: Any) -> Any:
        """Build a scheduler that steps after each iteration, from arguments counted in epochs.

        Args:
            optimizer: as for the class.
            epoch_length: iterations in an epoch.
            kwargs: arguments of the class; ``begin`` and ``end`` may be fractions of an epoch.

        Raises:
            ValueError: ``by_epoch`` is False, or an argument that must be whole is a fraction.
        """
        if not kwargs.pop("by_epoch", True):
            raise ValueError(f"{cls.__name__}: convert_to_iter_based=True takes by_epoch=True, got by_epoch=False")
        epoch_length = check_whole_number("epoch_length", epoch_length, 1)
        for name in ("begin", "end"):
            if kwargs.get(name, INF) < INF:
                kwargs[name] = int(plain(kwargs[name]) * epoch_length)
        for name in cls._in_steps:
            if kwargs.get(name) is not None:
                kwargs[name] = in_iterations(name, kwargs[name], epoch_length, name in cls._may_be_fractions)
        return cls(optimizer, **{**kwargs, "by_epoch": False})


class LRSchedulerMixin:
    """Binds a scheduler to the learning rate.

    Args:
        optimizer: see :class:`_ParamScheduler`.
        args, kwargs: arguments of the scheduler, without ``param_name``.
    """

    def __init__(self, optimizer: OptimizerLike, *args: Any, **kwargs: Any):
        super().__init__(optimizer, "lr", *args, **kwargs)  # type: ignore[call-arg]


class MomentumSchedulerMixin:
    """Binds a scheduler to the momentum: ``momentum`` in SGD and similar optimizers, ``betas[0]`` in Adam and similar.

    Groups with ``betas`` get an entry ``momentum``, which the scheduler changes, and ``betas`` follows.

    Args:
        optimizer: see :class:`_ParamScheduler`.
        args, kwargs: arguments of the scheduler, without ``param_name``.

    Raises:
        ValueError: a parameter group has neither.
    """

    optimizer: OptimizerLike

    def __init__(self, optimizer: OptimizerLike, *args: Any, **kwargs: Any):
        _check_optimizer(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if "momentum" not in group and "betas" not in group:
                raise ValueError(
                    f"{type(self).__name__} schedules 'momentum' or betas[0], but param_groups[{index}] has neither "
                    "'momentum' nor 'betas'"
                )
        self.use_betas = "momentum" not in optimizer.defaults
        with unchanged_on_error(optimizer):  # see Note [What fails changes nothing]
            if self.use_betas:
                for group in optimizer.param_groups:
                    group["momentum"] = plain(_copied(group["betas"][0]))
            super().__init__(optimizer, "momentum", *args, **kwargs)  # type: ignore[call-arg]

    def _take_in_new_groups(self) -> None:
        if self.use_betas:
            for group in self.optimizer.param_groups:
                group.setdefault("momentum", plain(_copied(group["betas"][0])))
        super()._take_in_new_groups()  # type: ignore[misc]

    def _follow(self) -> None:
        super()._follow()  # type: ignore[misc]
        if self.use_betas:
            for group in self.optimizer.param_groups:
                betas = group["betas"]
                if type(betas[0]) is not float and isinstance(betas[0], Tensor):
                    betas[0].fill_(group["momentum"])
                else:
                    group["betas"] = (group["momentum"], *betas[1:])


def refuse_new_groups(scheduler: _ParamScheduler) -> NoReturn:
    """Raise a ValueError for new parameter groups that a scheduler cannot handle."""
    raise ValueError(
        f"the optimizer had {len(scheduler.base_values)} parameter groups when this {type(scheduler).__name__} was "
        f"built, and now has {len(scheduler.optimizer.param_groups)}; build a new one"
    )


def check_same_keys(complaint: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise a ValueError that begins with ``complaint`` if the keys of the two differ.

    Private keys that only ``given`` has are allowed: a subclass may set such attributes later.
    """
    differences = [
        f"{verb} {', '.join(map(repr, keys))}"
        for verb, keys in (
            ("lacks", [key for key in expected if key not in given]),
            ("has", [key for key in given if key not in expected and not str(key).startswith("_")]),
        )
        if keys
    ]
    if differences:
        raise ValueError(f"{complaint} {' and '.join(differences)}")


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, OptimWrapperDict):
        raise TypeError(
            "a scheduler drives one optimizer or wrapper, got an OptimWrapperDict of "
            f"{', '.join(map(repr, optimizer))}; build_param_schedulers makes schedulers for each"
        )
    if not isinstance(optimizer, torch.optim.Optimizer | BaseOptimWrapper):
        raise TypeError(f"optimizer must be an optimizer or a wrapper of one, got {type(optimizer).__name__}")


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
