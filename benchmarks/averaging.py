"""What an update of an exponential moving average takes: ``python -m benchmarks.averaging``.

Ours, torch's AveragedModel with its multi-tensor function, and MMEngine's where it is installed, of the same models and
with the same weight of the new value. They are compared first, then take turns, with cold caches. Of the memory's
bandwidth is the share that moving each average twice and each parameter once, 12 bytes in fp32, is of what ``a += b``
on large arrays moves in the same rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Quantiles, interleave, paired_ratio
from fusedopt.bench.tables import markdown, times
from fusedopt.bench.workloads import WORKLOADS, Shapes, numel, vit
from fusedopt.training.averaging import ExponentialMovingAverage

from .record import environment, save

OURS, PROBE = "fusedopt", "a += b"
MOMENTUM = 2e-4
BYTES = 12  # per parameter: the average read and written, the parameter read
LARGE = 2**24  # parameters, from which on the memory decides
CASES: dict[str, Callable[[], Shapes]] = {
    "400x64": WORKLOADS["400x64"].shapes,
    "vit-tiny": WORKLOADS["vit-tiny"].shapes,
    "vit 384 x 33": lambda: vit(384, 33),
    "vit-b": WORKLOADS["vit-b"].shapes,
}


def model_of(shapes: Shapes) -> nn.Module:
    """A tree of modules, as the names have it, with parameters of these shapes."""
    model = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        module = model
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(leaf, nn.Parameter(torch.randn(shape)))
    return model


def contenders(model: nn.Module) -> dict[str, nn.Module]:
    """Averages of ``model`` by name."""
    averages: dict[str, nn.Module] = {
        OURS: ExponentialMovingAverage(model, MOMENTUM),
        "torch": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(1 - MOMENTUM)),
    }
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.model import ExponentialMovingAverage as Theirs

        averages["mmengine"] = Theirs(model, MOMENTUM)
    return averages


def check(averages: dict[str, nn.Module], model: nn.Module) -> None:
    """Two updates of each; raise AssertionError unless they agree."""
    for _ in range(2):
        for average in averages.values():
            average.update_parameters(model)
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), -1.5)
    expected = list(averages[OURS].module.parameters())
    for name, average in averages.items():
        torch.testing.assert_close(list(average.module.parameters()), expected, msg=f"{name} is off")


def measure(name: str, shapes: Shapes, rounds: int) -> dict[str, Any]:
    """Seconds of each average's updates of one model, and of the probe where the model is large."""
    model = model_of(shapes)
    averages = contenders(model)
    check(averages, model)
    device = torch.device("cpu")
    functions: dict[str, Callable[[], object]] = {
        each: lambda average=average: average.update_parameters(model) for each, average in averages.items()
    }
    probe = BandwidthProbe(device)
    if numel(shapes) >= LARGE:
        functions[PROBE] = probe
    flush = CacheFlush(device)
    taken = {each: found.total for each, found in interleave(functions, rounds, lambda _: flush(), device).items()}
    return {
        "model": name,
        "tensors": len(shapes),
        "parameters": numel(shapes),
        "moved_by_probe": probe.moved,
        "probe_seconds": taken.pop(PROBE, []),
        "seconds": taken,
    }


def table(content: Mapping[str, Any]) -> str:
    """The figures as Markdown, a row for each model and average."""
    lines = []
    for case in content["cases"]:
        ours = case["seconds"][OURS]
        for each, seconds in case["seconds"].items():
            ratio, (low, high) = paired_ratio(seconds, ours)
            moved = [
                BYTES * case["parameters"] / own * other / case["moved_by_probe"]
                for own, other in zip(seconds, case["probe_seconds"], strict=False)
            ]
            lines.append(
                [
                    f"{case['model']}: {case['tensors']} tensors, {case['parameters'] / 1e6:.3g} M",
                    each,
                    times(Quantiles.of(seconds).median),
                    "1" if each == OURS else f"{ratio.median:.2f} [{low:.2f}, {high:.2f}]",
                    f"{statistics.median(moved):.0%}" if moved else "–",
                ]
            )
    return markdown(["model", "average", "an update", f"× {OURS} [95 %]", "of the bandwidth"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="An update of an exponential moving average, on a CPU.")
    parser.add_argument("--rounds", type=int, default=50, help="of each case (default: 50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds\n")
    content: dict[str, Any] = {"environment": environment(), "rounds": args.rounds}
    content["cases"] = [measure(name, shapes(), args.rounds) for name, shapes in CASES.items()]
    print(table(content))
    if args.json:
        save(content, args.json)


if __name__ == "__main__":
    main()
