"""torch's own schedulers, with a span, for wrappers and, where that makes sense, for any setting."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils

from ...messages import did_you_mean, plain_settings
from ..portable import as_before
from ..registry import PARAM_SCHEDULERS
from .base import INF, _copied, _ParamScheduler, check_same_keys, refuse_new_groups
from .groups import per_group
from .watching import OptimizerLike

__all__ = ["SWALR", "CosineAnnealingWarmRestarts", "CyclicLR", "LambdaLR", "MultiplicativeLR", "TorchParamScheduler"]


class _AsLR(MutableMapping[str, Any]):
    """A view of a parameter group in which ``'lr'`` stands for another key."""

    def __init__(self, group: MutableMapping[str, Any], param_name: str):
        self._group = group
        self._param_name = param_name

    def _key(self, key: str) -> str:
        *prefix, last = key.rsplit("_", 1)
        return "_".join([*prefix, self._param_name]) if last == "lr" else key

    def __getitem__(self, key: str) -> Any:
        return self._group[self._key(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[self._key(key)] = value

    def __delitem__(self, key: str) -> None:
        del self._group[self._key(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


class _Groups(torch.optim.Optimizer):
    """What torch's schedulers see of an optimizer or wrapper: its present groups and its defaults."""

    def __init__(
        self, groups: Callable[[], list[Any]], defaults: dict[str, Any]
    ):  # without torch's __init__: there is nothing to step
        self.groups = groups
        self.defaults = defaults
        self._opt_called = True  # we watch the order of calls ourselves

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        return self.groups()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or torch's schedulers replace it

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class TorchParamScheduler(_ParamScheduler):
    """One of torch's schedulers, active from ``begin`` to ``end``.

    torch's scheduler is built, and makes its initial step, when the span begins.

    Args:
        optimizer: see :class:`_ParamScheduler`.
        args, kwargs: arguments of torch's scheduler. A list with an entry for each parameter group need not have one
            for a wrapper's ``base_param_settings``, which takes the last entry.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`; ``last_epoch`` is an alias of
            ``last_step``.

    Raises:
        TypeError, ValueError: torch's scheduler rejects its arguments.
    """

    #: torch's class.
    _scheduler: ClassVar[Callable[..., Any]]
    _not_state = frozenset({"optimizer", "_arguments", "_torch"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_scheduler" in vars(cls) and "__init__" not in vars(cls):
            torchs = inspect.signature(cls._scheduler).parameters
            ours = list(inspect.signature(cls.__init__).parameters.values())
            keywords = [each for each in ours if each.kind is each.KEYWORD_ONLY]
            cls.__signature__ = inspect.Signature([*torchs.values(), *keywords])  # type: ignore[attr-defined]

    def __init__(
        self,
        optimizer: OptimizerLike,
        *args: Any,
        param_name: str = "lr",
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
        **kwargs: Any,
    ):
        known = inspect.signature(self._scheduler)
        for name in kwargs:
            if name not in known.parameters:
                hint = did_you_mean(name, list(known.parameters)[1:])
                raise TypeError(f"{type(self).__name__} has no argument {name!r}; {hint}")
        _, *given = known.bind_partial(optimizer, *args, **kwargs).arguments.items()
        self._arguments = plain_settings(dict(given))
        last_step = self._arguments.pop("last_epoch", last_step)
        self._torch: Any = None
        super().__init__(optimizer, param_name, begin, end, last_step, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(cls, optimizer: OptimizerLike, *, epoch_length: int, **kwargs: Any) -> Any:
        """See :meth:`_ParamScheduler.build_iter_from_epoch`; torch's defaults are in epochs too."""
        parameters = inspect.signature(cls._scheduler).parameters
        defaults = {name: parameters[name].default for name in cls._in_steps}
        given = {name: value for name, value in defaults.items() if isinstance(value, int)}
        return super().build_iter_from_epoch(optimizer, epoch_length=epoch_length, **{**given, **kwargs})

    def _make(self, groups: Callable[[], list[Any]], last_step: int = -1) -> Any:
        arguments = dict(self._arguments)
        for name in self._per_group:
            if name in arguments:
                key = "momentum" if name.endswith("momentum") else self.param_name
                arguments[name] = per_group(name, arguments[name], self.optimizer, key)
        if last_step != -1:
            arguments["last_epoch"] = last_step
        return type(self)._scheduler(_Groups(groups, self.optimizer.defaults), **arguments)

    def _live(self) -> list[Any]:
        groups: list[Any] = self.optimizer.param_groups
        return groups if self.param_name == "lr" else [_AsLR(group, self.param_name) for group in groups]

    def _trial(self) -> Any:
        """torch's scheduler on copies of the groups."""
        copies = [
            _AsLR({key: _copied(value) for key, value in group.items() if key != "params"}, self.param_name)
            for group in self.optimizer.param_groups
        ]
        return self._make(lambda: copies)

    def _prepare(self) -> None:
        self._trial()

    def _take_in_new_groups(self) -> None:
        refuse_new_groups(self)

    def _advance(self) -> None:
        groups = self.optimizer.param_groups
        held = [group.get(self.param_name) for group in groups]
        if self._torch is None:
            self._torch = self._make(self._live, self.last_step - 1)
        else:
            self._torch.step()
        for group, value in zip(groups, held, strict=True):  # torch before 2.9 replaces some tensors by numbers
            if isinstance(value, Tensor) and group[self.param_name] is not value:
                group[self.param_name] = value.fill_(group[self.param_name])
        self._make_values_plain()

    def _make_values_plain(self) -> None:
        """See :class:`_ParamScheduler`; torch's schedulers write results of user functions, and to ``betas`` too."""
        super()._make_values_plain()
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = plain_settings(group["betas"])

    def state_dict(self) -> dict[str, Any]:
        """As :class:`_ParamScheduler`'s, with torch's own as ``torch_state``, which is None before ``begin``."""
        state = None if self._torch is None else _plain(self._torch.state_dict())
        return {**super().state_dict(), "kind": type(self).__name__, "torch_state": state}

    def _restore(self, state: dict[str, Any]) -> None:
        torchs = state.pop("torch_state")
        del state["kind"]
        restored = None
        if torchs is not None:
            restored = self._trial()
            restored.load_state_dict(as_before(dict(torchs), _plain(restored.state_dict())))
            restored.optimizer.groups = self._live
        self._torch = restored
        super()._restore(state)

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        if state_dict.get("kind", kind) != kind:
            raise ValueError(f"state_dict is from a {state_dict['kind']}, not from a {kind}")
        super()._check_state(state_dict)
        if (state := state_dict["torch_state"]) is not None:
            check_same_keys(
                f"state_dict['torch_state'] does not fit this torch's {self._scheduler.__name__}: it",
                state,
                _plain(self._trial().state_dict()),
            )


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict without functions, which some releases of torch include."""
    return {key: plain_settings(value) for key, value in state.items() if not callable(value)}


@PARAM_SCHEDULERS.register_module()
class CyclicLR(TorchParamScheduler):
    """``torch.optim.lr_scheduler.CyclicLR`` with ``begin``, ``end`` and ``by_epoch``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        base_lr: lowest value, or a list with one for each parameter group.
        max_lr: highest value, or a list with one for each parameter group.
        step_size_up: number of steps from the lowest value to the highest.
        step_size_down: number of steps back; ``step_size_up`` by default.
        mode: ``'triangular'``, ``'triangular2'`` or ``'exp_range'``: how the height of the cycles changes.
        gamma: factor of the height at each step, for ``'exp_range'``.
        scale_fn: a function of one argument that replaces ``mode``.
        scale_mode: ``'cycle'`` or ``'iterations'``: what ``scale_fn`` is called with.
        cycle_momentum: move the momentum against the learning rate; needs momentum or betas.
        base_momentum: lowest momentum, or a list with one for each parameter group.
        max_momentum: highest momentum, or a list with one for each parameter group.
        last_epoch: alias of ``last_step``.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _scheduler = lr_scheduler.CyclicLR
    _per_group = ("base_lr", "max_lr", "base_momentum", "max_momentum")
    _in_steps = ("step_size_up", "step_size_down")
    _may_be_fractions = ("step_size_up", "step_size_down")
    moves_too = ("momentum",)

    def _make(self, groups: Callable[[], list[Any]], last_step: int = -1) -> Any:
        if self.param_name != "lr":
            self._arguments.setdefault("cycle_momentum", False)
        made = super()._make(groups, last_step)
        # torch starts from initial_lr, but here the value may have been scheduled before.
        made.last_epoch -= 1
        made.step()
        return made

    def _advance(self) -> None:
        """As torch, but update tensors, which torch replaces by numbers, in place."""
        groups = self.optimizer.param_groups
        held = [(group.get("momentum"), group.get("betas")) for group in groups]
        super()._advance()
        for group, (momentum, betas) in zip(groups, held, strict=True):
            if isinstance(momentum, Tensor) and group["momentum"] is not momentum:
                group["momentum"] = momentum.fill_(group["momentum"])
            if betas is not None and isinstance(betas[0], Tensor) and group["betas"][0] is not betas[0]:
                betas[0].fill_(group["betas"][0])
                group["betas"] = betas


@PARAM_SCHEDULERS.register_module()
class CosineAnnealingWarmRestarts(TorchParamScheduler):
    """``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`` with ``begin``, ``end`` and ``by_epoch``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        T_0: number of steps of the first cosine.
        T_mult: factor of the length from one cosine to the next, a whole number >= 1.
        eta_min: value at the end of each cosine.
        last_epoch: alias of ``last_step``.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _scheduler = lr_scheduler.CosineAnnealingWarmRestarts
    _in_steps = ("T_0",)


@PARAM_SCHEDULERS.register_module()
class SWALR(TorchParamScheduler):
    """``torch.optim.swa_utils.SWALR`` with ``begin``, ``end`` and ``by_epoch``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        swa_lr: the value to go to, or a list with one for each parameter group.
        anneal_epochs: number of steps until it is reached.
        anneal_strategy: ``'cos'`` or ``'linear'``.
        last_epoch: alias of ``last_step``.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _scheduler = swa_utils.SWALR
    _per_group = ("swa_lr",)
    _in_steps = ("anneal_epochs",)


class _ByFunction(TorchParamScheduler):
    """A scheduler whose values are given by a function of the number of steps."""

    _per_group = ("lr_lambda",)

    @classmethod
    def build_iter_from_epoch(cls, optimizer: OptimizerLike, *, epoch_length: int, **kwargs: Any) -> Any:
        """Not supported: the function's argument cannot be converted."""
        raise ValueError(
            f"{cls.__name__} cannot be built with convert_to_iter_based=True: its lr_lambda is called with a number of "
            "steps; give by_epoch=False and a function of iterations"
        )


@PARAM_SCHEDULERS.register_module()
class LambdaLR(_ByFunction):
    """``torch.optim.lr_scheduler.LambdaLR`` with ``begin``, ``end`` and ``by_epoch``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        lr_lambda: a function from the number of steps to a factor of the first value, or a list of functions, one for
            each parameter group.
        last_epoch: alias of ``last_step``.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _scheduler = lr_scheduler.LambdaLR


@PARAM_SCHEDULERS.register_module()
class MultiplicativeLR(_ByFunction):
    """``torch.optim.lr_scheduler.MultiplicativeLR`` with ``begin``, ``end`` and ``by_epoch``.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        lr_lambda: a function from the number of steps to a factor of the present value, or a list of functions, one for
            each parameter group.
        last_epoch: alias of ``last_step``.
        param_name: the key to schedule instead of the learning rate.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """

    _scheduler = lr_scheduler.MultiplicativeLR
