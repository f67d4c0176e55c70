"""What grows with groups, tensors or iterations: ``python -m benchmarks.growth``, and part of benchmarks.host.

Each operation is measured at COUNTS, prepared anew for each call. The *exponent* is the slope of the time in a
logarithmic scale from the last count but one to the last: 1 where the time is in proportion, 2 where it is quadratic.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import pickle
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedopt
from fusedopt.bench.tables import markdown, times
from fusedopt.training.schedulers import CosineAnnealingLR, simulate_schedule

__all__ = ["COUNTS", "OPERATIONS", "Operation", "exponent", "growth_table", "measure_growth"]

COUNTS = (100, 1000, 10_000)
#: Elements of a tensor, so few that arithmetic takes no time.
SIZE = 8
#: Distinct learning rates among groups, as many as a layer decay makes for a ViT-B.
KINDS = 15
#: Seconds after which a measurement is not repeated.
BUDGET = 3.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Operation:
    """What is measured.

    Args:
        counted: what there are n of.
        ours: prepares it for n, and returns what is timed.
        stock: the same with torch's AdamW, where that has it.
    """

    counted: str
    ours: Callable[[int], Call]
    stock: Callable[[int], Call] | None = None


def parameters(count: int) -> list[nn.Parameter]:
    """With gradients."""
    params = [nn.Parameter(torch.ones(SIZE)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(SIZE)
    return params


def groups(count: int) -> list[dict[str, Any]]:
    """A group for each of ``count`` parameters."""
    return [{"params": [param], "lr": 1e-3 * (1 + index % KINDS)} for index, param in enumerate(parameters(count))]


def one_group(count: int) -> list[dict[str, Any]]:
    """One group of ``count`` parameters."""
    return [{"params": parameters(count)}]


class Many(nn.Module):
    """A model of ``count`` parameters, an even number."""

    def __init__(self, count: int):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(1, 1) for _ in range(count // 2))


def stepped(made: list[dict[str, Any]], **settings: Any) -> fusedopt.FusedAdamW:
    """A fused optimizer that has state."""
    optimizer = fusedopt.FusedAdamW(made, **settings)
    optimizer.step()
    return optimizer


def stock(made: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The same of torch. Its own constructor would take longer than what is measured."""
    return fusedopt.unfuse(stepped(made))


def _counted(made: Callable[[int], list[dict[str, Any]]]) -> str:
    return "tensors" if made is one_group else "groups"


def _of_both(made: Callable[[int], list[dict[str, Any]]], prepare: Callable[[Any], Call]) -> Operation:
    """Something that both do, once they have state: ``prepare`` of the optimizer returns what is timed."""
    return Operation(_counted(made), lambda n: prepare(stepped(made(n))), lambda n: prepare(stock(made(n))))


def _of_fused(
    made: Callable[[int], list[dict[str, Any]]], prepare: Callable[[Any], Call], **settings: Any
) -> Operation:
    """The same of what a fused optimizer alone does."""
    return Operation(_counted(made), lambda n: prepare(stepped(made(n), **settings)))


def _construction(cls: Any, count: int) -> Call:
    made = groups(count)
    return lambda: cls(made)


def _named(cls: Any, count: int) -> Call:
    made = [(f"parts.{index}.weight", param) for index, param in enumerate(parameters(count))]
    return lambda: cls(made)


def _paramwise(count: int) -> Call:
    model = Many(count)
    rules = {"bias_decay_mult": 0.0, "custom_keys": {"parts.0": {"lr_mult": 0.1}}}
    cfg = {"optimizer": {"type": "FusedAdamW", "lr": 1e-3, "weight_decay": 0.05}, "paramwise_cfg": rules}
    return lambda: fusedopt.build_optim_wrapper(model, cfg)


def _fuse(count: int) -> Call:
    optimizer = stock(groups(count))
    return lambda: fusedopt.fuse(optimizer)


def _first_step(made: Callable[[int], list[dict[str, Any]]]) -> Operation:
    def ours(count: int) -> Call:
        return fusedopt.FusedAdamW(made(count)).step

    def torchs(count: int) -> Call:
        optimizer = stock(made(count))
        optimizer.state.clear()
        return optimizer.step

    return Operation(_counted(made), ours, torchs)


def _load(optimizer: torch.optim.Optimizer) -> Call:
    saved = optimizer.state_dict()
    return lambda: optimizer.load_state_dict(saved)


def _scheduler(cls: Any, optimizer: torch.optim.Optimizer) -> Call:
    scheduler = cls(optimizer, T_max=100)
    optimizer.step()
    return scheduler.step


def _simulation(count: int) -> Call:
    model = Many(2 * KINDS)
    rules = {f"parts.{index}.": {"lr_mult": 0.8**index} for index in range(KINDS)}
    optimizer = {"type": "FusedAdamW", "lr": 1e-3}
    warm_up = count // 20
    cfg = {
        "optim_wrapper": {"optimizer": optimizer, "paramwise_cfg": {"custom_keys": rules}},
        "train_cfg": {"max_iters": count},
        "param_scheduler": [
            {"type": "LinearLR", "start_factor": 1e-3, "end": warm_up, "by_epoch": False},
            {"type": "CosineAnnealingLR", "eta_min": 1e-6, "begin": warm_up, "end": count, "by_epoch": False},
        ],
    }
    return lambda: simulate_schedule(cfg, model=model)


OPERATIONS: dict[str, Operation] = {
    "construct": Operation(
        "groups", lambda n: _construction(fusedopt.FusedAdamW, n), lambda n: _construction(torch.optim.AdamW, n)
    ),
    "construct, one group, with names": Operation(
        "tensors", lambda n: _named(fusedopt.FusedAdamW, n), lambda n: _named(torch.optim.AdamW, n)
    ),
    "build_optim_wrapper with paramwise_cfg": Operation("groups", _paramwise),
    "add_param_group, one more": _of_both(groups, lambda each: lambda: each.add_param_group({"params": parameters(1)})),
    "fuse": Operation("groups", _fuse),
    "unfuse": _of_fused(groups, lambda each: lambda: fusedopt.unfuse(each)),
    "first step, one group": _first_step(one_group),
    "first step": _first_step(groups),
    "zero_grad": _of_both(groups, lambda each: each.zero_grad),
    "state_dict, one group": _of_both(one_group, lambda each: each.state_dict),
    "state_dict": _of_both(groups, lambda each: each.state_dict),
    "load_state_dict, one group": _of_both(one_group, _load),
    "load_state_dict": _of_both(groups, _load),
    "deepcopy": _of_both(groups, lambda each: lambda: copy.deepcopy(each)),
    "pickle": _of_both(groups, lambda each: lambda: pickle.loads(pickle.dumps(each))),
    "averages": _of_fused(groups, lambda each: each.averages, ema={"decay": 0.99}),
    "bytes_per_parameter": _of_fused(groups, lambda each: each.bytes_per_parameter),
    "step of CosineAnnealingLR": Operation(
        "groups",
        lambda n: _scheduler(CosineAnnealingLR, stepped(groups(n))),
        lambda n: _scheduler(torch.optim.lr_scheduler.CosineAnnealingLR, stock(groups(n))),
    ),
    f"simulate_schedule of {KINDS} kinds of groups": Operation("iterations", _simulation),
}


def _seconds(prepare: Callable[[int], Call], count: int, rounds: int) -> float:
    """The median of ``rounds`` calls, fewer if they take long."""
    taken: list[float] = []
    while len(taken) < rounds and sum(taken) < BUDGET:
        call = prepare(count)
        gc.collect()  # what was prepared is not collected in the measured time
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_growth(rounds: int, counts: Sequence[int] = COUNTS) -> dict[str, Any]:
    """Median seconds of each operation by count, as they go into JSON.

    Args:
        rounds: calls of each.
        counts: of what there is.
    """
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, operation in OPERATIONS.items():
            for prepare in filter(None, (operation.ours, operation.stock)):
                prepare(counts[0])()  # imports, and what is remembered
            found[name] = {
                "counted": operation.counted,
                "ours": {count: _seconds(operation.ours, count, rounds) for count in counts},
                "torch": operation.stock and {count: _seconds(operation.stock, count, rounds) for count in counts},
            }
    return found


def exponent(taken: Mapping[Any, float]) -> float:
    """The slope of a time in logarithmic scales, between the last two counts."""
    (before, less), (after, more) = sorted((int(count), seconds) for count, seconds in taken.items())[-2:]
    return math.log(more / less) / math.log(after / before)


def growth_table(content: Mapping[str, Any]) -> str:
    """What :func:`measure_growth` found, as Markdown."""
    rows = []
    for name, found in content.items():
        counts = sorted(found["ours"], key=int)
        row = [name, found["counted"], *(times(found["ours"][count]) for count in counts)]
        row.append(f"{exponent(found['ours']):.2f}")
        theirs = found["torch"]
        rows.append([*row, *([times(theirs[counts[-1]]), f"{exponent(theirs):.2f}"] if theirs else ["", ""])])
    at = [f"{int(count):,}" for count in counts]
    return markdown(["operation", "n", *at, "exponent", f"torch at {at[-1]}", "exponent"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What grows with the groups, the tensors or the iterations.")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each operation (default: 5)")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="two or more, in ascending order")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(growth_table(measure_growth(args.rounds, args.counts)))


if __name__ == "__main__":
    main()
