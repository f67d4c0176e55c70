"""Time against the number of parameters, and against the number of tensors."""

from __future__ import annotations

from typing import Any

import pytest

from fusedopt.bench import Case
from fusedopt.bench.contenders import OURS, RIVAL
from fusedopt.bench.workloads import uniform

from .conftest import CLOCK, Lab
from .suite import Entry

PARAMETERS = [10**power for power in range(3, 9)]
TENSORS = [1, 10, 100, 1000, 10_000]


def _by_parameters(count: int, device: str) -> Entry:
    size = round(count / 16)
    case = Case(f"16x{size}", device=device, custom=lambda: uniform(16, size))
    return Entry(case, (OURS, RIVAL), rounds=20 if count < 10**8 else 7)


def _by_tensors(count: int, grouping: str, device: str) -> Entry:
    case = Case(f"{count}x64", grouping, device=device, custom=lambda: uniform(count, 64))
    return Entry(case, (OURS, RIVAL), rounds=20 if count < 10_000 else 5)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = metafunc.config.getoption("--bench-device")
    curves = {
        "parameters": [_by_parameters(count, device) for count in PARAMETERS],
        "tensors-one": [_by_tensors(count, "one", device) for count in TENSORS],
        "tensors-each": [_by_tensors(count, "each", device) for count in TENSORS],
    }
    metafunc.parametrize(
        ("curve", "entry", "contender"),
        [
            pytest.param(curve, entry, contender, id=f"{curve}/{entry.case.name}/{contender}")
            for curve, points in curves.items()
            for entry in points
            for contender in entry.contenders
        ],
    )


@pytest.mark.quick
@pytest.mark.benchmark(timer=CLOCK)
def test_scaling(benchmark: Any, lab: Lab, curve: str, entry: Entry, contender: str) -> None:
    lab.report(benchmark, entry.case, entry.rounds, contender, f"scaling-{curve}")
