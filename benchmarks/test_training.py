"""End to end: a real training, with the stock config and with the type swapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusedopt.compare.compare import Comparison, compare
from fusedopt.training.config import Config

from .conftest import CLOCK, Lab

ROOT = Path(__file__).parents[1]
# (config, epochs): on a GPU a larger model than these digits need, in the size that trainings there have.
TRAININGS = {"cpu": ("configs/digits_vit.py", 2), "cuda": ("benchmarks/configs/vit_large.py", 4)}


@pytest.fixture(scope="module")
def comparison(lab: Lab) -> Comparison:
    path, epochs = TRAININGS[lab.device.type]
    config = Config.fromfile(ROOT / path)
    config.train_cfg.max_epochs = epochs
    return compare(config, device=lab.device)


@pytest.mark.quick
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("variant", ["stock", "fused"])
def test_training(benchmark: Any, lab: Lab, comparison: Comparison, variant: str) -> None:
    assert comparison.agrees, "the two trainings do not learn the same"
    path, _ = TRAININGS[lab.device.type]
    config = Config.fromfile(ROOT / path)
    trained = getattr(comparison, variant)
    benchmark.group = path
    benchmark.extra_info.update(
        kind="training",
        variant=variant,
        optimizer=trained.optimizer,
        groups=trained.param_groups,
        images_per_step=config.train_dataloader.batch_size * config.optim_wrapper.get("accumulative_counts", 1),
        optimizer_seconds=[milliseconds / 1e3 for milliseconds in trained.timed_ms],
    )
    CLOCK.replay(benchmark, [milliseconds / 1e3 for milliseconds in trained.step_ms[trained.excluded_steps :]])
