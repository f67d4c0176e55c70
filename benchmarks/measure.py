"""Interleaved measurement: every round runs every contender once, so that a drift of the machine meets them all."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


def last_level_cache() -> int:
    """Bytes of the processor's largest cache, or 32 MiB where the system does not tell."""
    units = {"K": 2**10, "M": 2**20}
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) * units[text[-1]] for text in (file.read_text().strip() for file in files)]
    return max(sizes, default=32 * 2**20)


class CacheFlush:
    """Evicts what the contenders have in the caches, by writing twice the size of the last-level cache."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(2 * last_level_cache() // 4)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bandwidth(rounds: int = 15) -> float:
    """Bytes per second of ``a += b`` on 128 MiB arrays, which reads two and writes one, as an in-place update does."""
    a, b = torch.zeros(2**25), torch.ones(2**25)
    return 12 * a.numel() / statistics.median(timed(lambda: a.add_(b)) for _ in range(rounds))


@dataclass(frozen=True)
class Quantiles:
    """Median with the 10th and 90th percentile."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[0], statistics.median(values), tenths[-1])


def interleave(
    functions: dict[str, Callable[[], None]],
    rounds: int,
    prepare: Callable[[str], None],
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; their order within a round is drawn anew each time.

    Args:
        functions: what to time, by name.
        rounds: counted rounds.
        prepare: called with the name before each timed call, outside the time.
        warmup: rounds before that are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    # A collection would be charged to whom it happens to meet, and walks through the caches.
    gc.collect()
    gc.disable()
    try:
        for counted in [False] * warmup + [True] * rounds:
            for name in order.sample(list(functions), len(functions)):
                prepare(name)
                elapsed = timed(functions[name])
                if counted:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


def paired_ratio(slow: list[float], fast: list[float], resamples: int = 2000) -> tuple[Quantiles, tuple[float, float]]:
    """Quantiles of the ratio ``slow / fast`` round by round, and a 95 % bootstrap interval of its median."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Quantiles.of(ratios), (medians[int(0.025 * resamples)], medians[int(0.975 * resamples)])
