"""How the benchmarks measure: turns, caches, GPUs, statistics, tables."""

from __future__ import annotations

import functools
import gc
from typing import Any

import pytest
import torch
from bench_cases import (
    CPU,
    TINY,
    _one_thread,  # noqa: F401  a fixture
    _short_collections,  # noqa: F401  a fixture
    table_of,
    tiny,
)

from fusedopt.bench import Case, Result
from fusedopt.bench import measure as measure_module
from fusedopt.bench.contenders import OURS, RIVAL
from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Quantiles, QueuedTimer, Times, interleave, paired_ratio
from fusedopt.bench.tables import case_table, markdown, times


class TestInterleave:
    @staticmethod
    def record(rounds: int, warmup: int = 3) -> tuple[list[tuple[str, str]], dict[str, Times]]:
        events: list[tuple[str, str]] = []
        functions = {name: functools.partial(events.append, ("run", name)) for name in "abc"}
        return events, interleave(functions, rounds, lambda name: events.append(("prepare", name)), CPU, warmup)

    @pytest.mark.parametrize("warmup", [0, 3])
    def test_every_round_prepares_and_runs_each_once(self, warmup):
        events, taken = self.record(20, warmup)
        assert len(events) == 2 * 3 * (20 + warmup)
        for (first, prepared), (second, called) in zip(events[::2], events[1::2], strict=True):
            assert (first, second) == ("prepare", "run")
            assert prepared == called
        calls = [name for _, name in events[1::2]]
        rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        assert {order[0] for order in rounds} == {"a", "b", "c"}
        assert {name: (len(times.total), len(times.host)) for name, times in taken.items()} == dict.fromkeys(
            "abc", (20, 20)
        )

    def test_the_order_is_the_same_in_each_run(self):
        assert self.record(8)[0] == self.record(8)[0]

    def test_on_a_cpu_the_host_does_the_work(self):
        for taken in self.record(4)[1].values():
            assert taken.total == taken.host

    def test_without_functions(self):
        assert interleave({}, 3, lambda name: None, CPU) == {}

    def test_garbage_is_not_collected_meanwhile(self):
        collecting: list[bool] = []
        interleave(
            {"a": lambda: collecting.append(gc.isenabled())}, 2, lambda _: collecting.append(gc.isenabled()), CPU
        )
        assert collecting == [False] * 2 * 5
        assert gc.isenabled()

    @pytest.mark.parametrize("place", ["function", "prepare"])
    def test_garbage_is_collected_again_after_an_error(self, place):
        def fail(*_: object) -> None:
            raise RuntimeError("no luck")

        function, prepare = (fail, len) if place == "function" else (list, fail)
        with pytest.raises(RuntimeError, match="no luck"):
            interleave({"a": function}, 2, prepare, CPU)
        assert gc.isenabled()

    def test_garbage_stays_uncollected_where_it_was(self):
        gc.disable()
        try:
            interleave({"a": list}, 2, len, CPU)
            assert not gc.isenabled()
        finally:
            gc.enable()


class Gpu:
    """A device beside a host that is slow to launch, as far as torch.cuda shows it to a timer; times in seconds."""

    CLOCK = 1e9

    def __init__(self) -> None:
        self.now = self.done = 0.0  # of the host, and when all that is in the queue will be through
        self.sleeps: list[float] = []

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.done = max(self.done, self.now) + device

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / self.CLOCK)
        self.launch(0, cycles / self.CLOCK)

    def synchronize(self, *_: object) -> None:
        self.now = max(self.now, self.done)

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.time = max(gpu.done, gpu.now)

            def query(self) -> bool:
                return self.time <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.time)

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.time - self.time)

        return Event()


class TestOnAGpu:
    """What is timed of work that a host hands to a device."""

    DEVICE = torch.device("cuda")

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Gpu:
        gpu = Gpu()
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        return gpu

    def step(self, gpu: Gpu, host: float = 50e-6, device: float = 10e-6, kernels: int = 3) -> None:
        for _ in range(kernels):
            gpu.launch(host, device)

    def times(self, gpu: Gpu, **functions: Any) -> dict[str, Times]:
        flush = functools.partial(gpu.launch, 20e-6, 60e-6)
        return interleave(functions, 5, lambda _: flush(), self.DEVICE, prepare_queued=lambda _: flush())

    def test_a_step_on_an_idle_device_has_the_host_s_work_in_it_and_a_queued_one_has_not(self, gpu):
        times = self.times(gpu, ours=lambda: self.step(gpu))["ours"]
        assert times.total == pytest.approx([3 * 50e-6 + 10e-6] * 5)
        assert times.queued == pytest.approx([3 * 10e-6] * 5)
        assert times.work == times.queued
        assert gpu.sleeps[0] > QueuedTimer.LEAST, "clocks are slower than it assumes"

    def test_a_launch_is_no_part_of_a_copy(self, gpu):
        times = self.times(gpu, copy=lambda: gpu.launch(10e-6, 500e-6), step=lambda: self.step(gpu))
        assert times["copy"].queued == pytest.approx([500e-6] * 5)

    def test_a_slow_host_gets_a_longer_start(self, gpu):
        times = self.times(gpu, slow=lambda: self.step(gpu, host=9e-3), quick=lambda: self.step(gpu))
        assert times["slow"].queued == pytest.approx([3 * 10e-6] * 5)
        assert len(set(gpu.sleeps)) > 1
        assert len(gpu.sleeps) == 2 * 8 + len(set(gpu.sleeps)) - 1, "found out once"

    def test_one_that_waits_for_the_device_is_timed_as_it_is(self, gpu):
        def waits() -> None:
            gpu.launch(50e-6, 10e-6)
            gpu.synchronize()
            gpu.launch(50e-6, 10e-6)

        times = self.times(gpu, waits=waits)["waits"]
        assert times.queued == pytest.approx([10e-6 + 50e-6 + 10e-6] * 5, abs=60e-6)
        assert len(gpu.sleeps) <= 8, "not tried for ever"

    def test_ratios_need_no_queue(self, gpu):
        times = interleave({"a": lambda: self.step(gpu)}, 5, len, self.DEVICE)["a"]
        assert not gpu.sleeps and not times.queued
        assert times.work == times.total


class TestStatistics:
    @pytest.mark.parametrize(
        ("values", "quantiles"),
        [
            ([float(value) for value in range(11, 0, -1)], (2, 6, 10)),
            ([1.0, 3.0], (1.2, 2, 2.8)),
            ([5.0, 5.0, 5.0], (5, 5, 5)),
        ],
    )
    def test_quantiles(self, values, quantiles):
        found = Quantiles.of(values)
        assert (found.p10, found.median, found.p90) == pytest.approx(quantiles)

    def test_constant_ratio_is_a_point(self):
        ratio, interval = paired_ratio([2.0, 4.0, 6.0, 1.0], [1.0, 2.0, 3.0, 0.5])
        assert ratio == Quantiles(2.0, 2.0, 2.0)
        assert interval == (2.0, 2.0)

    def test_ratios_are_round_by_round(self):
        # The medians are 3 and 3.
        ratio, _ = paired_ratio([1.0, 3.0, 8.0], [4.0, 1.0, 3.0])
        assert ratio.median == pytest.approx(8 / 3)

    def test_interval_brackets_the_median(self):
        slow = [float(value) for value in range(1, 42)]
        ratio, (low, high) = paired_ratio(slow, [1.0] * 41)
        assert ratio == Quantiles(5.0, 21.0, 37.0)
        # Of the binomial distribution: the 14th and the 28th of 41 are a 95 % interval.
        assert 11 <= low <= 17
        assert 25 <= high <= 31
        assert paired_ratio(slow, [1.0] * 41) == (ratio, (low, high))  # no chance in it

    def test_interval_shrinks_with_more_rounds(self):
        _, (low, high) = paired_ratio([1.0, 2.0, 3.0] * 2, [1.0] * 6)
        _, (low_of_many, high_of_many) = paired_ratio([1.0, 2.0, 3.0] * 40, [1.0] * 120)
        assert low_of_many == high_of_many == 2.0
        assert low < 2.0 < high

    def test_rounds_have_to_match(self):
        with pytest.raises(ValueError, match="zip"):
            paired_ratio([1.0, 2.0], [1.0])

    def test_probe_reads_two_arrays_and_writes_one(self):
        probe = BandwidthProbe(CPU)
        assert probe.moved == 3 * 128 * 2**20
        probe()
        probe()
        assert probe._a[0] == 2 and probe._a[-1] == 2
        assert probe._b[0] == 1

    def test_flush_writes_twice_the_cache(self, monkeypatch):
        monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)
        flush = CacheFlush(CPU)
        flush()
        assert flush._buffer.nbytes == 8192
        assert torch.equal(flush._buffer, torch.ones(2048))

    def test_flush_can_read_instead(self, monkeypatch):
        monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)
        flush = CacheFlush(CPU)
        versions = []
        for _ in range(2):
            flush.read()
            versions.append((flush._buffer._version, flush._read._version))
        assert flush._read.nbytes == 8192
        assert versions[0] == versions[1], "nothing is written"

    def test_bandwidth_is_of_the_device_s_work(self):
        case = Case("tiny", custom=lambda: {"a": (1000, 1000)})
        times = Times([0.5] * 3, [0.5] * 3, [0.01] * 3)
        result = Result(case, {OURS: times}, bandwidth=[6.4e9] * 3)
        assert result.share_of_bandwidth(OURS) == pytest.approx(0.5)
        assert result.bytes_per_second(OURS) == pytest.approx(3.2e9)
        assert result.seconds(OURS).median == 0.5


class TestTables:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (123.4, "123 s"),
            (2.0, "2 s"),
            (0.0569, "56.9 ms"),
            (0.001, "1 ms"),
            (0.000793, "793 µs"),
            (12.34e-6, "12.3 µs"),
            (0.5e-6, "0.5 µs"),
            (0.0, "0 µs"),
        ],
    )
    def test_times(self, seconds, text):
        assert times(seconds) == text

    def test_markdown(self):
        assert markdown(["a", "longer"], [["1", "2"], ["three", "4"]]) == (
            "| a     | longer |\n| ----- | ------ |\n| 1     | 2      |\n| three | 4      |"
        )

    def test_markdown_without_rows(self):
        assert markdown(["a", "b"], iter(())) == "| a | b |\n| - | - |"

    def test_small_case(self):
        result = Result(
            tiny(),
            {RIVAL: Times([0.004, 0.002]), OURS: Times([0.002, 0.001]), "torchao-8bit": Times([0.001, 0.0005])},
            {"optimi": "the package optimi is not installed", "apex": "needs cuda"},
            {RIVAL: 2 * 2**20, OURS: 4096, "torchao-8bit": None},
        )
        text = case_table(result)
        assert text.splitlines()[:2] == [
            "tiny/two/adamw/amp-clip/warm: 4 tensors in 2 groups, 74 parameters, 32 bytes each to move; "
            "warm caches, 2 rounds",
            "",
        ]
        head, rows, rest = table_of(text)
        assert head == ["contender", "median", "p10 – p90", f"× {OURS} [95 %]", "extra memory"]
        assert rows == [
            ["torchao-8bit (approximate)", "750 µs", "550 µs – 950 µs", "0.50 [0.50, 0.50]", "?"],
            [OURS, "1.5 ms", "1.1 ms – 1.9 ms", "1", "4 KiB"],
            [RIVAL, "3 ms", "2.2 ms – 3.8 ms", "2.00 [2.00, 2.00]", "2.0 MiB"],
        ]
        assert rest == ["left out: optimi: the package optimi is not installed", "left out: apex: needs cuda"]

    def test_large_case_has_bandwidths(self):
        case = Case("tiny", custom=lambda: {"a": (1000, 1000)})
        # 32 MB in 10 ms, where the memory moves twice as much.
        result = Result(case, {OURS: Times([0.01] * 3, [0.01] * 3)}, bandwidth=[6.4e9] * 3)
        text = case_table(result)
        assert text.startswith("tiny/one/adamw/amp-clip: 1 tensors in 1 group, 1,000,000 parameters, 32 bytes ")
        assert "cold caches, 3 rounds" in text
        head, rows, rest = table_of(text)
        assert head[4:] == ["GB/s", "of the memory's", "extra memory"]
        assert rows == [[OURS, "10 ms", "10 ms – 10 ms", "1", "3.2", "50%", "?"]]
        assert rest == []

    def test_gpu_case_has_the_host_s_time(self):
        case = Case("tiny", device="cuda", custom=lambda: TINY)
        result = Result(case, {OURS: Times([0.01] * 3, [0.003, 0.001, 0.002])}, {}, {OURS: 2**20})
        head, rows, _ = table_of(case_table(result))
        assert head[4:] == ["host", "extra memory"]
        assert rows == [[OURS, "10 ms", "10 ms – 10 ms", "1", "2 ms", "1.0 MiB"]]
        large = Case("tiny", device="cuda", custom=lambda: {"a": (1000, 1000)})
        head, rows, _ = table_of(case_table(Result(large, result.times, bandwidth=[1e12] * 3)))
        assert head[4:] == ["GB/s", "of the memory's", "host", "extra memory"]
        assert rows[0][4:] == ["3.2", "0%", "2 ms", "?"]

    def test_without_ours_the_first_is_the_measure(self):
        result = Result(tiny(), {RIVAL: Times([0.004] * 2), "torch-foreach": Times([0.002] * 2)})
        head, rows, _ = table_of(case_table(result))
        assert head[3] == f"× {RIVAL} [95 %]"
        assert [(row[0], row[3]) for row in rows] == [("torch-foreach", "0.50 [0.50, 0.50]"), (RIVAL, "1")]

    def test_without_times(self):
        text = case_table(Result(tiny("one"), left_out={RIVAL: "fails: RuntimeError: no luck"}))
        headline, empty, left_out = text.splitlines()
        assert headline.endswith("4 tensors in 1 group, 74 parameters, 32 bytes each to move; warm caches, 0 rounds")
        assert (empty, left_out) == ("", f"left out: {RIVAL}: fails: RuntimeError: no luck")
