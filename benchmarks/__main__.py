"""`python -m benchmarks`: the optimizer step on the CPU against torch fused, foreach and default."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.demo.memory import PeakMemory
from fusedopt.info import info

from .contenders import AMP_CLIP, BARE, STOCK, Contender, Recipe
from .measure import CacheFlush, Quantiles, bandwidth, interleave, paired_ratio
from .workloads import WORKLOADS


@dataclass(frozen=True)
class Case:
    """One workload in one recipe. ``floor`` is the ratio to torch fused that the project promises."""

    name: str
    workload: str
    optimizer: str
    recipe: Recipe
    group_per_parameter: bool
    floor: float


CASES = [
    Case("adamw-64x1Mi", "64 x 1Mi", "AdamW", AMP_CLIP, False, 1.5),
    Case("adamw-vit-b", "ViT-B", "AdamW", AMP_CLIP, True, 1.5),
    Case("adamw-vit-tiny", "ViT-tiny", "AdamW", AMP_CLIP, True, 2.5),
    Case("adamw-400x64-groups", "400 x 64", "AdamW", AMP_CLIP, True, 25.0),
    Case("adamw-400x64", "400 x 64", "AdamW", AMP_CLIP, False, 12.0),
    Case("adamw-bare", "64 x 1Mi", "AdamW", BARE, False, 0.97),
    Case("sgd-64x1Mi", "64 x 1Mi", "SGD", AMP_CLIP, False, 1.5),
]


def check_results(contenders: dict[str, Contender]) -> None:
    """Raise unless all contenders agree after two steps; no time is taken of one that is wrong."""
    for contender in contenders.values():
        for _ in range(2):
            contender.restore_gradients()
            contender.step()
        contender.restore_gradients()
    reference = contenders["torch default"]
    for name, contender in contenders.items():
        for mine, theirs in zip(contender.params, reference.params, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def extra_memory(contender: Contender, steps: int = 5) -> int | None:
    """Peak bytes that steps take beyond what was there before them."""
    memory = PeakMemory(torch.device("cpu"))
    peaks = []
    for _ in range(steps):
        contender.restore_gradients()
        memory.start()
        contender.step()
        peak = memory.stop()
        if peak is None:
            return None
        peaks.append(peak)
    return sorted(peaks)[len(peaks) // 2]


def run(case: Case, rounds: int, flush: CacheFlush) -> dict[str, Any]:
    """Check, then time one case; seconds, ratios and bandwidth as plain data."""
    shapes = WORKLOADS[case.workload]()
    contenders = {
        name: Contender(name, case.optimizer, case.recipe, shapes, case.group_per_parameter)
        for name in ("fusedopt", *STOCK)
    }
    check_results(contenders)

    def prepare(name: str) -> None:
        contenders[name].restore_gradients()
        flush()

    seconds = interleave({name: contender.step for name, contender in contenders.items()}, rounds, prepare)
    warm = interleave(
        {name: contender.step for name, contender in contenders.items()},
        rounds,
        lambda name: contenders[name].restore_gradients(),
    )
    numel = sum(param.numel() for param in contenders["fusedopt"].params)
    ours = Quantiles.of(seconds["fusedopt"])
    result: dict[str, Any] = {
        "case": asdict(case),
        "parameters": numel,
        "tensors": len(shapes),
        "rounds": rounds,
        "seconds": seconds,
        "warm_seconds": warm,
        "bytes_per_parameter": case.recipe.bytes_per_parameter(case.optimizer),
        "bytes_per_second": numel * case.recipe.bytes_per_parameter(case.optimizer) / ours.median,
        "extra_memory": {name: extra_memory(contender) for name, contender in contenders.items()},
        "ratios": {},
    }
    for name in STOCK:
        ratio, interval = paired_ratio(seconds[name], seconds["fusedopt"])
        result["ratios"][name] = {**asdict(ratio), "interval": interval}
    return result


def table(results: list[dict[str, Any]], machine_bandwidth: float) -> str:
    """The results as a Markdown table."""
    head = [
        "case",
        "fusedopt ms (warm)",
        "× torch fused, cold caches",
        "floor",
        "× foreach",
        "× default",
        "GB/s (share of the machine's)",
        "extra memory KiB, ours / torch fused",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        case, ratios = result["case"], result["ratios"]
        fused, memory = ratios["torch fused"], result["extra_memory"]
        ours, warm = Quantiles.of(result["seconds"]["fusedopt"]), Quantiles.of(result["warm_seconds"]["fusedopt"])
        groups = "one group each" if case["group_per_parameter"] else "one group"
        rate = result["bytes_per_second"]
        small = result["parameters"] < 10**6
        cells = [
            f"{case['optimizer']}, {case['recipe']['name']}, {case['workload']}, {groups}",
            f"{1e3 * ours.median:.3g} ({1e3 * warm.median:.3g})",
            f"**{fused['median']:.2f}** [{fused['interval'][0]:.2f}, {fused['interval'][1]:.2f}]",
            f"{case['floor']:g}",
            f"{ratios['torch foreach']['median']:.2f}",
            f"{ratios['torch default']['median']:.2f}",
            "–" if small else f"{rate / 1e9:.1f} ({rate / machine_bandwidth:.0%})",
            " / ".join("?" if memory[n] is None else f"{memory[n] / 1024:.0f}" for n in ("fusedopt", "torch fused")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def commit() -> str:
    """The commit of the tree, or 'unknown'."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """Run the cases, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="one case (may be repeated); default: all")
    parser.add_argument("--rounds", type=int, default=25, help="paired rounds per case (default 25)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/bench"), help="where the JSON and table go")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    flush = CacheFlush()
    machine_bandwidth = bandwidth()
    results = []
    for case in CASES:
        if arguments.case and case.name not in arguments.case:
            continue
        print(f"{case.name} ...", flush=True)
        results.append(run(case, arguments.rounds, flush))
        gc.collect()
    machine = [line for line in info().splitlines() if not line.startswith("Python ")]  # its path is nobody's business
    text = (
        f"fusedopt {fusedopt.__version__} at {commit()}, torch {torch.__version__}, {arguments.threads} threads, "
        f"{platform.machine()}\nmachine: a += b moves {machine_bandwidth / 1e9:.1f} GB/s\n"
        f"ratios: median of {arguments.rounds} paired rounds with cold caches, [95 % bootstrap interval]\n\n"
        f"{table(results, machine_bandwidth)}\n"
    )
    print("\n" + text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {"commit": commit(), "machine": machine, "bandwidth": machine_bandwidth, "results": results}
    (arguments.out / "bench.json").write_text(json.dumps(record, indent=1))
    (arguments.out / "bench.md").write_text(text)
    print(f"written: {arguments.out / 'bench.json'}")


if __name__ == "__main__":
    main()
