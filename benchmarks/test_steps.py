"""One optimizer step: every case of the suite with each of its contenders."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import CLOCK, Lab
from .suite import Entry, entries


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        metafunc.parametrize(
            ("entry", "contender"),
            [
                pytest.param(
                    entry,
                    contender,
                    id=f"{entry.case.name}/{contender}",
                    marks=[pytest.mark.quick] if entry.quick else [],
                )
                for entry in entries(metafunc.config.getoption("--bench-device"))
                for contender in entry.contenders
            ],
        )


@pytest.mark.benchmark(timer=CLOCK)
def test_step(benchmark: Any, lab: Lab, entry: Entry, contender: str) -> None:
    lab.report(benchmark, entry.case, entry.rounds, contender, "step")
