"""Steps on sharded parameters: ``python -m benchmarks.sharded``, on a CPU, in two processes of one thread each.

The processes talk over gloo on the loopback interface. In each of four parts the contenders do the same, AMP unscaling,
clipping by the norm over all processes, and AdamW. They are compared with torch's for-loop optimizer first, then take
turns, with cold caches, and start each step together. A step takes as long as in the process where it takes longest.

- *fsdp2*: the DTensors of ``fully_shard``, with gradients that are set, not computed.
- *offload*: the same with ``CPUOffloadPolicy``.
- *zero*: ZeroRedundancyOptimizer, and its former self; with the exchange of parameters that ends a step, and without.
- *halves*: parameters that are whole in each process, by an optimizer's own step and by a ClipGroup of this optimizer.

The time in the collectives of our step is that of the process which waits less there: the other one, or the first one
to arrive, also waits for the work of its partner.

With ``--check`` the exit code is 1 when a floor does not hold. A case holds when the 95 % interval of its median ratio
is above the floor; until then its rounds are repeated and added up, three times at most; then the median decides.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from fusedopt.bench.cases import Case
from fusedopt.bench.contenders import OURS, RIVAL, Contender, initial_tensors
from fusedopt.bench.measure import CacheFlush, Quantiles, interleave, paired_ratio
from fusedopt.bench.run import CHECKED_STEPS, find_wrong
from fusedopt.bench.tables import markdown, times
from fusedopt.bench.workloads import WORKLOADS, uniform

from .record import environment, save

WORLD = 2
RETRIES = 3
FORMER, HALVES = "former", "two halves"
#: What a contender of *zero* is called without the exchange.
BARE = " without exchange"


@dataclass(frozen=True)
class Part:
    """Some contenders that do the same.

    Args:
        title: in the table.
        contenders: their classes in sharded_contenders, which takes seconds to import, by name; ours first.
        dealt_out: whether a process has a part of each gradient, rather than all of them.
        workloads: those that are run if nobody names one.
        floors: by workload, how many times as long as ours the rival has to take.
        rival: whom the floors are about.
        exchange: whether to time them without ZeRO's exchange too.
    """

    title: str
    contenders: Mapping[str, str]
    dealt_out: bool
    workloads: Sequence[str]
    floors: Mapping[str, float] = field(default_factory=dict)
    rival: str = RIVAL
    exchange: bool = False


PARTS = {
    "fsdp2": Part(
        "FSDP2",
        {OURS: "FusedOnShards", RIVAL: "TorchFusedOnShards"},
        True,
        ("400x64", "vit-tiny", "vit-b"),
        {"400x64": 10.0, "vit-tiny": 3.0, "vit-b": 1.5},
    ),
    "offload": Part(
        "FSDP2, CPU offload",
        {
            OURS: "FusedOffloaded",
            RIVAL: "TorchFusedOffloaded",
            "torch-foreach": "ForeachOffloaded",
            "deepspeed": "DeepSpeedOffloaded",
        },
        True,
        ("vit-tiny", "vit-b"),
    ),
    "zero": Part(
        "ZeRO", {OURS: "Zero", FORMER: "FormerZero"}, False, ("vit-b",), {"vit-b": 1.5}, FORMER + BARE, exchange=True
    ),
    "halves": Part(
        "not sharded", {OURS: "Fused", HALVES: "Halves"}, False, ("400x64", "vit-tiny", "vit-b"), rival=HALVES
    ),
}


def base_of(name: str) -> str:
    """Whose times a contender's are divided by."""
    return OURS + BARE if name.endswith(BARE) else OURS


def case_of(workload: str, **settings: Any) -> Case:
    """One of WORKLOADS, or as many vectors of a size as in ``'12x64'``, with other settings of the case."""
    sizes = re.fullmatch(r"(\d+)x(\d+)", workload)
    if workload in WORKLOADS or sizes is None:
        return Case(workload, **settings)
    count, size = map(int, sizes.groups())
    return Case(workload, custom=lambda: uniform(count, size), **settings)


# In each process -----------------------------------------------------------------------------------------------------


def make(part: Part, case: Case) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that are available and right, and why others are left out."""
    from . import sharded_contenders

    gradients = {name: grad for name, _, grad in initial_tensors(case)}
    if part.dealt_out:
        gradients = sharded_contenders.deal(gradients)
    contenders: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    for name, class_name in part.contenders.items():
        kind = getattr(sharded_contenders, class_name)
        if (reason := kind.unavailable(case)) is not None:
            left_out[name] = reason
            continue
        contenders[name] = contender = kind(case, gradients)
        for factor in CHECKED_STEPS:
            contender.set_gradients(factor)
            contender()
        contender.set_gradients()
    for name, reason in find_wrong(case, contenders).items():
        left_out[name] = reason
        del contenders[name]
    return contenders, left_out


def measure(name: str, workload: str, rounds: int, retries: int) -> dict[str, Any]:
    """The times of all processes of one part on one workload."""
    from .sharded_contenders import CollectiveClock, WithoutExchange

    part, case = PARTS[name], case_of(workload)
    contenders, left_out = make(part, case)
    turns: dict[str, Callable[[], object]] = {**contenders}
    owners = dict(contenders)
    clock = CollectiveClock(contenders[OURS]) if OURS in contenders and (part.dealt_out or part.exchange) else None
    if clock is not None:
        turns[OURS] = clock
    for each, contender in contenders.items() if part.exchange else ():
        turns[each + BARE] = WithoutExchange(contender)
        owners[each + BARE] = contender
    flush = CacheFlush(torch.device("cpu"))

    def prepare(turn: str) -> None:
        owners[turn].prepare()
        flush()
        dist.barrier()

    seconds: dict[str, list[float]] = {turn: [] for turn in turns}
    collectives: list[list[float]] = []  # of each round: seconds of the step, and in its collectives
    floor = part.floors.get(workload)
    content = {
        "part": name,
        "workload": workload,
        "tensors": len(case.shapes),
        "parameters": case.parameters,
        "left_out": left_out,
        "floor": floor,
        "rival": part.rival,
        "seconds": seconds,
        "collectives": collectives,
    }
    for _ in range(1 + retries):
        mine = {turn: found.total for turn, found in interleave(turns, rounds, prepare, torch.device("cpu")).items()}
        spent = [] if clock is None else clock.seconds[-rounds:]
        everyones: list[Any] = [None] * WORLD
        dist.all_gather_object(everyones, (mine, spent))
        for turn in turns:
            seconds[turn] += map(max, *(theirs[turn] for theirs, _ in everyones))
        for index in range(len(spent)):
            pairs = [(theirs[OURS][index], in_collectives[index]) for theirs, in_collectives in everyones]
            collectives.append(list(min(pairs, key=lambda pair: pair[1])))
        ratio = ratio_of(content)
        if floor is None or ratio is None or ratio[1] > floor:  # the same in all processes, which have the same times
            break
    return content


def run(rank: int, folder: str, chosen: Sequence[tuple[str, str]], rounds: int, retries: int, threads: int) -> None:
    """One of the processes; the first writes what they found."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    cases = []
    for name, workload in chosen:
        cases.append(measure(name, workload, rounds, retries))
        if rank == 0:
            print(f"{PARTS[name].title}, {workload}: measured", file=sys.stderr, flush=True)
            Path(folder, "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


# What was found ------------------------------------------------------------------------------------------------------


def ratio_of(case: Mapping[str, Any], name: str | None = None) -> tuple[float, float, float] | None:
    """How many times as long as ours a contender takes, the rival if none is named, with its 95 % interval."""
    seconds, name = case["seconds"], name or case["rival"]
    if name not in seconds or base_of(name) not in seconds:
        return None
    ratio, (low, high) = paired_ratio(seconds[name], seconds[base_of(name)])
    return ratio.median, low, high


def holds(case: Mapping[str, Any]) -> bool | None:
    """Whether the floor of a case holds; None where its ratio could not be measured."""
    ratio = ratio_of(case)
    return None if ratio is None else ratio[0] >= case["floor"]


def table(content: Mapping[str, Any]) -> str:
    """The figures as Markdown: a row for each contender, and why others are left out."""
    rows, notes = [], []
    for case in content["cases"]:
        title = PARTS[case["part"]].title
        place = f"{title}, {case['workload']}: {case['tensors']} tensors, {case['parameters'] / 1e6:.3g} M"
        for name, seconds in case["seconds"].items():
            ratio = ratio_of(case, name)
            shown = "" if ratio is None else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio)
            about_rival = ratio is not None and case["floor"] is not None and name == case["rival"]
            spent = case["collectives"] if name == OURS else []
            rows.append(
                [
                    place,
                    name,
                    times(Quantiles.of(seconds).median),
                    "1" if name == base_of(name) else shown,
                    f"{case['floor']:g}, {'holds' if holds(case) else 'broken'}" if about_rival else "",
                    f"{times(statistics.median(part for _, part in spent))}, "
                    f"{statistics.median(part / whole for whole, part in spent):.0%}"
                    if spent
                    else "",
                ]
            )
        notes += [f"- {title}, {case['workload']}: {name} is left out: {why}" for name, why in case["left_out"].items()]
    head = ["parameters", "contender", "a step", f"× {OURS} [95 %]", "floor", "in collectives"]
    return "\n".join([markdown(head, rows), *([""] if notes else []), *notes])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0; with ``--check`` 1 when a floor does not hold, 2 when it cannot be checked or a result is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharded", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=50, help="of each case (default: 50)")
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process (default: 1)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (may be repeated)")
    parser.add_argument("--workload", action="append", help="these instead, such as vit-b or 12x64 (may be repeated)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a floor does not hold")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args(argv)
    parts = args.part or list(PARTS)
    chosen = [(name, workload) for name in parts for workload in args.workload or PARTS[name].workloads]
    try:
        for _, workload in chosen:
            case_of(workload)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        retries = RETRIES if args.check else 0
        torch.multiprocessing.spawn(run, (folder, chosen, args.rounds, retries, args.threads), nprocs=WORLD)
        cases = json.loads(Path(folder, "cases.json").read_text(encoding="utf-8"))
    content = {"environment": {**environment(), "threads": args.threads, "processes": WORLD}, "rounds": args.rounds}
    content["cases"] = cases
    print(f"torch {torch.__version__}, {WORLD} processes, threads in each: {args.threads}; {args.rounds} rounds\n")
    print(table(content))
    if args.json:
        save(content, args.json)
    if not args.check:
        return 0
    verdicts = [holds(case) for case in cases if case["floor"] is not None]
    wrong = any("wrong result" in why for case in cases for why in case["left_out"].values())
    return 1 if False in verdicts else 2 if wrong or None in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
