"""`python -m benchmarks.report bench.json`: the figures of a run as a page of tables, and as two pictures."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.patches
import numpy as np

from fusedopt.bench import Case, Result
from fusedopt.bench.contenders import OURS, RIVAL
from fusedopt.bench.measure import Quantiles, Times, paired_ratio
from fusedopt.bench.tables import case_table, markdown, times

from .fit import fit as line

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COMPARED = {
    RIVAL: "torch fused",
    "torch-merged": "merged",
    "torch-grad-scale": "grad_scale",
    "torch-foreach": "foreach",
}
CURVES = {
    "parameters": "parameters, in 16 tensors",
    "tensors-one": "tensors of 64 elements, in one group",
    "tensors-each": "tensors of 64 elements, a group for each",
}
COLOURS = {OURS: "#d1495b", RIVAL: "#30638e", "torch-merged": "#5c95c0", "torch-grad-scale": "#a0c1de"}


@dataclass
class Report:
    """A run, read from the JSON of pytest-benchmark.

    Attributes:
        machine, commit, date: of the JSON.
        results: of the step cases.
        curves: for each curve and contender, (count, seconds of each round), by rising count.
        training: for each variant, the extra info of its record with the seconds of its steps.
    """

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    results: list[Result] = field(default_factory=list)
    curves: dict[str, dict[str, list[tuple[int, list[float]]]]] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `make bench` wrote."""
        content = json.loads(path.read_text())
        report = cls(content["machine_info"], content["commit_info"], content["datetime"][:10])
        steps: dict[str, Result] = {}
        for record in content["benchmarks"]:
            info, seconds = record["extra_info"], record["stats"]["data"]
            if info["kind"] == "step":
                result = steps.setdefault(record["group"], Result(Case(**info["case"])))
                result.times[info["contender"]] = Times(seconds, info.get("host", seconds), info.get("queued", []))
                result.extra_memory[info["contender"]] = info["extra_memory"]
                result.bandwidth = info["bandwidth"]
            elif info["kind"] == "training":
                report.training[info["variant"]] = {**info, "seconds": seconds}
            else:
                curve = info["kind"].removeprefix("scaling-")
                count = info["parameters"] if curve == "parameters" else info["tensors"]
                report.curves.setdefault(curve, {}).setdefault(info["contender"], []).append((count, seconds))
        report.results = list(steps.values())
        return report

    @property
    def title(self) -> str:
        """Where, when and of what these figures are."""
        machine, dirty = self.machine, " with changes" if self.commit["dirty"] else ""
        where = machine.get("gpu") or f"{next(iter(_lines(machine['info'], 'processor')))}"
        return f"{where}: fusedopt {machine['fusedopt']} at {self.commit['id']}{dirty}, {self.date}"


def _lines(info: list[str], key: str) -> Iterator[str]:
    return (line.removeprefix(key).strip() for line in info if line.startswith(key))


def fit(points: list[tuple[int, list[float]]]) -> tuple[float, float]:
    """(a, b) of seconds = a + b * count through the medians."""
    return line({count: statistics.median(rounds) for count, rounds in points})


def _ratio(result: Result, name: str) -> str:
    if name not in result.times:
        return ""
    ratio, (low, high) = result.ratio(name)
    return f"{ratio.median:.2f} [{low:.2f}, {high:.2f}]"


def summary(results: list[Result]) -> str:
    """A line for each case."""
    head = ["case", OURS, *(f"× {label}" for label in COMPARED.values()), "of the memory's bandwidth"]
    return markdown(
        head,
        (
            [
                result.case.name,
                times(result.seconds(OURS).median),
                *(_ratio(result, name) for name in COMPARED),
                f"{result.share_of_bandwidth(OURS):.0%}" if result.bandwidth else "",
            ]
            for result in results
            if OURS in result.times
        ),
    )


def scaling_table(curves: dict[str, dict[str, list[tuple[int, list[float]]]]]) -> str:
    """The line through each curve."""
    rows = []
    for curve, contenders in curves.items():
        unit, factor = ("ps per parameter", 1e12) if curve == "parameters" else ("ns per tensor", 1e9)
        for name, points in contenders.items():
            if len(points) > 1:
                constant, slope = fit(points)
                rows.append([CURVES[curve], name, times(max(constant, 0.0)), f"{slope * factor:.0f} {unit}"])
    return markdown(["time against", "contender", "of a step", "and"], rows)


def training_table(training: dict[str, dict[str, Any]]) -> str:
    """Images per second and the optimizer's share, for each variant."""
    rows = []
    for variant, info in training.items():
        seconds, part = info["seconds"], info["optimizer_seconds"]
        shares = [optimizer / whole for optimizer, whole in zip(part, seconds, strict=True)]
        rows.append(
            [
                f"{info['optimizer']} ({variant})",
                str(info["groups"]),
                f"{info['images_per_step'] / statistics.median(seconds):,.0f}",
                times(statistics.median(seconds)),
                times(statistics.median(part)),
                f"{statistics.median(shares):.1%}",
            ]
        )
    head = ["optimizer", "groups", "images/s", "whole step", "of which optimizer", "its share"]
    text = markdown(head, rows)
    if set(training) == {"stock", "fused"}:
        whole, (low, high) = paired_ratio(training["stock"]["seconds"], training["fused"]["seconds"])
        part, _ = paired_ratio(training["stock"]["optimizer_seconds"], training["fused"]["optimizer_seconds"])
        text += (
            f"\n\nThe whole training runs {whole.median:.2f} [{low:.2f}, {high:.2f}] times as fast, "
            f"its optimizer {part.median:.2f} times."
        )
    return text


def page(report: Report, pictures: list[str]) -> str:
    """The whole report as Markdown."""
    parts = [
        f"# {report.title}",
        f"torch {report.machine['torch']}, {report.machine['threads']} threads, Python "
        f"{report.machine['python_version']}. Ratios are to fusedopt: the median over paired rounds, in which all "
        "contenders take turns, with its 95 % bootstrap interval. Every result was checked against the formula in "
        "float64 before it was timed. What a case is called: workload / groups / optimizer / recipe, then what is not "
        "fp32, on a CPU, and with cold caches.",
        *(f"![{name}]({name})" for name in pictures),
    ]
    if report.results:
        parts += ["## One step", summary(report.results)]
    if report.training:
        parts += ["## A training", training_table(report.training)]
    if report.curves:
        parts += ["## How time grows", scaling_table(report.curves)]
    if report.results:
        parts.append("## Each case")
        for result in report.results:
            headline, _, table = case_table(result).partition("\n\n")
            name, _, about = headline.partition(": ")
            parts += [f"### {name}", about, table]
    parts += ["## The machine", "```\n" + "\n".join(report.machine["info"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def draw_bandwidth(results: list[Result], path: Path) -> bool:
    """Bars under the memory's roof: what of its bandwidth each contender makes use of, in the large cases."""
    large = [result for result in results if result.bandwidth and OURS in result.times]
    if not large:
        return False
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.62 * len(large)), layout="constrained")
    height = 0.8 / len(COLOURS)
    for row, result in enumerate(large):
        for place, (name, colour) in enumerate(COLOURS.items()):
            if name in result.times:
                share = result.share_of_bandwidth(name)
                bar = axes.barh(row + (place - (len(COLOURS) - 1) / 2) * height, share, height, color=colour)
                if name in (OURS, RIVAL):
                    axes.bar_label(bar, [f"{share:.0%}"], padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.annotate(
        "bandwidth", (1, -0.6), ha="right", va="bottom", fontsize=8, xytext=(-3, 0), textcoords="offset points"
    )
    axes.set_yticks(range(len(large)), [result.case.name for result in large], fontsize=8)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel("bytes that two passes must move, as a share of the bandwidth in the same rounds")
    patches = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, fontsize=8, loc="outside upper center", ncols=len(patches))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw_scaling(curves: dict[str, dict[str, list[tuple[int, list[float]]]]], path: Path) -> bool:
    """Time against count, with the fitted lines."""
    if not curves:
        return False
    figure, panels = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.8), layout="constrained", squeeze=False)
    for axes, (curve, contenders) in zip(panels[0], curves.items(), strict=True):
        for name, points in contenders.items():
            counts = np.array([count for count, _ in points])
            spread = [Quantiles.of(rounds) for _, rounds in points]
            middle = np.array([quantiles.median for quantiles in spread])
            around = [middle - [q.p10 for q in spread], [q.p90 for q in spread] - middle]
            axes.errorbar(counts, middle, around, fmt="o", markersize=4, color=COLOURS[name], label=name)
            if len(points) > 1:
                constant, slope = fit(points)
                along = np.geomspace(counts[0], counts[-1])
                axes.plot(along, constant + slope * along, color=COLOURS[name], linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=CURVES[curve])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds of a step (AdamW, AMP, clipping)")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def write(source: Path, folder: Path, name: str) -> Path:
    """Write ``<name>.md`` and its pictures into a folder; returns the page's path."""
    report = Report.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for suffix, drawn in (
        ("bandwidth", draw_bandwidth(report.results, folder / f"{name}-bandwidth.png")),
        ("scaling", draw_scaling(report.curves, folder / f"{name}-scaling.png")),
    ):
        if drawn:
            pictures.append(f"{name}-{suffix}.png")
    target = folder / f"{name}.md"
    target.write_text(page(report, pictures))
    return target


def main() -> None:
    """Parse the arguments and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", type=Path, help="what pytest-benchmark wrote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default: %(default)s)")
    parser.add_argument("--name", help="of the machine, which the files are named after (default: the JSON's name)")
    arguments = parser.parse_args()
    target = write(arguments.json, arguments.out, arguments.name or arguments.json.stem)
    report = Report.load(arguments.json)
    for text in (summary(report.results), training_table(report.training), scaling_table(report.curves)):
        print(f"\n{text}")
    print(f"\nwritten: {target}")


if __name__ == "__main__":
    main()
