"""plot_schedule: plots every scheduled value over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ...messages import require
from .simulate import Curve, Schedule, Span, simulate_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_schedule"]

#: The most curves that get their own colours and legend entries; more curves are coloured by their highest value.
_TOLD_APART = 8
_WARMUP = "#f2c14e"


def plot_schedule(
    cfg: Mapping[str, Any] | Schedule,
    path: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    epoch_length: int | None = None,
    title: str | None = None,
    log: bool = False,
) -> Figure:
    """Plot the schedules of a run: a panel for each scheduled value, a curve for groups with equal values.

    Warm-ups are shaded, milestones and the ends of schedulers are marked, and a strip below shows when each scheduler
    is active.

    Args:
        cfg: the config of a run, see :func:`simulate_schedule`; or a simulated schedule.
        path: file for the picture; the suffix sets the format. Not saved by default.
        model: see :func:`simulate_schedule`.
        epoch_length: see :func:`simulate_schedule`.
        title: title of the picture.
        log: use a logarithmic axis for the values.

    Returns:
        The picture, a ``matplotlib.figure.Figure``.

    Raises:
        MissingExtraError: matplotlib is not installed.
        KeyError, TypeError, ValueError: see :func:`simulate_schedule`.
    """
    figure_module = require("matplotlib.figure", "plot")
    schedule = cfg if isinstance(cfg, Schedule) else simulate_schedule(cfg, model=model, epoch_length=epoch_length)
    panels: dict[tuple[str, str], list[Curve]] = {}
    for curve in schedule.curves:
        panels.setdefault((curve.optimizer, curve.param_name), []).append(curve)
    strip = 0.35 + 0.28 * max(1, len(schedule.spans))
    figure = figure_module.Figure(figsize=(10, 2.9 * len(panels) + strip + 0.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(
        len(panels) + 1, 1, sharex=True, squeeze=False, height_ratios=[2.9] * len(panels) + [strip]
    )[:, 0]
    for panel, ((optimizer, param_name), curves) in zip(axes, panels.items(), strict=False):
        spans = [span for span in schedule.spans if (span.optimizer, span.param_name) == (optimizer, param_name)]
        _draw_values(panel, schedule, curves, spans, log)
        panel.set_title(f"{optimizer}: {param_name}" if optimizer else param_name, loc="left", fontweight="bold")
    _draw_strip(axes[-1], schedule)
    if schedule.epoch_length is not None and schedule.unit == "iteration":
        length: Any = schedule.epoch_length
        epochs = axes[0].secondary_xaxis("top", functions=(lambda tick: tick / length, lambda epoch: epoch * length))
        epochs.set_xlabel("epoch")
    if title:
        figure.suptitle(title, fontweight="bold")
    _label_strip(figure, axes[-1], schedule)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _label(curve: Curve) -> str:
    count = len(curve.groups)
    numbers = f"group {curve.groups[0]}" if count == 1 else f"{count} groups"
    if not curve.names:
        return numbers
    more = f" and {len(curve.names) - 1} more" if len(curve.names) > 1 else ""
    return f"{numbers}: {curve.names[0]}{more}"


def _draw_values(axes: Axes, schedule: Schedule, curves: Sequence[Curve], spans: Sequence[Span], log: bool) -> None:
    from matplotlib import colormaps

    curves = sorted(curves, key=lambda curve: -float(curve.values.max()))
    highest = float(curves[0].values.max())
    few = len(curves) <= _TOLD_APART
    for index, curve in enumerate(curves):
        level = float(curve.values.max()) / highest if highest else 0.0
        color = f"C{index}" if few else colormaps["viridis"](0.92 * level)
        # Each value holds until the next tick.
        values = [*curve.values.tolist(), float(curve.values[-1])]
        axes.plot(
            range(schedule.ticks + 1),
            values,
            drawstyle="steps-post",
            color=color,
            linewidth=1.8 if few else 1.1,
            label=_label(curve) if few else None,
        )
    for span in spans:
        if span.is_warmup:
            axes.axvspan(span.begin, span.end, color=_WARMUP, alpha=0.25, linewidth=0)
            axes.text(span.begin, 0.97, " warm-up", transform=axes.get_xaxis_transform(), va="top", fontsize="small")
        for border in (span.begin, span.end):
            if 0 < border < schedule.ticks:
                axes.axvline(border, color="gray", linestyle=":", linewidth=1)
        for mark in span.marks:
            axes.axvline(mark, color="tab:red", linestyle="--", linewidth=0.8, alpha=0.7)
    if log:
        axes.set_yscale("log")
    elif 0 <= min(float(curve.values.min()) for curve in curves) <= highest / 2:
        axes.set_ylim(bottom=0)
    axes.set_xlim(0, schedule.ticks)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if few:
        axes.legend(frameon=False, fontsize="small")
    else:
        note = f"{len(curves)} curves; the darkest is {_label(curves[-1])}"
        axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize="small")


def _draw_strip(axes: Axes, schedule: Schedule) -> None:
    for row, span in enumerate(schedule.spans):
        color = _WARMUP if span.is_warmup else "tab:blue"
        axes.barh(row, span.end - span.begin, left=span.begin, height=0.62, color=color, alpha=0.45)
        for mark in span.marks:
            axes.plot([mark, mark], [row - 0.31, row + 0.31], color="tab:red", linewidth=1.2)
    axes.set_ylim(max(1, len(schedule.spans)) - 0.5, -0.5)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(schedule.unit)
    if not schedule.spans:
        axes.text(schedule.ticks * 0.01, 0, "no schedulers", va="center", color="gray")


def _label_strip(figure: Figure, axes: Axes, schedule: Schedule) -> None:
    """Put the name of each scheduler into its bar, or beside a bar that is too short for it."""
    figure.draw_without_rendering()  # for the lengths
    edge = axes.get_window_extent().x1
    for row, span in enumerate(schedule.spans):
        of = f" of {span.optimizer}" if span.optimizer else ""
        waits = ", waits for metrics" if span.needs_metrics else ""
        label = axes.annotate(
            f"{span.scheduler}{of} [{span.begin}, {span.end}){waits}",
            (span.begin, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            zorder=3,
        )
        begin, end = (axes.transData.transform((tick, row))[0] for tick in (span.begin, span.end))
        wide = label.get_window_extent().width + 12
        if wide > end - begin:
            after = end + wide <= edge
            label.xy = (span.end if after else span.begin, row)
            label.set(position=(4 if after else -4, 0), ha="left" if after else "right")
