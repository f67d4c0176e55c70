"""The optimizer's part of a step under other trainers: ``python -m benchmarks.trainers``, on a CPU, in one thread.

It begins when the backward pass has ended and is over when the trainer has stepped: unscaling, clipping, what the
trainer does around them, and the update. Under each trainer AdamW of torch and ours take turns on the same gradients,
which are given, so that there is nothing else to compute. Each turn is a few steps, of which the first is not counted;
its time is their median. Trainers run in processes of their own.

Both trainings must have the same parameters in the end, or a result is wrong and the exit code 2.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import multiprocessing
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusedopt.bench.measure import Quantiles, paired_ratio
from fusedopt.bench.tables import markdown, times

from .record import environment, save
from .sharded import case_of
from .trainer_drivers import DRIVERS

#: Names of workloads, and how their parameters are grouped.
WORKLOADS = {"vit-tiny": "two", "400x64": "each"}
OURS, STOCK = "fusedopt", "torch"
#: How far apart parameters may be, which differ by the rounding of a few hundred steps of 1e-3.
TOLERANCE = 1e-4


def measure(title: str, workload: str, grouping: str, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of the turns of both."""
    warnings.simplefilter("ignore")  # of what the trainers think of a model that has nothing to compute
    torch.set_num_threads(1)
    case = case_of(workload, grouping=grouping, recipe="clip")
    content: dict[str, Any] = {"trainer": title, "workload": workload, "grouping": grouping}
    content |= {"tensors": len(case.shapes), "parameters": case.parameters}
    if importlib.util.find_spec(DRIVERS[title].package) is None:
        return {**content, "left_out": f"{DRIVERS[title].package} is not installed"}
    drivers = {STOCK: DRIVERS[title](case, fused=False), OURS: DRIVERS[title](case, fused=True)}
    seconds: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(rounds + 1):
        for name in list(drivers)[:: 1 if number % 2 else -1]:
            taken = drivers[name].seconds(steps + 1)
            assert len(taken) == steps + 1, f"{title}: {len(taken)} steps instead of {steps + 1}"
            if number:
                seconds[name].append(statistics.median(taken[1:]))
    pairs = zip(drivers[STOCK].net.parameters(), drivers[OURS].net.parameters(), strict=True)
    content["difference"] = max(float((one - other).abs().max()) for one, other in pairs)
    return {**content, "seconds": seconds}


def table(content: Mapping[str, Any]) -> str:
    """The figures as Markdown, and why others are left out."""
    rows, notes = [], []
    for case in content["cases"]:
        place = f"{case['workload']}: {case['tensors']} tensors"
        if "left_out" in case:
            notes.append(f"- {case['trainer']}, {place}: {case['left_out']}")
            continue
        ratio, (low, high) = paired_ratio(case["seconds"][STOCK], case["seconds"][OURS])
        both = [times(Quantiles.of(case["seconds"][name]).median) for name in (OURS, STOCK)]
        stock = "fused" if DRIVERS[case["trainer"]].stock else "foreach"
        rows.append([case["trainer"], place, *both, stock, f"{ratio.median:.2f} [{low:.2f}, {high:.2f}]"])
    head = ["trainer", "parameters", OURS, STOCK, "torch's is", f"× {OURS} [95 %]"]
    return "\n".join([markdown(head, rows), *([""] if notes else []), *notes])


def wrong(case: Mapping[str, Any]) -> str | None:
    """What is wrong with a result, or None."""
    if case.get("difference", 0.0) <= TOLERANCE:
        return None
    return f"wrong result: {case['trainer']}, {case['workload']}: parameters are {case['difference']:.2g} apart"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 2 when a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trainers", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=31, help="of each case (default: 31)")
    parser.add_argument("--steps", type=int, default=7, help="that are counted in a turn (default: 7)")
    parser.add_argument("--trainer", action="append", choices=DRIVERS, help="only this one (may be repeated)")
    parser.add_argument("--workload", action="append", help="these instead, such as vit-b or 12x64 (may be repeated)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    cases = []
    for title in args.trainer or DRIVERS:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            for workload in args.workload or WORKLOADS:
                grouping = WORKLOADS.get(workload, "two")
                cases.append(process.submit(measure, title, workload, grouping, args.rounds, args.steps).result())
                print(f"{title}, {workload}: done", file=sys.stderr, flush=True)
    content = {"environment": {**environment(), "threads": 1}, "rounds": args.rounds, "cases": cases}
    print(f"torch {torch.__version__}, one thread; {args.rounds} rounds\n")
    print(table(content))
    if args.json:
        save(content, args.json)
    faults = [fault for case in cases if (fault := wrong(case)) is not None]
    for fault in faults:
        print(fault)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
