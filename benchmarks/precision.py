"""Does it train as float32 does? ``python -m benchmarks.precision``, on a CPU, in one thread.

Small real tasks are trained in each precision, several seeds each, with the same first weights and the same batches.
There are two references, since a forward pass in bfloat16 is another calculation than one in float32:

- for float32 parameters, a run in float32;
- for bfloat16 parameters, a run whose optimizer has float32 parameters of its own: after each step they are rounded
  into a bfloat16 model, which makes the gradients. Nothing of the optimizer's own precision settings is used.

The noise of a reference is how far its final loss moves when one weight is moved by one ulp of its dtype before the
first step: the root mean square over seeds and weights. Differences are those from the reference of the same seed, and
are given in units of that noise. Where every difference is noise alone, the mean of n seeds is beyond 2 / sqrt(n) units
in about one of 20 cases. A short run may hardly amplify an ulp, and then this noise is far below any difference that
somebody could see; so differences are given in units of the spread of seeds too: the standard deviation of the
reference's final loss over first weights and batches.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.bench.tables import markdown

from .precision_tasks import TASKS, Task
from .record import environment, save

#: How many points of a loss curve are kept.
POINTS = 40
#: How many runs of each reference have a weight moved.
MOVED = 3
#: Of the steps, those whose mean loss is the final loss.
LAST = 0.05


@dataclass(frozen=True)
class Variant:
    """A precision.

    Args:
        name: in tables.
        half: the model is in bfloat16.
        copied: the optimizer has float32 parameters of its own, and the model a rounded copy.
        moved: which weight is moved by one ulp before the first step; None for none.
        settings: of the optimizer.
    """

    name: str
    half: bool = False
    copied: bool = False
    moved: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def settings_of(self, seed: int) -> dict[str, Any]:
        """The settings for a run of this seed, which seeds the rounding by chance too."""
        chance = {"stochastic_rounding": {"seed": seed}} if self.settings.get("stochastic_rounding") else {}
        return {**self.settings, **chance}


FLOAT32, COPIED = "float32", "float32, bf16 forward"
CHANCE = {"stochastic_rounding": True}
EXACT = {"state_dtype": "float32"}
VARIANTS = [
    Variant(FLOAT32),
    *(Variant(f"{FLOAT32}, moved", moved=number) for number in range(MOVED)),
    Variant("bf16 states, nearest", settings={"state_dtype": "bfloat16"}),
    Variant("bf16 states, by chance", settings={"state_dtype": "bfloat16", **CHANCE}),
    Variant("float16 states, nearest", settings={"state_dtype": "float16"}),
    Variant("float16 states, by chance", settings={"state_dtype": "float16", **CHANCE}),
    Variant("int8 states", settings={"state_dtype": "int8"}),
    Variant(COPIED, half=True, copied=True),
    *(Variant(f"{COPIED}, moved", half=True, copied=True, moved=number) for number in range(MOVED)),
    Variant("master float32", half=True, settings={"master": "float32", **EXACT}),
    Variant("master split", half=True, settings={"master": "split", **EXACT}),
    Variant("master split, bf16 states, by chance", True, settings={"master": "split", **CHANCE}),
    Variant("master split, int8 states", half=True, settings={"master": "split", "state_dtype": "int8"}),
    Variant("master split8, int8 states", half=True, settings={"master": "split8", "state_dtype": "int8"}),
    Variant("no master, by chance, bf16 states", half=True, settings=CHANCE),
    Variant("no master, nearest, float32 states", half=True, settings=EXACT),
    Variant("no master, nearest, bf16 states (as torch)", half=True),
]
REFERENCES = {False: FLOAT32, True: COPIED}
HALF = {variant.name: variant.half for variant in VARIANTS}


def move(params: Sequence[Tensor], number: int) -> None:
    """Move the largest element of one of the weights with several dimensions by one ulp, away from zero."""
    weights = [param for param in params if param.dim() > 1]
    chosen = weights[(number + 1) * len(weights) // (MOVED + 1)].detach()
    position = tuple(int(index) for index in torch.unravel_index(chosen.abs().argmax(), chosen.shape))
    chosen[position] = torch.nextafter(chosen[position], chosen[position].sign() * math.inf)


def train(task: Task, variant: Variant, seed: int, steps: int) -> tuple[list[float], list[Tensor]]:
    """The loss of each step, and the model's parameters in the end."""
    torch.manual_seed(seed)
    model = task.model()
    if variant.half:
        model.to(torch.bfloat16)
    params = list(model.parameters())
    if variant.moved is not None:
        move(params, variant.moved)
    exact = [nn.Parameter(param.detach().float().clone()) for param in params] if variant.copied else params
    optimizer: Any = task.optimizer(exact, **task.settings, **variant.settings_of(seed), backend="native")
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = task.lr(step, steps)
        loss = task.loss(model, generator, task.batch)
        model.zero_grad()
        loss.backward()
        if variant.copied:
            for own, param in zip(exact, params, strict=True):
                own.grad = None if param.grad is None else param.grad.float()
        optimizer.step()
        if variant.copied:
            with torch.no_grad():
                for own, param in zip(exact, params, strict=True):
                    param.copy_(own)
        losses.append(loss.item())
    return losses, params


def final_loss(losses: Sequence[float]) -> float:
    """The mean over the last steps."""
    return statistics.fmean(losses[-max(1, round(LAST * len(losses))) :])


def curve(losses: Sequence[float]) -> list[float]:
    """Means over stretches of a run."""
    count = min(POINTS, len(losses))
    edges = [len(losses) * number // count for number in range(count + 1)]
    return [statistics.fmean(losses[start:end]) for start, end in itertools.pairwise(edges)]


def measure(name: str, seeds: int, steps: int | None = None) -> dict[str, Any]:
    """All runs of a task."""
    task = TASKS[name]
    steps = steps or task.steps
    numel = sum(param.numel() for param in task.model().parameters())
    settings = dict(task.settings)
    content: dict[str, Any] = {"task": name, "about": task.about, "parameters": numel, "steps": steps}
    content |= {"batch": task.batch, "optimizer": task.optimizer.__name__, "settings": settings, "runs": []}
    for seed in range(seeds):
        reference: dict[bool, float] = {}  # the final losses, in full
        for variant in VARIANTS:
            start = time.perf_counter()
            losses, _ = train(task, variant, seed, steps)
            final = final_loss(losses)
            if variant.name in REFERENCES.values():
                reference[variant.half] = final
            run: dict[str, Any] = {"variant": variant.name, "seed": seed, "final": final}
            run["difference"] = final - reference[variant.half]
            if variant.moved is None:
                run["curve"] = curve(losses)
            content["runs"].append(run)
            took = time.perf_counter() - start
            print(
                f"{name}, seed {seed}, {variant.name}: {final:.5f}, {run['difference']:+.2g} ({took:.0f} s)", flush=True
            )
    return content


def of(content: Mapping[str, Any], variant: str, key: str) -> list[float]:
    """The ``'final'`` losses of a variant's runs, or their ``'difference'`` from the reference."""
    return [run[key] for run in content["runs"] if run["variant"] == variant]


def noise(content: Mapping[str, Any], half: bool) -> float:
    """What a weight that is moved by one ulp does to the final loss of a reference."""
    return math.sqrt(statistics.fmean(each * each for each in of(content, f"{REFERENCES[half]}, moved", "difference")))


def spread(content: Mapping[str, Any], half: bool) -> float:
    """What other first weights and batches do to the final loss of a reference."""
    losses = of(content, REFERENCES[half], "final")
    return statistics.stdev(losses) if len(losses) > 1 else math.nan


def in_units(values: Sequence[float], unit: float) -> list[float]:
    """Values divided by a unit, which may be 0."""
    return [value / unit if unit else math.copysign(math.inf, value) if value else 0.0 for value in values]


def _short(value: float) -> str:
    """A number of units with its sign and two digits, or all of a large one."""
    return f"{value:+,.0f}" if 100 <= abs(value) < math.inf else f"{value:+.2g}" if value else "0"


def _row(content: Mapping[str, Any], variant: str) -> list[str]:
    half = HALF[variant]
    row = [variant, f"{statistics.fmean(of(content, variant, 'final')):#.5g}"]
    if variant in REFERENCES.values():
        units = f"noise: {noise(content, half):.2g}; seeds: {spread(content, half):.2g}"
        return [*row, "", "", "", "", units]
    apart = of(content, variant, "difference")
    mean = statistics.fmean(apart)
    row += [f"{mean:+.2g}" if mean else "0"]
    if variant.endswith(", moved"):
        return [*row, "", "", "", ""]
    units = in_units(apart, noise(content, half))
    (middle,), (of_seeds,) = in_units([mean], noise(content, half)), in_units([mean], spread(content, half))
    verdict = "within the noise" if abs(middle) <= 2 / math.sqrt(len(units)) else "higher" if mean > 0 else "lower"
    if not any(apart):
        verdict = "the same"
    return [*row, _short(middle), " ".join(map(_short, units)), _short(of_seeds), verdict]


def table(content: Mapping[str, Any]) -> str:
    """The figures of a task as Markdown, a row for each precision."""
    head = ["precision", "final loss", "difference", "in units of the noise", "each seed", "of the seeds' spread", ""]
    names = dict.fromkeys(run["variant"] for run in content["runs"])
    return markdown(head, [_row(content, name) for name in names])


def title(content: Mapping[str, Any]) -> str:
    """What a task is, in a line."""
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in content["settings"].items()}
    settings = ", ".join(f"{key}={value}" for key, value in plain.items())
    return (
        f"{content['about']}: {content['optimizer']}({settings}), {content['parameters']} parameters, "
        f"{content['steps']} steps of {content['batch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description="Training in each precision.")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="default: all of them")
    parser.add_argument("--seeds", type=int, default=3, help="of each precision (default: 3)")
    parser.add_argument("--steps", type=int, help="default: the task's own number")
    parser.add_argument(
        "--out", type=Path, help="a JSON for the figures; tasks that it has already and --task has not stay"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FOLDER", help="train nothing; draw what --out has into this folder"
    )
    args = parser.parse_args()
    if args.plot and not args.out:
        parser.error("--plot needs --out FILE.json, the figures that it draws")
    known = args.out is not None and args.out.exists()
    content: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8")) if known else {"tasks": []}
    if args.plot:
        from .precision_figures import draw

        digest = hashlib.sha256(args.out.read_bytes()).hexdigest()
        draw(content, args.plot, f"{args.out.name} sha256:{digest}")
        return
    torch.set_num_threads(1)
    content = {"environment": environment(), "tasks": content["tasks"]}
    for name in args.task:
        measured = measure(name, args.seeds, args.steps)
        others = [task for task in content["tasks"] if task["task"] != name]
        content["tasks"] = sorted([*others, measured], key=lambda task: list(TASKS).index(task["task"]))
        print(f"\n{title(measured)}\n\n{table(measured)}\n")
        if args.out:
            save(content, args.out)


if __name__ == "__main__":
    main()
