"""Interleaved measurement: every round runs every contender once, so that a drift of the machine meets them all."""

from __future__ import annotations

import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["BandwidthProbe", "CacheFlush", "Quantiles", "Times", "interleave", "paired_ratio"]


def _last_level_cache() -> int:
    """Bytes of the processor's largest cache, or 32 MiB where the system does not tell."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes, default=32 * 2**20)


class CacheFlush:
    """Evicts what the contenders have in the caches, by writing twice the size of the last-level cache (a GPU's L2)."""

    def __init__(self, device: torch.device):
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _last_level_cache()
        self._buffer = torch.zeros(2 * size // 4, device=device)

    def __call__(self) -> None:
        self._buffer.add_(1.0)


@dataclass
class Times:
    """Seconds of each round of one contender.

    Attributes:
        total: until the work is done; on a GPU between two CUDA events.
        host: until the call returns. The same as ``total`` on a CPU.
    """

    total: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


def _time(function: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(total, host) seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        elapsed = time.perf_counter() - start
        return elapsed, elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    begin.record()
    function()
    end.record()
    host = time.perf_counter() - start
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host


class BandwidthProbe:
    """Moves memory as fast as torch can, to be timed among the contenders.

    On a CPU ``a += b`` on 128 MiB arrays, which reads two and writes one, as an in-place update does; on a GPU a copy
    of 1 GiB.

    Attributes:
        moved: bytes that one call reads and writes.
    """

    def __init__(self, device: torch.device):
        self._copies = device.type == "cuda"
        self._a = torch.zeros(2**28 if self._copies else 2**25, device=device)
        self._b = torch.ones_like(self._a)
        self.moved = (2 if self._copies else 3) * self._a.nbytes

    def __call__(self) -> None:
        if self._copies:
            self._b.copy_(self._a)
        else:
            self._a.add_(self._b)


@dataclass(frozen=True)
class Quantiles:
    """Median with the 10th and 90th percentile."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, values: list[float]) -> Quantiles:
        """Of at least two values."""
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[0], statistics.median(values), tenths[-1])


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[str], None],
    device: torch.device,
    warmup: int = 3,
) -> dict[str, Times]:
    """Times of each function in each round; their order within a round is drawn anew each time.

    Args:
        functions: what to time, by name.
        rounds: counted rounds.
        prepare: called with the name before each timed call, outside the time.
        device: where the work is done.
        warmup: rounds before that are not counted.
    """
    times = {name: Times() for name in functions}
    order = random.Random(0)
    # A collection would be charged to whom it happens to meet, and walks through the caches.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for counted in [False] * warmup + [True] * rounds:
            for name in order.sample(list(functions), len(functions)):
                prepare(name)
                total, host = _time(functions[name], device)
                if counted:
                    times[name].total.append(total)
                    times[name].host.append(host)
    finally:
        if collecting:
            gc.enable()
    return times


def paired_ratio(slow: list[float], fast: list[float], resamples: int = 2000) -> tuple[Quantiles, tuple[float, float]]:
    """Quantiles of the ratio ``slow / fast`` round by round, and a 95 % bootstrap interval of its median."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Quantiles.of(ratios), (medians[int(0.025 * resamples)], medians[int(0.975 * resamples)])
