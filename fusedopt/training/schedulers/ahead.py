"""The values of schedulers over a run: for each parameter group in one go, instead of one tick after the other."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import _ParamScheduler

__all__ = ["can_run_ahead", "run_ahead"]

_OWN = __name__.rpartition(".")[0]

#: How the keys begin from which schedulers take their bases, and which one of them might move.
_BASES = ("initial_", "max_", "min_")


@dataclass(frozen=True)
class _Active:
    """The steps of a run in which a scheduler is active: the k-th is made after ``k * period`` ticks.

    Args:
        scheduler: as it is before the run.
        period: ticks from one step to the next.
        first: k of the first active step.
        last: k of the last active step.
        done: active steps that it has made before, minus one.
    """

    scheduler: _ParamScheduler
    period: int
    first: int
    last: int
    done: int

    def steps_after(self, tick: int) -> bool:
        """Whether it makes an active step after this tick."""
        return (tick + 1) % self.period == 0 and self.first <= (tick + 1) // self.period <= self.last

    def step_after(self, tick: int) -> int:
        """``last_step`` of the scheduler in the step after this tick."""
        return self.done + 1 + (tick + 1) // self.period - self.first

    def factors(self, begin: int, end: int) -> list[Any]:
        """Those of the steps after the ticks from ``begin`` to ``end``, after each of which it makes one."""
        found, scheduler, first = [], self.scheduler, self.step_after(begin)
        factor = scheduler._factor
        for step in range(first, first + end - begin):
            scheduler.last_step = step
            found.append(factor())
        return found

    def borders(self) -> Iterable[int]:
        """The ticks from which on other schedulers step than before."""
        if self.period == 1:
            return self.first - 1, self.last
        steps = range(self.first, self.last + 1)
        return itertools.chain.from_iterable((step * self.period - 1, step * self.period) for step in steps)


def can_run_ahead(
    schedulers: Sequence[_ParamScheduler], groups: Sequence[Mapping[str, Any]], keys: Sequence[str]
) -> bool:
    """Whether :func:`run_ahead` gives what stepping would: by the rules of this package, and of plain numbers.

    Args:
        schedulers: of the run.
        groups: the parameter groups.
        keys: what is looked at.
    """

    def by_rule(kind: type[_ParamScheduler]) -> bool:
        ours = all(cls.__module__.startswith(_OWN) for cls in kind.__mro__[:-1])
        return ours and kind._get_value is _ParamScheduler._get_value and kind._advance is _ParamScheduler._advance

    if not all(by_rule(type(each)) and not each.moves_too for each in schedulers):
        return False
    if any(each.param_name.startswith(_BASES) for each in schedulers):
        return False
    bases = itertools.chain.from_iterable(each._bases() for each in schedulers)
    flat = itertools.chain.from_iterable(base if isinstance(base, tuple) else (base,) for base in bases)
    values = (_first(group, key) for group in groups for key in keys)
    return all(type(value) is float for value in itertools.chain(flat, values))


def run_ahead(
    schedulers: Sequence[_ParamScheduler],
    groups: Sequence[Mapping[str, Any]],
    key: str,
    ticks: int,
    per_epoch: int | None,
) -> Tensor:
    """Ticks x groups, float64: the values at the beginning of each tick, to the bit those that stepping gives.

    Args:
        schedulers: of the run, in the order in which they step within a tick, as they are before it.
        groups: the parameter groups.
        key: what is looked at.
        ticks: length of the run.
        per_epoch: ticks in an epoch; None if epochs are not counted.
    """
    mine = [each for each in schedulers if each.param_name == key and not (each.by_epoch and per_epoch is None)]
    all_active = [_active(each, (per_epoch or 1) if each.by_epoch else 1, ticks) for each in mine]
    # Groups that begin with the same numbers have the same ones throughout.
    starts = list(zip((_first(group, key) for group in groups), *(each._bases() for each in mine), strict=True))
    columns = {start: array("d", start[:1]) for start in starts}
    borders = {0, ticks}.union(*(each.borders() for each in all_active if each.first <= each.last))
    for begin, end in itertools.pairwise(sorted(borders)):
        active = [(index, each) for index, each in enumerate(all_active, 1) if each.steps_after(begin)]
        _stretch(active, columns, begin, end)
    return torch.stack([torch.frombuffer(columns[start], dtype=torch.float64)[:ticks] for start in starts], dim=1)


def _first(group: Mapping[str, Any], key: str) -> Any:
    return group[key] if key in group else group["betas"][0]


def _active(scheduler: _ParamScheduler, period: int, ticks: int) -> _Active:
    before = scheduler._global_step
    first, last = max(1, scheduler.begin - before), min(ticks // period, scheduler.end - 1 - before)
    return _Active(scheduler, period, first, last, scheduler.last_step)


def _stretch(
    active: Sequence[tuple[int, _Active]], columns: Mapping[tuple[Any, ...], array[float]], begin: int, end: int
) -> None:
    """Append to each column the values after the ticks from ``begin`` to ``end``, after each of which all active step.

    Each comes with the place of its base value in the keys of ``columns``.
    """
    if not active:
        for column in columns.values():
            column.extend(itertools.repeat(column[-1], end - begin))
        return
    rows = [each.factors(begin, end) for _, each in active]
    apart = sorted({tick for row in rows if None in row for tick, factor in enumerate(row, begin) if factor is None})
    factors: list[Any] = rows[0] if len(rows) == 1 else list(zip(*rows, strict=True))
    at = begin
    for tick in [*apart, end]:
        for start, column in columns.items():
            move = _together([each.scheduler._move(start[index]) for index, each in active])
            values = itertools.accumulate(factors[at - begin : tick - begin], move, initial=column.pop())
            column.fromlist(list(values))
        at = tick + 1
        if tick < end:
            for start, column in columns.items():
                value = column[-1]
                for index, each in active:
                    each.scheduler.last_step = each.step_after(tick)
                    value = each.scheduler._next(value, start[index])
                column.append(value)


def _together(moves: Sequence[Callable[[Any, Any], Any]]) -> Callable[[Any, Any], Any]:
    """One rule after the other; of several the factors are a tuple."""
    if len(moves) == 1:
        return moves[0]

    def move(value: Any, factors: Any) -> Any:
        for each, factor in zip(moves, factors, strict=True):
            value = each(value, factor)
        return value

    return move
