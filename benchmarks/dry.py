"""What a step on a GPU costs on the host: ``python -m benchmarks.dry``, without a GPU.

The plan, the tables and their upload are those of CUDA; the launches are counted and do nothing, because the module's
emulator of the kernels is told so. So it takes a build with the emulator, as `make setup` makes. Caches are evicted
before each step. The driver's own time for two launches, some microseconds each, is not in it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import statistics
import time
from collections.abc import Mapping
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
    """Median seconds of cold steps."""
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


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Nanoseconds on the host for each tensor, as Markdown: a column for each Python."""
    by_case: dict[tuple[int, str, str], dict[str, float]] = {}
    for python, run in runs.items():
        for step in run["steps"]:
            by_case.setdefault((step["count"], step["groups"], step["recipe"]), {})[python] = step["seconds"]
    rows = []
    for (count, grouping, recipe), seconds in by_case.items():
        cells = [f"{1e9 * seconds[python] / count:.0f}" if python in seconds else "" for python in runs]
        rows.append([f"{count:,}", grouping, recipe, *cells])
    return markdown(["tensors", "groups", "step", *(f"ns per tensor, Python {python}" for python in runs)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="The host's part of a step on a GPU, with launches that do nothing.")
    parser.add_argument("--rounds", type=int, default=100, help="of each case (default: 100)")
    parser.add_argument("--json", type=Path, help="also write the figures there, beside those of other Pythons")
    args = parser.parse_args()
    torch.set_num_threads(1)
    emulator = getattr(compiled_module()[0], "emulator", None)
    if emulator is None:
        raise SystemExit(
            "benchmarks.dry: this build has no emulator of the CUDA kernels: FUSEDOPT_EMULATOR=1 builds it"
        )
    backends.BACKENDS[DryBackend.name] = DryBackend
    emulator.configure(dry=True)
    run = {"environment": environment(), "rounds": args.rounds, "steps": measure(args.rounds)}
    runs = {".".join(platform.python_version_tuple()[:2]): run}
    print(table(runs))
    if args.json:
        others = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
        save({**others, **runs}, args.json)


if __name__ == "__main__":
    main()
