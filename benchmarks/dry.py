"""What a step on a GPU costs on the host: ``python -m benchmarks.dry``, without a GPU.

The plan, the tables and their upload are those of CUDA; the launches are counted and do nothing, because the module's
emulator of the kernels is told so. So it takes a build with the emulator, as `make setup` makes. Caches are evicted
before each step. The driver's own time for two launches, some microseconds each, is not in it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fusedopt import backends
from fusedopt.backends.native import NativeBackend, compiled_module
from fusedopt.bench.measure import CacheFlush
from fusedopt.bench.tables import markdown

from .host import GOALS, STEPS, make_step
from .record import environment, save

COUNTS = (400, 1_000, 10_000)


class DryBackend(NativeBackend):
    """The native backend, whose plan believes that parameters are on a GPU."""

    name = "dry"

    def _make_plan(self) -> Any:
        return compiled_module()[0].StepPlan(self.rule.name, "emulated", shards=self.shards)


def measure(rounds: int) -> list[dict[str, Any]]:
    """Median seconds of cold steps, and a step's share for each tensor."""
    flush = CacheFlush(torch.device("cpu"))
    found = []
    for count, grouping, recipe in itertools.product(COUNTS, GOALS, STEPS):
        step = make_step(count, grouping, recipe, backend=DryBackend.name)
        step()
        step()
        gc.disable()
        taken = []
        for _ in range(rounds):
            flush()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        gc.enable()
        seconds = statistics.median(taken)
        found.append({"count": count, "groups": grouping, "recipe": recipe, "seconds": seconds})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="The host's part of a step on a GPU, with launches that do nothing.")
    parser.add_argument("--rounds", type=int, default=100, help="of each case (default: 100)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    emulator = getattr(compiled_module()[0], "emulator", None)
    if emulator is None:
        raise SystemExit(
            "benchmarks.dry: this build has no emulator of the CUDA kernels: FUSEDOPT_EMULATOR=1 builds it"
        )
    backends.BACKENDS[DryBackend.name] = DryBackend
    emulator.configure(dry=True)
    found = measure(args.rounds)
    rows = []
    for each in found:
        times = (1e6 * each["seconds"], 1e9 * each["seconds"] / each["count"])
        rows.append([f"{each['count']:,}", each["groups"], each["recipe"], *(f"{value:.0f}" for value in times)])
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(markdown(["tensors", "groups", "step", "µs on the host", "ns per tensor"], rows))
    if args.json:
        save({"environment": environment(), "rounds": args.rounds, "steps": found}, args.json)


if __name__ == "__main__":
    main()
