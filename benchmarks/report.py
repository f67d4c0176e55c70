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
from fusedopt.bench.measure import Quantiles, Times
from fusedopt.bench.tables import case_table, markdown, times
from fusedopt.compare.comparison import Comparison
from fusedopt.compare.rows import remarks, rows

from . import case_words
from .fit import LIMIT, longest_line, quote

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
#: (count, seconds of each round), by rising count.
Points = list[tuple[int, list[float]]]
COLOURS = {OURS: "#d1495b", RIVAL: "#30638e", "torch-merged": "#5c95c0", "torch-grad-scale": "#a0c1de"}


@dataclass
class Report:
    """A run, read from the JSON of pytest-benchmark.

    Attributes:
        machine, commit, date: of the JSON.
        results: of the step cases.
        curves: for each curve and contender, its points.
        training: the runs of one config with each optimizer, or None.
    """

    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    results: list[Result] = field(default_factory=list)
    curves: dict[str, dict[str, Points]] = field(default_factory=dict)
    training: Comparison | None = None

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `make bench` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
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
                if "comparison" in info:
                    report.training = Comparison.from_dict(info["comparison"])
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


def medians(points: Points) -> dict[int, float]:
    """Seconds by count."""
    return {count: statistics.median(rounds) for count, rounds in points}


def ratio_cell(result: Result, name: str) -> str:
    """How many times as long as ours a contender takes, with its interval; nothing of one that took no part."""
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
                *(ratio_cell(result, name) for name in COMPARED),
                f"{result.share_of_bandwidth(OURS):.0%}" if result.bandwidth else "",
            ]
            for result in results
            if OURS in result.times
        ),
    )


def scaling_tables(curves: dict[str, dict[str, Points]]) -> list[str]:
    """For each curve the measured times, and each contender's line as far as one holds."""
    parts = []
    for curve, contenders in curves.items():
        noun, unit, size = ("parameter", "ps", 1e-12) if curve == "parameters" else ("tensor", "ns", 1e-9)
        measured = {name: medians(points) for name, points in contenders.items()}
        head = [CURVES[curve], *(text for name in measured for text in (name, f"per {noun}"))]
        rows = [
            [
                f"{count:,}",
                *(text for costs in measured.values() for text in _cost(costs.get(count), count, unit, size)),
            ]
            for count in sorted({count for costs in measured.values() for count in costs})
        ]
        lines = [f"- {name}: {quote(longest_line(costs), noun)}" for name, costs in measured.items() if len(costs) > 1]
        parts += [markdown(head, rows), "\n".join(lines)] if lines else [markdown(head, rows)]
    return parts


def _cost(seconds: float | None, count: int, unit: str, size: float) -> tuple[str, str]:
    """A measured time, and its share of one tensor or parameter."""
    if seconds is None:
        return "", ""
    return times(seconds), f"{float(f'{seconds / count / size:.3g}'):,.0f} {unit}"


def training_section(comparison: Comparison) -> str:
    """The runs of a config side by side, and what to know about them."""
    headings, sections = rows(comparison)
    table = markdown([headings[0] or "per run", *headings[1:]], [row for section in sections for row in section])
    environment = comparison.environment
    about = (
        f"`{comparison.config}`, {comparison.epochs} epochs, {environment['device']}, {environment['threads']} "
        f"threads, torch {environment['torch']}, fusedopt {environment['fusedopt']}."
    )
    return "\n\n".join([about, table, " ".join(remarks(comparison))])


def page(report: Report, shown: list[str]) -> str:
    """The whole report as Markdown."""
    training = report.training
    parts = [
        f"# {report.title}",
        f"torch {report.machine['torch']}, {report.machine['threads']} threads, Python "
        f"{report.machine['python_version']}. Ratios are to fusedopt: the median over paired rounds, in which all "
        "contenders take turns, with its 95 % bootstrap interval. Every result was checked against the formula in "
        "float64 before it was timed. What a case is called: workload / groups / optimizer / recipe, then what is not "
        "fp32, on a CPU, and with cold caches.",
        *(f"![{name}]({name})" for name in shown),
    ]
    if report.results:
        parts += ["## One step", summary(report.results)]
    if training is not None:
        parts += ["## A training run", training_section(training)]
    if report.curves:
        parts += [
            "## How time grows",
            "Medians. Below them, for each contender, a line through as many neighbouring sizes as one line meets "
            f"within {LIMIT:.0%}, and the largest share by which it misses one of them. It says nothing about other "
            "sizes.",
            *scaling_tables(report.curves),
        ]
    if report.results:
        parts.append("## Each case")
        for result in report.results:
            headline, _, table = case_table(result).partition("\n\n")
            name, _, about = headline.partition(": ")
            parts += [f"### {name}", about, table]
    parts += ["## The machine", "```\n" + "\n".join(report.machine["info"]) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _large(results: list[Result]) -> list[Result]:
    return [result for result in results if result.bandwidth and OURS in result.times]


def draw_bandwidth(large: list[Result], path: Path, source: str = "") -> None:
    """Bars against the memory's bandwidth: how much of it each contender makes use of, in the large cases.

    The bars of a case touch, whoever took part; the figures stand at the foot of their bars, far from the line.
    """
    counts = [sum(name in result.times for name in COLOURS) for result in large]
    gap, top, ticks = 0.9, 0.0, []
    height = sum(counts) + gap * (len(large) - 1)
    figure, axes = plt.subplots(figsize=(9, 1.1 + 0.19 * height), layout="constrained")
    axes.axvline(1, color="black", linewidth=1, linestyle="--", zorder=0)
    shares = [result.share_of_bandwidth(name) for result in large for name in COLOURS if name in result.times]
    for result, count in zip(large, counts, strict=True):
        ticks.append(top + (count - 1) / 2)
        for name, colour in COLOURS.items():
            if name not in result.times:
                continue
            share = result.share_of_bandwidth(name)
            axes.barh(top, share, 1, color=colour)
            inside = share > 0.06 * max(shares)
            ink = ("black" if name == "torch-grad-scale" else "white") if inside else "black"
            axes.annotate(
                f"{share:.0%}", (0 if inside else share, top), (4, 0), textcoords="offset points", va="center_baseline",
                fontsize=7, color=ink,
            )  # fmt: skip
            top += 1
        top += gap
    axes.set_yticks(
        ticks, [f"{case_words.parameters(result.case)}\n{case_words.step(result.case)}" for result in large]
    )
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_ylim(height - 0.4, -0.6)
    axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    axes.set_xlabel(
        "bytes that two passes must move, as a share of the bandwidth of a += b (100%) in the same rounds",
        fontsize=8,
    )
    shown = [name for name in COLOURS if any(name in result.times for result in large)]
    patches = [matplotlib.patches.Patch(color=COLOURS[name], label=case_words.CONTENDERS[name]) for name in shown]
    figure.legend(handles=patches, fontsize=8, loc="outside upper center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, metadata={"Source": source})
    plt.close(figure)


def draw_scaling(curves: dict[str, dict[str, Points]], path: Path, source: str = "") -> None:
    """Time against count, with the lines where they hold."""
    figure, panels = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.8), layout="constrained", squeeze=False)
    for axes, (curve, contenders) in zip(panels[0], curves.items(), strict=True):
        for name, points in contenders.items():
            counts, words = np.array([count for count, _ in points]), case_words.CONTENDERS[name]
            spread = [Quantiles.of(rounds) for _, rounds in points]
            middle = np.array([quantiles.median for quantiles in spread])
            around = [middle - [q.p10 for q in spread], [q.p90 for q in spread] - middle]
            axes.errorbar(counts, middle, around, fmt="o", markersize=4, color=COLOURS[name], label=words)
            axes.plot(counts, middle, ":", color=COLOURS[name], linewidth=0.8)
            line = longest_line(medians(points))
            if line is not None:
                along = np.geomspace(line.first, line.last)
                axes.plot(along, line.at(along), color=COLOURS[name], linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=CURVES[curve])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("seconds of a step (AdamW, AMP, clipping)")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Source": source})
    plt.close(figure)


def pictures(report: Report, name: str) -> list[str]:
    """The files that ``draw`` writes."""
    there = {"bandwidth": _large(report.results), "scaling": report.curves}
    return [f"{name}-{suffix}.png" for suffix, drawn in there.items() if drawn]


def draw(report: Report, folder: Path, name: str, source: str = "") -> None:
    """Draw the pictures of a page; ``source`` is a note for their metadata on what they are made from."""
    if large := _large(report.results):
        draw_bandwidth(large, folder / f"{name}-bandwidth.png", source)
    if report.curves:
        draw_scaling(report.curves, folder / f"{name}-scaling.png", source)


def write(source: Path, folder: Path, name: str) -> Path:
    """Write ``<name>.md`` and its pictures into a folder; returns the page's path."""
    report = Report.load(source)
    folder.mkdir(parents=True, exist_ok=True)
    draw(report, folder, name, source.name)
    target = folder / f"{name}.md"
    target.write_text(page(report, pictures(report, name)), encoding="utf-8")
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
    texts = [summary(report.results), *scaling_tables(report.curves)]
    if report.training is not None:
        texts.append(training_section(report.training))
    for text in texts:
        print(f"\n{text}")
    print(f"\nwritten: {target}")


if __name__ == "__main__":
    main()
