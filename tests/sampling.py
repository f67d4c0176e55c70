"""Which cases of a parametrized test run: all, or enough of them for each pair of values to be in one.

A fault that takes three particular values at once is rare; most take one or two. So of a product of three parameters or
more, the usual run takes a part in which every two values of different parameters still meet. Cases that Triton
interprets take seconds each: they are chosen last, for the pairs that have Triton in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

__all__ = ["chosen", "products"]

Combination = frozenset[tuple[int, str]]


def products(items: Sequence[pytest.Item]) -> Iterator[list[pytest.Function]]:
    """The cases of each parametrized test, in order; a test in several classes counts as several."""
    tests: dict[object, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault((item.parent, item.originalname), []).append(item)
    yield from tests.values()


def chosen(cases: Sequence[pytest.Function], strength: int) -> set[pytest.Function]:
    """A part of ``cases`` in which every combination of ``strength`` values that they have is there."""
    wanted = {case: _combinations(case, strength) for case in cases}
    slow = [case for case in cases if str(case.callspec.params.get("backend", "")).startswith(("triton", "nvcc"))]
    taken: set[pytest.Function] = set()
    covered: set[Combination] = set()
    for part in ([case for case in cases if case not in slow], slow):
        left = list(part)
        while left:
            best = max(left, key=lambda case: len(wanted[case] - covered))  # the first of equals
            if wanted[best] <= covered:
                break
            taken.add(best)
            covered |= wanted[best]
            left = [case for case in left if not wanted[case] <= covered]
    return taken


def _combinations(case: pytest.Function, strength: int) -> set[Combination]:
    # pytest's ids, one for each `parametrize`: so a row of a table is one value, and none is left out.
    values = list(enumerate(case.callspec._idlist))
    return set(map(frozenset, itertools.combinations(values, min(strength, len(values)))))
