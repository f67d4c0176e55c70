"""benchmarks/trainers.py: every trainer drives both optimizers to the same parameters, and the table."""

from __future__ import annotations

import importlib.util
import re
import warnings

import pytest

from benchmarks.trainer_drivers import DRIVERS
from benchmarks.trainers import OURS, STOCK, measure, table, wrong


@pytest.mark.parametrize("title", DRIVERS)
def test_both_train_alike_and_are_timed(title: str) -> None:
    package = DRIVERS[title].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        case = measure(title, "5x7", "two", rounds=2, steps=2)
    assert (case["tensors"], case["parameters"]) == (5, 35)
    assert set(case["seconds"]) == {OURS, STOCK}
    assert all(len(each) == 2 and min(each) > 0 for each in case["seconds"].values())
    assert wrong(case) is None and case["difference"] >= 0


def test_a_result_that_is_wrong_is_said() -> None:
    case = {"trainer": "timm, NativeScaler", "workload": "5x7", "tensors": 5, "difference": 0.5}
    assert wrong(case) == "wrong result: timm, NativeScaler, 5x7: parameters are 0.5 apart"
    assert wrong({**case, "difference": 1e-7}) is None


def test_the_table_says_who_is_left_out() -> None:
    case = {"trainer": "timm, NativeScaler", "workload": "5x7", "tensors": 5}
    timed = {**case, "seconds": {STOCK: [3e-3, 2e-3], OURS: [1e-3, 1e-3]}}
    shown = table({"cases": [{**case, "left_out": "timm is not installed"}, timed]})
    assert "- timm, NativeScaler, 5x7: 5 tensors: timm is not installed" in shown
    row = "timm, NativeScaler | 5x7: 5 tensors | 1 ms | 2.5 ms | fused | 2.50 ["
    assert row in re.sub(" +", " ", shown)
