"""What a step costs beside the arithmetic: ``python -m benchmarks.host``, on a CPU, in one thread.

*Times* are of warm caches. A step on n tensors of 64 elements is compared with one on a single tensor of as many
elements: what the single one takes beyond a step on 64 elements is arithmetic, all else is host cost. (Subtracting
the whole single step would leave nothing of a step's fixed cost.) Lines a + b * n are quoted where they hold.

*Instructions* are those of callgrind inside StepPlan::step, so without the Python around it and without pybind11's
reading of the arguments. valgrind hides AVX-512: the kernels in that table are the AVX2 ones, the times above it are of
the best ones the processor has. *Misses* are those of callgrind's simulation of a last level of 1 MiB: with 10,000
tensors nothing stays in it from one pass to the next, so they are the cache lines that a step touches. What is fetched
ahead counts as missed.

What an optimizer does beside its steps is timed at a few numbers of groups, tensors or iterations: benchmarks.growth.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.bench import CONTENDERS, RECIPES, Case
from fusedopt.bench.cases import SCALE
from fusedopt.bench.contenders import OURS, initial_tensors
from fusedopt.bench.measure import interleave
from fusedopt.bench.tables import markdown

from .fit import longest_line, quote
from .growth import growth_table, measure_growth
from .record import environment, save

ROOT = Path(__file__).parents[1]
COUNTS = (1, 50, 100, 200, 400, 1000)
SIZE = 64
TENSORS = 400  # where the tables look
MANY = 10_000  # and that of misses
SINGLE = "single"  # all elements in one tensor
STEPS = ("amp-clip", "bare")
GROWTH_ROUNDS = 5  # at most, of operations that take seconds
#: What the host path may cost: microseconds per step and per tensor.
GOALS = {"one": (15.0, 0.10), "each": (15.0, 0.15)}


def make_step(
    count: int, grouping: str, recipe: str, size: int = SIZE, backend: str = "native"
) -> Callable[[], object]:
    """A step of FusedAdamW on ``count`` tensors, in ``'one'`` group or one for ``'each'``."""
    params = [torch.nn.Parameter(torch.randn(size)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(size)
    groups = [{"params": [param]} for param in params] if grouping == "each" else [{"params": params}]
    if recipe == "bare":
        return fusedopt.FusedAdamW(groups, backend=backend).step
    optimizer = fusedopt.FusedAdamW(groups, clip_grad={"max_norm": 1.0}, backend=backend)
    scale = torch.tensor(1024.0)
    return lambda: optimizer.step(grad_scale=scale)


def step_times(case: Case, name: str = OURS, steps: int = 100, warmup: int = 20) -> list[float]:
    """Seconds until ``step`` of a fused contender's optimizer returns, by itself and in a loop: caches hold everything.

    The scaler's step and update around it are not counted; the scale is a tensor, as the scaler hands it over. On a GPU
    the device is idle before each step, so that none waits for room in its queue.
    """
    contender = CONTENDERS[name](case, {name: grad for name, _, grad in initial_tensors(case)})
    settings = {"grad_scale": torch.tensor(SCALE, device=case.device)} if RECIPES[case.recipe].amp else {}
    step: Callable[..., object] = contender.optimizer.step
    taken = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(warmup + steps):
            if case.device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step(**settings)
            taken.append(time.perf_counter() - start)
    finally:
        if collecting:
            gc.enable()
    return taken[warmup:]


def measure_times(rounds: int) -> dict[str, dict[str, dict[int, float]]]:
    """Warm times in seconds: of each step and grouping, and of as many elements in a single tensor, by count."""
    functions: dict[str, Callable[[], object]] = {}
    for recipe, count in itertools.product(STEPS, COUNTS):
        functions[f"{recipe} {SINGLE} {count}"] = make_step(1, "one", recipe, count * SIZE)
        functions.update({f"{recipe} {grouping} {count}": make_step(count, grouping, recipe) for grouping in GOALS})

    def warm_up(name: str) -> None:
        functions[name]()
        functions[name]()

    taken = interleave(functions, rounds, warm_up, torch.device("cpu"))
    return {
        recipe: {
            kind: {count: statistics.median(taken[f"{recipe} {kind} {count}"].total) for count in COUNTS}
            for kind in (SINGLE, *GOALS)
        }
        for recipe in STEPS
    }


def by_count(values: Mapping[Any, float]) -> dict[int, float]:
    """With whole numbers for keys, which JSON makes strings."""
    return {int(count): value for count, value in values.items()}


def host_costs(times: Mapping[str, Mapping[Any, float]], grouping: str) -> tuple[dict[int, float], dict[int, float]]:
    """Arithmetic, and all else of a step, in seconds by count."""
    single, step = by_count(times[SINGLE]), by_count(times[grouping])
    arithmetic = {count: seconds - single[1] for count, seconds in single.items()}
    return arithmetic, {count: seconds - arithmetic[count] for count, seconds in step.items()}


def time_table(content: Mapping[str, Any]) -> str:
    """Warm times, as Markdown: of a step on TENSORS tensors, and the host's cost at each count."""
    table = []
    for recipe, (grouping, (goal_step, goal_tensor)) in itertools.product(content["times"], GOALS.items()):
        arithmetic, costs = host_costs(content["times"][recipe], grouping)
        step = by_count(content["times"][recipe][grouping])
        values = (step[TENSORS], arithmetic[TENSORS], *costs.values())
        goal = f"{goal_step + goal_tensor * TENSORS:.0f}"
        table.append([recipe, grouping, *(f"{1e6 * value:.1f}" for value in values), goal])
    head = ["step", "groups", f"µs at {TENSORS}", "arithmetic", *(f"host at {count:,}" for count in costs)]
    lines = []
    for recipe, grouping in itertools.product(content["times"], GOALS):
        costs = host_costs(content["times"][recipe], grouping)[1]
        groups = "one group" if grouping == "one" else "a group for each"
        lines.append(f"- {recipe}, {groups}: {quote(longest_line(costs), 'tensor')}")
    return f"{markdown([*head, f'goal at {TENSORS}'], table)}\n\n" + "\n".join(lines)


def parse_annotation(text: str) -> Counter[str]:
    """Events of each function in callgrind_annotate's output, all columns together; names without types, arguments and
    templates.
    """
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if not (found := re.match(r"\s*((?:(?:[\d,]+|\.)\s+(?:\([ \d.]+%\)\s+)?)+)[^:]+:(.+)", line)):
            continue
        name = re.sub(r" \[[^\[]*\]$|'\d+$", "", found[2]).replace("(anonymous namespace)", "anonymous")
        while name != (name := re.sub(r"(?<!operator)<[^<>]*>", "", name)):  # innermost first
            pass
        whole = re.search(r"operator .*|\S+$", name.split("(")[0].strip())
        columns = re.sub(r"\([ \d.]+%\)", "", found[1]).split()
        counts[whole[0] if whole else name] += sum(int(value.replace(",", "")) for value in columns if value != ".")
    return counts


def count_events(events: str, tensors: int, grouping: str, steps: int) -> Counter[str]:
    """``'instructions'`` or ``'misses'`` of each function, in ``steps`` steps of a process of its own."""
    misses = events == "misses"
    simulation = ["--cache-sim=yes", f"--LL={2**20},16,64"] if misses else ["--cache-sim=no"]
    with tempfile.NamedTemporaryFile() as out:
        callgrind = ["valgrind", "-q", "--tool=callgrind", *simulation, f"--callgrind-out-file={out.name}"]
        child = [sys.executable, "-m", "benchmarks.host", "--child", str(tensors), grouping, str(steps), "amp-clip"]
        toggle = "--toggle-collect=fusedopt::StepPlan::step*"
        subprocess.run([*callgrind, toggle, *child], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        show = ["--show=DLmr,DLmw"] if misses else []
        annotate = ["callgrind_annotate", "--threshold=100", "--auto=no", *show, out.name]
        return parse_annotation(
            subprocess.run(annotate, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        )


def measure_events(events: str, tensors: int, few: int, many: int) -> dict[str, dict[str, float]]:
    """Events per tensor and step of each function, by grouping: what ``many`` steps make beyond ``few``."""
    runs = list(itertools.product(GOALS, (few, many)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = dict(zip(runs, pool.map(lambda run: count_events(events, tensors, *run), runs), strict=True))
    found = {}
    for grouping in GOALS:
        counts = counted[grouping, many]
        counts.subtract(counted[grouping, few])
        if not counts.total():
            raise RuntimeError("callgrind saw no StepPlan::step: has fusedopt._C been stripped of its symbols?")
        share = {name: count / ((many - few) * tensors) for name, count in counts.most_common()}
        least = 1 if events == "instructions" else 0.1
        found[grouping] = {
            "all": sum(share.values()),
            **{name: value for name, value in share.items() if value >= least},
        }
    return found


def event_tables(events: str, found: Mapping[str, Mapping[str, float]], top: int = 12) -> str:
    """Events per tensor and step, as Markdown."""
    tables = []
    for grouping, share in found.items():
        table = [[name, f"{value:.1f}"] for name, value in itertools.islice(share.items(), 1 + top)]
        tables.append(markdown([f"amp-clip, groups: {grouping}", f"{events} per tensor and step"], table))
    return "\n\n".join(tables)


def main() -> None:
    parser = argparse.ArgumentParser(description="The host path of a step, on a CPU.")
    parser.add_argument("--rounds", type=int, default=200, help="of the times (default: 200)")
    parser.add_argument("--no-callgrind", action="store_true", help="do not count instructions")
    parser.add_argument("--no-growth", action="store_true", help="do not measure what grows with groups and tensors")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        count, grouping, steps, recipe = args.child
        step = make_step(int(count), grouping, recipe)
        gc.disable()  # a collection in the middle of a step would be counted with it
        for _ in range(int(steps)):
            step()
        return
    content: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "elements": SIZE}
    content["times"] = measure_times(args.rounds)
    print(time_table(content), flush=True)
    if not args.no_callgrind:
        if shutil.which("valgrind"):
            content["instructions"] = measure_events("instructions", TENSORS, 3, 23)
            content["misses"] = measure_events("misses", MANY, 3, 5)
            for events in ("instructions", "misses"):
                print(f"\n{event_tables(events, content[events])}", flush=True)
        else:
            print("\nNo instruction counts: valgrind is not on PATH.")
    if not args.no_growth:
        content["growth_rounds"] = min(args.rounds, GROWTH_ROUNDS)
        content["growth"] = measure_growth(content["growth_rounds"])
        print(f"\n{growth_table(content['growth'])}")
    if args.json:
        save(content, args.json)


if __name__ == "__main__":
    main()
