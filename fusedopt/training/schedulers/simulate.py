"""Simulates the schedulers of a run without training."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...messages import check_whole_number, group_names, warn_caller
from ..builder import build_optim_wrapper, is_wrapper_cfg
from ..registry import MMENGINE_SCOPE, MODELS, PARAM_SCHEDULERS, check_config, scope_by_default
from ..wrappers import OptimWrapper, OptimWrapperDict
from .ahead import can_run_ahead, run_ahead
from .base import _ParamScheduler
from .build import build_param_schedulers

__all__ = ["Curve", "Schedule", "Span", "simulate_schedule"]


@dataclass(frozen=True)
class Curve:
    """A value of some parameter groups over a run.

    Args:
        optimizer: name of the wrapper among several, else ''.
        param_name: key of the groups; ``momentum`` also stands for ``betas[0]``.
        groups: numbers of the groups that share it.
        names: names of their parameters, if the groups store them.
        values: float64, one for each tick.
    """

    optimizer: str
    param_name: str
    groups: tuple[int, ...]
    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Span:
    """The span in which a scheduler is active, in ticks.

    Args:
        optimizer: name of the wrapper among several, else ''.
        scheduler: name of its class.
        param_name: the key that it changes.
        begin: first tick.
        end: the tick after the last.
        marks: milestones and restarts.
        is_warmup: whether it begins with the run, raises the value, and ends before the run does.
        needs_metrics: whether it acts on metrics, which a simulation does not have.
    """

    optimizer: str
    scheduler: str
    param_name: str
    begin: int
    end: int
    marks: tuple[int, ...] = ()
    is_warmup: bool = False
    needs_metrics: bool = False


@dataclass(frozen=True)
class Schedule:
    """Every scheduled value of a run.

    Args:
        unit: unit of a tick: ``'iteration'``, or ``'epoch'`` if nothing changes within one.
        ticks: length of the run.
        epoch_length: ticks in an epoch; None if epochs are not counted.
        curves: the values, learning rates first.
        spans: the schedulers, in their order.
    """

    unit: str
    ticks: int
    epoch_length: int | None
    curves: list[Curve]
    spans: list[Span]


class _StandIn(torch.optim.Optimizer):
    """An optimizer with copies of the settings of some parameter groups, and nothing to step."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]):
        told = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups
        ]
        super().__init__([{"params": [torch.zeros(())], **deepcopy(each)} for each in told], dict(defaults))
        self._opt_called = True  # schedulers must not warn of a missing step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


@dataclass(frozen=True)
class _Driven:
    """An optimizer of the run, its stand-in, and the stand-in's schedulers."""

    name: str
    optimizer: torch.optim.Optimizer
    #: For each group of the stand-in, the numbers of the optimizer's groups that have its settings.
    columns: list[tuple[int, ...]]
    stand_in: _StandIn
    schedulers: list[_ParamScheduler]


def simulate_schedule(
    cfg: Mapping[str, Any], *, model: nn.Module | None = None, epoch_length: int | None = None
) -> Schedule:
    """Run the schedulers of a config without training.

    Args:
        cfg: the config of a run: ``optim_wrapper``, ``train_cfg`` (``max_epochs`` or ``max_iters``) and, optionally,
            ``param_scheduler`` and ``model``. Not changed.
        model: the model to optimize; by default built from ``cfg['model']``. If its type is not registered, one
            parameter stands in for it, with a warning.
        epoch_length: iterations in an epoch. Needed if ``train_cfg`` counts epochs and a scheduler counts iterations.

    Raises:
        KeyError: ``cfg`` lacks ``optim_wrapper`` or ``train_cfg``.
        TypeError, ValueError: a part of ``cfg`` is invalid, or ``epoch_length`` is needed. Existing schedulers are
            invalid here, since the simulation would advance them.
    """
    check_config("config", cfg)
    for key in ("optim_wrapper", "train_cfg"):
        if key not in cfg:
            raise KeyError(f"the config has no {key!r}, which its schedule depends on")
    max_epochs, max_iters = _training_length(cfg["train_cfg"], epoch_length)
    with scope_by_default(cfg.get("default_scope") or MMENGINE_SCOPE):
        with torch.random.fork_rng(devices=[]):  # keeps the random numbers of later training
            wrapper = _build_wrapper(cfg, model)
        all_driven = _drive(cfg.get("param_scheduler"), wrapper, epoch_length, max_epochs, max_iters)

    schedulers = [scheduler for driven in all_driven for scheduler in driven.schedulers]
    by_iteration = max_epochs is None or any(not each.by_epoch for each in schedulers)
    if max_epochs is None and any(each.by_epoch for each in schedulers):
        warn_caller("a scheduler by epoch never advances in training by iterations (train_cfg.max_iters)")
    if by_iteration and max_iters is None:
        raise ValueError(
            "a scheduler counts iterations but train_cfg counts epochs; expected epoch_length, iterations in an epoch"
        )
    ticks = max_iters if by_iteration else max_epochs
    assert ticks is not None
    per_epoch = (epoch_length if by_iteration else 1) if max_epochs is not None else None

    curves, spans = [], []
    for driven in all_driven:
        values = _run(driven, ticks, per_epoch)
        scheduled = {"lr", *(each.param_name for each in driven.schedulers)}
        for key, each in values.items():
            if key in scheduled or bool((each != each[0]).any()):
                curves += _curves(driven, key, each)
        spans += [_span(driven.name, each, values, ticks, per_epoch) for each in driven.schedulers]
    return Schedule("iteration" if by_iteration else "epoch", ticks, per_epoch, curves, spans)


def _training_length(train_cfg: Any, epoch_length: int | None) -> tuple[int | None, int | None]:
    """``max_epochs`` and ``max_iters``; the former is None when training by iterations."""
    check_config("train_cfg", train_cfg)
    if epoch_length is not None:
        check_whole_number("epoch_length", epoch_length, 1)
    for key in ("max_epochs", "max_iters"):
        if train_cfg.get(key) is not None:
            length = check_whole_number(f"train_cfg.{key}", train_cfg[key], 1)
            if key == "max_iters":
                return None, length
            return length, None if epoch_length is None else length * epoch_length
    raise KeyError("train_cfg has neither 'max_epochs' nor 'max_iters'")


def _build_wrapper(cfg: Mapping[str, Any], model: nn.Module | None) -> Any:
    settings = cfg["optim_wrapper"]
    if model is None and cfg.get("model") is not None:
        check_config("model", cfg["model"])
        kind = cfg["model"].get("type")
        if not isinstance(kind, str) or MODELS.get(kind) is not None:
            model = MODELS.build(cfg["model"])
        else:
            warn_caller(f"model {kind!r} is not registered here: one parameter stands in for it, without paramwise_cfg")
    if model is not None:
        return build_optim_wrapper(model, settings)
    check_config("optim_wrapper", settings)
    of_model = ("constructor", "paramwise_cfg", "modules")
    plain = {key: value for key, value in settings.items() if key not in of_model}
    entries = {name: each for name, each in plain.items() if is_wrapper_cfg(each)}
    if "optimizer" in plain or not entries:
        return build_optim_wrapper(nn.Linear(1, 1, bias=False), plain)
    wrappers = {}
    for name, each in entries.items():
        own = {key: value for key, value in each.items() if key not in of_model}
        wrappers[name] = build_optim_wrapper(nn.Linear(1, 1, bias=False), own)
    return OptimWrapperDict(**wrappers)


def _drive(settings: Any, wrapper: Any, epoch_length: int | None, max_epochs: int | None, max_iters: int | None) -> Any:
    """A :class:`_Driven` for each optimizer of ``wrapper``."""
    several = isinstance(wrapper, OptimWrapperDict)
    stand_ins: dict[str, _StandIn] = {}
    columns: dict[str, list[tuple[int, ...]]] = {}
    for name, each in wrapper.items() if several else [("", wrapper)]:
        own = settings.get(name) if several and isinstance(settings, Mapping) and "type" not in settings else settings
        groups = each.optimizer.param_groups
        columns[name] = [(number,) for number in range(len(groups))] if _has_lists(own) else _alike(groups)
        stand_ins[name] = _StandIn([groups[column[0]] for column in columns[name]], each.defaults)
    driven = (
        OptimWrapperDict(**{name: OptimWrapper(each) for name, each in stand_ins.items()}) if several else stand_ins[""]
    )
    # Training by iterations is one epoch, as in MMEngine.
    built = build_param_schedulers(_quiet(settings), driven, epoch_length, max_epochs or 1, max_iters)
    by_name = built if isinstance(built, dict) else {"": built}
    return [
        _Driven(name, (wrapper[name] if several else wrapper).optimizer, columns[name], stand_in, by_name[name])
        for name, stand_in in stand_ins.items()
    ]


def _quiet(settings: Any) -> Any:
    """``settings`` of schedulers, made to print nothing."""
    if isinstance(settings, list | tuple):
        return [_quiet(each) for each in settings]
    if isinstance(settings, Mapping):
        if "type" not in settings:
            return {key: _quiet(each) for key, each in settings.items()}
        return {key: value for key, value in settings.items() if key != "verbose"}
    if settings is not None:
        raise TypeError(f"a schedule is simulated from configs of schedulers, got {type(settings).__name__}")
    return None


def _has_lists(settings: Any) -> bool:
    """Whether an argument of a scheduler is a list per parameter group, so that no group may be left out."""
    for entry in settings if isinstance(settings, list | tuple) else [settings]:
        if isinstance(entry, Mapping) and "type" in entry:
            with PARAM_SCHEDULERS.switch_scope_and_registry(entry.get("_scope_")) as scoped:
                names = getattr(scoped.resolve(entry["type"]), "_per_group", ())
            if any(isinstance(entry.get(name), list | tuple) for name in names):
                return True
    return False


def _comparable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_comparable(each) for each in value] if isinstance(value, list | tuple) else value


def _alike(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    """The numbers of the groups; those with the same settings together."""
    alike: dict[str, list[int]] = {}
    told_apart = ("params", "param_name", "param_names", "group_name")
    for number, group in enumerate(groups):
        settings = {key: _comparable(value) for key, value in group.items() if key not in told_apart}
        alike.setdefault(repr(settings), []).append(number)
    return [tuple(numbers) for numbers in alike.values()]


def _run(driven: _Driven, ticks: int, per_epoch: int | None) -> dict[str, Tensor]:
    """Ticks x groups, for each value that may change."""
    groups = driven.stand_in.param_groups
    moved = {"lr"} | {key for each in driven.schedulers for key in (each.param_name, *each.moves_too)}
    usual = [key for key in ("lr", "momentum", "weight_decay") if key in moved]
    has = {**groups[0], "momentum": None} if "betas" in groups[0] else groups[0]
    keys = [key for key in (*usual, *sorted(moved.difference(usual))) if key in has]
    by_epoch = [each for each in driven.schedulers if each.by_epoch]
    by_iteration = [each for each in driven.schedulers if not each.by_epoch]
    in_order = [*by_iteration, *by_epoch]
    if can_run_ahead(in_order, groups, keys):
        return {key: run_ahead(in_order, groups, key, ticks, per_epoch) for key in keys}
    rows = array("d")
    for tick in range(ticks):
        for key in keys:
            if key in groups[0]:
                rows.extend([float(group[key]) for group in groups])
            else:
                rows.extend([float(group["betas"][0]) for group in groups])
        for each in by_iteration:
            each.step()
        if per_epoch is not None and (tick + 1) % per_epoch == 0:
            for each in by_epoch:
                each.step()
    values = torch.frombuffer(rows, dtype=torch.float64).view(ticks, len(keys), len(groups))
    return {key: values[:, index] for index, key in enumerate(keys)}


def _curves(driven: _Driven, key: str, values: Tensor) -> list[Curve]:
    """A curve for each distinct column of ``values``."""
    equal: list[tuple[Tensor, list[int]]] = []
    for numbers, column in zip(driven.columns, values.T, strict=True):
        same = next((members for other, members in equal if torch.equal(other, column)), None)
        if same is None:
            equal.append((column.contiguous(), list(numbers)))
        else:
            same.extend(numbers)
    curves = []
    for column, members in equal:
        groups = tuple(sorted(members))
        names = itertools.chain.from_iterable(group_names(driven.optimizer.param_groups[number]) for number in groups)
        curves.append(Curve(driven.name, key, groups, tuple(names), column))
    return curves


def _span(
    name: str, scheduler: _ParamScheduler, values: Mapping[str, Tensor], ticks: int, per_epoch: int | None
) -> Span:
    unit = (per_epoch or ticks) if scheduler.by_epoch else 1
    begin, end = (min(step * unit, ticks) for step in (scheduler.begin, scheduler.end))
    steps = [*getattr(scheduler, "milestones", ()), *getattr(scheduler, "cumulative_periods", ())]
    marks = sorted({(scheduler.begin + step) * unit for step in steps if scheduler.begin + step < scheduler.end})
    over_time = values[scheduler.param_name]
    rises = begin == 0 and 0 < end < ticks and bool((over_time[end - 1] > over_time[0]).any())
    return Span(
        name,
        type(scheduler).__name__,
        scheduler.param_name,
        begin,
        end,
        tuple(mark for mark in marks if mark < ticks),
        rises,
        getattr(scheduler, "need_val_args", False),
    )
