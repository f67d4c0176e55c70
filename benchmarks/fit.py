"""The line through measured times, as far as they lie on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: A line that misses a measured time by a larger share of it is not quoted.
LIMIT = 0.25
#: Fewer points always lie on a line, or nearly.
LEAST_POINTS = 3


@dataclass(frozen=True)
class Line:
    """``constant + per_count * count``.

    Attributes:
        constant, per_count: of the line.
        first, last: the smallest and the largest count that it was fitted to.
        residual: the largest share of a measured cost by which it misses that one.
    """

    constant: float
    per_count: float
    first: int
    last: int
    residual: float

    def at(self, count: float) -> float:
        """The cost of ``count`` by the line."""
        return self.constant + self.per_count * count


def fit(costs: Mapping[int, float]) -> Line:
    """The line through all costs, by least squares of the relative error; neither of its numbers is negative."""
    counts, values = np.array(list(costs), dtype=float), np.array(list(costs.values()))
    per_count, constant = np.polyfit(counts, values, 1, w=1 / values)
    if constant < 0:
        share = counts / values
        per_count, constant = share.sum() / (share @ share), 0.0
    elif per_count < 0:
        per_count, constant = 0.0, (1 / values).sum() / (1 / values**2).sum()
    residual = float(np.abs((constant + per_count * counts) / values - 1).max())
    return Line(float(constant), float(per_count), min(costs), max(costs), residual)


def longest_line(costs: Mapping[int, float]) -> Line | None:
    """The line through the longest run of neighbouring counts that meets each of their costs within LIMIT.

    Of runs of one length, the one with the smallest residual. None where no run of LEAST_POINTS has a line.
    """
    counts = sorted(costs)
    for length in range(len(counts), LEAST_POINTS - 1, -1):
        runs = (counts[start : start + length] for start in range(len(counts) - length + 1))
        lines = (fit({count: costs[count] for count in run}) for run in runs)
        good = [line for line in lines if line.residual <= LIMIT]
        if good:
            return min(good, key=lambda line: line.residual)
    return None


def quote(line: Line | None, noun: str) -> str:
    """A line of costs in seconds in words, with its range and residual, or that there is none.

    Args:
        line: to be quoted.
        noun: what is counted, in the singular.
    """
    if line is None:
        return f"no line meets {LEAST_POINTS} neighbouring sizes within {LIMIT:.0%}"
    return (
        f"{_seconds(line.constant)} + {_seconds(line.per_count)} per {noun}, "
        f"from {line.first:,} to {line.last:,} {noun}s, within {line.residual:.0%}"
    )


def _seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if value >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):g} {unit}"
    return f"{value / 1e-12:.0f} ps"
