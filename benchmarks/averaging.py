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
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Quantiles, interleave, paired_ratio
from fusedopt.bench.tables import markdown, times
from fusedopt.bench.workloads import WORKLOADS, Shapes, numel, vit
from fusedopt.training.averaging import ExponentialMovingAverage

OURS, PROBE = "fusedopt", "a += b"
MOMENTUM = 2e-4
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


def rows(name: str, shapes: Shapes, rounds: int) -> list[list[str]]:
    model = model_of(shapes)
    averages = contenders(model)
    check(averages, model)
    device = torch.device("cpu")
    functions: dict[str, Callable[[], object]] = {
        each: lambda average=average: average.update_parameters(model) for each, average in averages.items()
    }
    probe = BandwidthProbe(device)
    large = numel(shapes) >= LARGE
    if large:
        functions[PROBE] = probe
    flush = CacheFlush(device)
    taken = {each: found.total for each, found in interleave(functions, rounds, lambda _: flush(), device).items()}
    lines = []
    for each in averages:
        ratio, (low, high) = paired_ratio(taken[each], taken[OURS])
        share = "–"
        if large:
            shares = [
                12 * numel(shapes) / own * other / probe.moved
                for own, other in zip(taken[each], taken[PROBE], strict=True)
            ]
            share = f"{statistics.median(shares):.0%}"
        against = "1" if each == OURS else f"{ratio.median:.2f} [{low:.2f}, {high:.2f}]"
        tensors = f"{name}: {len(shapes)} tensors, {numel(shapes) / 1e6:.3g} M"
        lines.append([tensors, each, times(Quantiles.of(taken[each]).median), against, share])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="An update of an exponential moving average, on a CPU.")
    parser.add_argument("--rounds", type=int, default=50, help="of each case (default: 50)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds\n")
    lines = [line for name, shapes in CASES.items() for line in rows(name, shapes(), args.rounds)]
    print(markdown(["model", "average", "an update", f"× {OURS} [95 %]", "of the bandwidth"], lines))


if __name__ == "__main__":
    main()
