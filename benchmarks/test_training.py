"""End to end: a model is trained with torch's optimizer, with ``fused=True`` and with the type swapped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fusedopt.compare.compare import compare
from fusedopt.compare.comparison import Comparison
from fusedopt.training.config import Config

from .conftest import CLOCK, Lab

ROOT = Path(__file__).parents[1]
# (config, epochs): on a GPU a larger model than these digits need, of a size that is usual there.
TRAININGS = {"cpu": ("configs/digits_vit.py", 2), "cuda": ("benchmarks/configs/vit_large.py", 4)}


@pytest.fixture(scope="module")
def comparison(lab: Lab) -> Comparison:
    path, epochs = TRAININGS[lab.device.type]
    config = Config.fromfile(ROOT / path)
    config.train_cfg.max_epochs = epochs
    return dataclasses.replace(compare(config, device=lab.device), config=path)


@pytest.mark.quick
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("variant", ["stock", "torch_fused", "fused"])
def test_training(benchmark: Any, lab: Lab, comparison: Comparison, variant: str) -> None:
    assert comparison.agrees, "the runs do not learn the same"
    run = getattr(comparison, variant)
    if run is None:
        pytest.skip(str(comparison.no_torch_fused))
    benchmark.group = comparison.config
    benchmark.extra_info.update(kind="training", variant=variant)
    if run is comparison.fused:
        benchmark.extra_info["comparison"] = comparison.as_dict()
    CLOCK.replay(benchmark, [milliseconds / 1e3 for milliseconds in run.timed_step_ms])
