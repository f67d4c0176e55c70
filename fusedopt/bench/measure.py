"""Interleaved measurement: every round runs every contender once, so that a drift of the machine affects all."""

from __future__ import annotations

import functools
import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["BandwidthProbe", "CacheFlush", "Quantiles", "QueuedTimer", "Times", "interleave", "paired_ratio"]


def _last_level_cache() -> int:
    """Bytes of the processor's largest cache, or 32 MiB if the system does not report it."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", file.read_text(encoding="utf-8").strip()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes, default=32 * 2**20)


class CacheFlush:
    """Evicts what the contenders have in the caches, by writing twice the size of the last-level cache (a GPU's L2)."""

    def __init__(self, device: torch.device):
        size = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _last_level_cache()
        self._buffer = torch.zeros(2 * size // 4, device=device)
        self._read: torch.Tensor | None = None

    def __call__(self) -> None:
        self._buffer.add_(1.0)

    def read(self) -> None:
        """Evict by reading as much memory, which is never written: the next call writes back only its own lines."""
        if self._read is None:
            self._read = torch.zeros_like(self._buffer)
        self._read.sum()


@dataclass
class Times:
    """Seconds of each round of one contender.

    Attributes:
        total: until the work is done; on a GPU between two CUDA events, the first on an idle device.
        host: until the call returns. The same as ``total`` on a CPU.
        queued: of the device's work alone, see :class:`QueuedTimer`; empty unless requested.
    """

    total: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)

    @property
    def work(self) -> list[float]:
        """The times to compare with memory bandwidth: ``queued``, or ``total`` if that is empty."""
        return self.queued or self.total


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


class QueuedTimer:
    """Times the work of a GPU without the host's: all of it is queued before the device starts on it.

    A delay keeps the device busy meanwhile. If the device has reached the first event before the host is done, the
    delay was too short, and the call is repeated with twice the delay. A call that waits for the device itself cannot
    be queued: it is timed as it is, including the waiting.
    """

    #: The first and the longest delay in seconds.
    LEAST, MOST = 1e-3, 0.064
    #: Above any GPU's clock: a delay may be too long, never too short.
    _CYCLES_PER_SECOND = 3e9

    def __init__(self, device: torch.device):
        self._device = device
        self._delays: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[[], object], prepare: Callable[[], object]) -> float:
        """Seconds of one call, without ``prepare``; the delay that it needs is remembered by ``name``."""
        while True:
            delay = self._delays.get(name, self.LEAST)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self._device)
            if delay:
                torch.cuda._sleep(int(delay * self._CYCLES_PER_SECOND))
            prepare()
            begin.record()
            function()
            end.record()
            queued = not begin.query()
            end.synchronize()
            if queued or not delay:
                return begin.elapsed_time(end) / 1e3
            self._delays[name] = 2 * delay if delay < self.MOST else 0.0


class BandwidthProbe:
    """Moves memory as fast as torch can; timed among the contenders.

    On a CPU, ``a += b`` on 128 MiB arrays, which reads two and writes one, as an in-place update does; on a GPU, a
    copy of 1 GiB.

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
        """The quantiles of at least two values."""
        tenths = statistics.quantiles(values, n=10, method="inclusive")
        return cls(tenths[0], statistics.median(values), tenths[-1])


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[str], None],
    device: torch.device,
    warmup: int = 3,
    prepare_queued: Callable[[str], None] | None = None,
) -> dict[str, Times]:
    """Time each function once per round, in an order that is drawn anew for each round.

    Args:
        functions: what to time, by name.
        rounds: number of timed rounds.
        prepare: called with the name before each timed call; not timed.
        device: the device that does the work.
        warmup: number of untimed rounds before.
        prepare_queued: if given, on a GPU, each function is timed again in each round by a :class:`QueuedTimer`; this
            is called with the name before, untimed.
    """
    times = {name: Times() for name in functions}
    timer = QueuedTimer(device)
    order = random.Random(0)
    # A garbage collection would be charged to whichever contender is running, and would disturb the caches.
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for counted in [False] * warmup + [True] * rounds:
            for name in order.sample(list(functions), len(functions)):
                prepare(name)
                total, host = _time(functions[name], device)
                if prepare_queued is not None:
                    queued = timer(name, functions[name], functools.partial(prepare_queued, name))
                    times[name].queued += [queued] * counted
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
