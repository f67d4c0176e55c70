"""What a training's schedulers will do, found out without training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..builder import build_optim_wrapper
from ..registry import MODELS, PARAM_SCHEDULERS, check_config, warn_caller
from ..rules import group_names
from ..rules.checks import check_whole_number
from ..wrappers import OptimWrapperDict
from .base import _ParamScheduler
from .build import build_param_schedulers

__all__ = ["Curve", "Schedule", "Span", "simulate_schedule"]


@dataclass(frozen=True)
class Curve:
    """A value of some parameter groups over a training.

    Args:
        optimizer: name of the wrapper among several, else ''.
        param_name: key of the groups; ``momentum`` stands for ``betas[0]`` too.
        groups: numbers of the groups that share it.
        names: names of their parameters, as far as the groups carry them.
        values: float64, one for each tick.
    """

    optimizer: str
    param_name: str
    groups: tuple[int, ...]
    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Span:
    """When a scheduler is active, in ticks.

    Args:
        optimizer: name of the wrapper among several, else ''.
        scheduler: name of its class.
        param_name: what it moves.
        begin: first tick.
        end: tick after the last.
        marks: milestones and restarts.
        is_warmup: whether it raises what the training begins with, and ends before the training does.
        needs_metrics: whether it acts on metrics, of which there are none without training.
    """

    optimizer: str
    scheduler: str
    param_name: str
    begin: int
    end: int
    marks: tuple[int, ...] = ()
    is_warmup: bool = False
    needs_metrics: bool = False


@dataclass
class Schedule:
    """Every scheduled value of a training.

    Args:
        unit: what a tick is: ``'iteration'``, or ``'epoch'`` where nothing changes within one.
        ticks: length of the training.
        epoch_length: ticks in an epoch, None where epochs are not counted.
        curves: the values, learning rates first.
        spans: the schedulers, in their order.
    """

    unit: str
    ticks: int
    epoch_length: int | None
    curves: list[Curve] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


class _StandIn(torch.optim.Optimizer):
    """The settings of some parameter groups, with nothing to step."""

    def __init__(self, groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]):
        settings = [
            {"params": [torch.zeros(())], **{k: v for k, v in group.items() if k not in ("params", "param_names")}}
            for group in groups
        ]
        super().__init__(settings, dict(defaults))
        self._opt_called = True  # no scheduler need ask for a step

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing."""


def simulate_schedule(
    cfg: Mapping[str, Any], *, model: nn.Module | None = None, epoch_length: int | None = None
) -> Schedule:
    """Run the schedulers of a training config, without the training.

    Args:
        cfg: the config of a training: ``optim_wrapper``, ``train_cfg`` (``max_epochs``, or ``max_iters``), maybe
            ``param_scheduler``, and ``model``. Not changed.
        model: what to optimize, by default what ``cfg['model']`` describes. Where that is not known here, one parameter
            stands in for it, with a warning.
        epoch_length: iterations in an epoch. Needed when ``train_cfg`` counts epochs and a scheduler iterations.

    Raises:
        KeyError: ``cfg`` lacks ``optim_wrapper`` or ``train_cfg``.
        TypeError, ValueError: a part of ``cfg`` is wrong, or ``epoch_length`` is needed.
    """
    check_config("config", cfg)
    for key in ("optim_wrapper", "train_cfg"):
        if key not in cfg:
            raise KeyError(f"the config has no {key!r}, which its schedule depends on")
    max_epochs, max_iters = _training_length(cfg["train_cfg"], epoch_length)
    settings = cfg.get("param_scheduler")
    wrapper = _build_wrapper(cfg, model)
    by_name = dict(wrapper) if isinstance(wrapper, OptimWrapperDict) else {"": wrapper}
    separate = isinstance(settings, Mapping) and "type" not in settings

    driven = []
    for name, each in by_name.items():
        own = settings[name] if separate and name else settings  # type: ignore[index]
        entries = own if isinstance(own, list | tuple) else [] if own is None else [own]
        groups = each.optimizer.param_groups
        columns = [(number,) for number in range(len(groups))] if _has_lists(entries) else _alike(groups)
        stand_in = _StandIn([groups[column[0]] for column in columns], each.defaults)
        built = build_param_schedulers(own, stand_in, epoch_length, max_epochs, max_iters)
        assert isinstance(built, list)
        driven.append((name, each.optimizer, stand_in, columns, built))

    schedulers = list(itertools.chain.from_iterable(built for *_, built in driven))
    by_iteration = max_epochs is None or any(not each.by_epoch for each in schedulers)
    if max_epochs is None and any(each.by_epoch for each in schedulers):
        warn_caller("a scheduler by epoch never advances in a training by iterations (train_cfg.max_iters)")
    if by_iteration and max_iters is None:
        raise ValueError("a scheduler counts iterations and train_cfg epochs; expected epoch_length, iterations in one")
    ticks = max_iters if by_iteration else max_epochs
    assert ticks is not None
    per_epoch = (epoch_length if by_iteration else 1) if max_epochs is not None else None

    schedule = Schedule("iteration" if by_iteration else "epoch", ticks, per_epoch)
    for name, optimizer, stand_in, columns, built in driven:
        values = _run(stand_in, built, ticks, per_epoch)
        for key in _in_order(values, {each.param_name for each in built}):
            schedule.curves += _curves(name, key, optimizer, columns, values[key])
        for each in built:
            schedule.spans.append(_span(name, each, values, ticks, per_epoch))
    return schedule


def _training_length(train_cfg: Any, epoch_length: int | None) -> tuple[int | None, int | None]:
    """``max_epochs`` and ``max_iters``; the former is None in a training by iterations."""
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
    plain = {key: value for key, value in settings.items() if key not in ("constructor", "paramwise_cfg")}
    if "optimizer" in plain:
        return build_optim_wrapper(nn.Linear(1, 1, bias=False), plain)
    return OptimWrapperDict(
        **{
            name: build_optim_wrapper(
                nn.Linear(1, 1, bias=False), {k: v for k, v in each.items() if k != "paramwise_cfg"}
            )
            for name, each in plain.items()
            if isinstance(each, Mapping)
        }
    )


def _has_lists(entries: Sequence[Any]) -> bool:
    """Whether a scheduler has an entry for each parameter group, so that none may be left out."""
    return any(
        isinstance(entry.get(key), list | tuple)
        for entry in entries
        if isinstance(entry, Mapping) and "type" in entry
        for key in getattr(PARAM_SCHEDULERS.resolve(entry["type"]), "_per_group", ())
    )


def _alike(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    """Numbers of the groups, those of the same settings together."""
    alike: dict[str, list[int]] = {}
    told_apart = ("params", "param_name", "param_names", "layer_id", "group_name")
    for number, group in enumerate(groups):
        alike.setdefault(repr({k: v for k, v in group.items() if k not in told_apart}), []).append(number)
    return [tuple(numbers) for numbers in alike.values()]


def _numbers(group: Mapping[str, Any], keys: Sequence[str]) -> list[float]:
    return [float(group[key]) if key in group else float(group["betas"][0]) for key in keys]


def _run(
    optimizer: torch.optim.Optimizer, schedulers: Sequence[_ParamScheduler], ticks: int, per_epoch: int | None
) -> dict[str, Tensor]:
    """Ticks x groups, for each value."""
    group = optimizer.param_groups[0]
    usual = [
        key for key in ("lr", "momentum", "weight_decay") if key in group or (key == "momentum" and "betas" in group)
    ]
    keys = list(dict.fromkeys([*usual, *(each.param_name for each in schedulers)]))
    by_epoch = [each for each in schedulers if each.by_epoch]
    by_iteration = [each for each in schedulers if not each.by_epoch]
    rows = []
    for tick in range(ticks):
        rows.append([_numbers(group, keys) for group in optimizer.param_groups])
        for each in by_iteration:
            each.step()
        if per_epoch is not None and (tick + 1) % per_epoch == 0:
            for each in by_epoch:
                each.step()
    values = torch.tensor(rows, dtype=torch.float64)
    return {key: values[:, :, index] for index, key in enumerate(keys)}


def _curves(
    name: str, key: str, optimizer: torch.optim.Optimizer, columns: Sequence[tuple[int, ...]], values: Tensor
) -> list[Curve]:
    """The columns of ``values``, equal ones as one."""
    equal: dict[tuple[float, ...], list[int]] = {}
    for numbers, column in zip(columns, values.T.tolist(), strict=True):
        equal.setdefault(tuple(column), []).extend(numbers)
    curves = []
    for column, members in equal.items():
        groups = tuple(sorted(members))
        names = itertools.chain.from_iterable(group_names(optimizer.param_groups[number]) for number in groups)
        curves.append(Curve(name, key, groups, tuple(names), torch.tensor(column, dtype=torch.float64)))
    return curves


def _in_order(values: Mapping[str, Tensor], scheduled: set[str]) -> list[str]:
    """The keys to show: the learning rate, what is scheduled, and what changes besides."""
    return [key for key, each in values.items() if key in {"lr", *scheduled} or bool((each != each[0]).any())]


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
