"""The pictures of ``python -m benchmarks.precision``: loss curves, and how far final losses are from float32's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .precision import COPIED, FLOAT32, HALF, REFERENCES, noise, of

__all__ = ["PICTURES", "draw"]

#: Names of the pictures.
PICTURES = ("precision-curves.png", "precision-differences.png")

#: What the curves are of, with colour and width. Wide pale lines stay visible under narrow ones.
CURVES = {
    COPIED: ("#c9ccd1", 6.0),
    "master split, int8 states": ("#30638e", 2.4),
    "no master, by chance, bf16 states": ("#e0a458", 1.2),
    "no master, nearest, bf16 states (as torch)": ("#d1495b", 1.6),
}
GOOD, BAD = "#30638e", "#d1495b"


def _steps(content: Mapping[str, Any], points: int) -> list[float]:
    return [(number + 0.5) * content["steps"] / points for number in range(points)]


def _draw_curves(axes: Axes, content: Mapping[str, Any]) -> None:
    for name, (colour, width) in CURVES.items():
        curves = [run["curve"] for run in content["runs"] if run["variant"] == name]
        if curves:
            means = [statistics.fmean(point) for point in zip(*curves, strict=True)]
            axes.plot(_steps(content, len(means)), means, color=colour, linewidth=width, label=name)
    axes.set(title=f"{content['about']}\n{content['optimizer']}", xlabel="step", yscale="log")


def _draw_differences(axes: Axes, content: Mapping[str, Any], names: list[str]) -> None:
    """Dots, one for each seed, in per cent of the reference's final loss; twice the noise in grey."""
    axes.set_xscale("symlog", linthresh=0.1)
    for row, name in enumerate(names):
        reference = REFERENCES[HALF[name]]
        scale = 100 / statistics.fmean(of(content, reference, "final")) if of(content, reference, "final") else math.nan
        apart = [scale * each for each in of(content, name, "difference")]
        if of(content, f"{reference}, moved", "difference"):
            width = 2 * scale * noise(content, HALF[name])
            axes.barh(row, 2 * width, left=-width, height=0.8, color="#e3e5e8")
        axes.plot(apart, [row] * len(apart), "o", color=BAD if "no master, nearest" in name else GOOD, markersize=4)
    axes.axvline(0, color="#8a8f98", linewidth=0.8)
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (-100, -10, -1, 0, 1, 10, 100) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    axes.set(title=f"{content['about']}\n{content['optimizer']}", xlabel="% of the final loss, linear within 0.1")
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)


def draw(content: Mapping[str, Any], folder: Path, note: str) -> None:
    """Draw both pictures.

    Args:
        content: of the JSON.
        folder: for the :data:`PICTURES`.
        note: what the pictures say that they are made from.
    """
    tasks = content["tasks"]
    seen = [name for name in HALF if any(of(task, name, "final") for task in tasks)]
    names = [name for name in seen if name not in (FLOAT32, COPIED) and not name.endswith(", moved")]
    curves = Figure(figsize=(3.6 * len(tasks), 4.2), layout="constrained")
    differences = Figure(figsize=(3.0 * len(tasks) + 2.4, 1.6 + 0.26 * len(names)), layout="constrained")
    for figure, share in ((curves, False), (differences, True)):
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=share)[0]
        for axes, task in zip(panels, tasks, strict=True):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            if share:
                _draw_differences(axes, task, names)
            else:
                _draw_curves(axes, task)
            axes.title.set_fontsize("medium")
    panels_of_curves = curves.axes
    panels_of_curves[0].set_ylabel("training loss, mean of the seeds")
    handles, labels = panels_of_curves[0].get_legend_handles_labels()
    curves.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    curves.suptitle("bfloat16 parameters", fontweight="bold", fontsize="medium")
    differences.suptitle(
        "Final loss minus float32's of the same seed; grey: up to twice what one ulp does", fontsize="medium"
    )
    for name, figure in zip(PICTURES, (curves, differences), strict=True):
        figure.savefig(folder / name, dpi=110, metadata={"Source": note})
