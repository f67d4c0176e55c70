"""The picture of a comparison: losses and the optimizers' times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..messages import one_line
from .comparison import Comparison, Moved, Run

__all__ = ["save_figure"]

#: With fewer, the means of epochs would be a line of a few dots, or a single dot.
_FEWEST_EPOCHS = 3
_STOCK_COLOR, _TORCH_FUSED_COLOR, _FUSED_COLOR, _MOVED_COLOR = "#8a8f98", "#30638e", "#d1495b", "#e0a458"


def _label(run: Run) -> str:
    return f"{run.name} ({run.backend})" if run.backend not in run.name else run.name


def _colors(comparison: Comparison) -> list[tuple[Run, str]]:
    by_run = (
        (comparison.stock, _STOCK_COLOR),
        (comparison.torch_fused, _TORCH_FUSED_COLOR),
        (comparison.fused, _FUSED_COLOR),
    )
    return [(run, color) for run, color in by_run if run is not None]


def _running_mean(losses: Sequence[float], window: int) -> list[float]:
    """For each iteration with so many before it, itself included, their mean."""
    return [sum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)]


def _plot_losses(axes: Axes, comparison: Comparison) -> None:
    total = len(comparison.stock.losses)
    by_epoch = comparison.epochs >= _FEWEST_EPOCHS
    middles = [(epoch + 0.5) * total / comparison.epochs for epoch in range(comparison.epochs)]
    window = max(1, total // 10)
    moved = f"{comparison.stock.name}, one weight moved by one ulp"
    curves: list[tuple[Run | Moved, str, str]] = [(run, color, _label(run)) for run, color in _colors(comparison)]
    curves.append((comparison.moved, _MOVED_COLOR, moved))
    # Wide pale marks stay visible under narrow ones where curves coincide.
    for number, (run, color, label) in enumerate(curves):
        if run is not comparison.stock:
            label += f": at most {comparison.largest_loss_difference(run):.3f} apart"
        width, size = 2.2 / 1.5**number, 11.0 - 2.5 * number
        axes.plot(range(1, total + 1), run.losses, color=color, alpha=0.3, linewidth=width)
        if by_epoch:
            means = comparison.epoch_losses(run)
            axes.plot(middles, means, "o-", color=color, linewidth=1.6 * width, markersize=size, label=label)
        else:
            smooth = _running_mean(run.losses, window)
            mark = "o" if len(smooth) == 1 else ""
            axes.plot(range(window, total + 1), smooth, f"{mark}-", color=color, linewidth=1.6 * width, label=label)
    means_of = "each epoch" if by_epoch else f"the last {window}"
    axes.set(title=f"Training loss: every iteration, and the mean of {means_of}", xlabel="iteration", yscale="log")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize="small")


def _plot_times(axes: Axes, comparison: Comparison) -> None:
    for run, color in _colors(comparison):
        steps = range(run.excluded_steps + 1, len(run.optimizer_ms) + 1)
        axes.plot(steps, run.timed_ms, ".", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
        axes.axhline(run.median_ms, color=color, linewidth=1.5, label=f"{_label(run)}: median {run.median_ms:.2f} ms")
    # A machine that pauses now and then must not flatten the rest.
    highest = 1.6 * max(run.p90_ms for run in comparison.timed)
    axes.set(
        title="Optimizer time per step: unscale, clip, step, zero_grad",
        xlabel="optimizer step",
        ylabel="ms",
        ylim=(0, highest),
    )
    axes.legend(frameon=False, loc="upper right", fontsize="small")


def _headline(comparison: Comparison) -> str:
    found = (comparison.ratio("optimizer", comparison.fused, against) for against in comparison.timed[:-1])
    ratios = " and ".join(str(ratio) for ratio in found if ratio is not None)
    return f"the optimizer's part of a step is {ratios}" if ratios else "the losses disagree"


def save_figure(comparison: Comparison, path: Path, source: str = "") -> None:
    """Draw the loss curves and the optimizers' times as a PNG.

    Args:
        comparison: what to draw.
        path: of the PNG.
        source: a note for the file's metadata on what it is made from.
    """
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, comparison)
    _plot_times(right, comparison)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"{one_line(comparison.config)}, {comparison.fused.name}:\n{_headline(comparison)}",
        fontweight="bold",
        fontsize="medium",
    )
    environment = comparison.environment
    figure.supxlabel(
        f"{environment['device']}, {environment['threads']} threads, {environment['cpu_capability']}, torch "
        f"{environment['torch']}, fusedopt {environment['fusedopt']}; times without the first "
        f"{comparison.stock.excluded_steps} steps",
        fontsize="small",
        color="gray",
    )
    figure.savefig(path, dpi=150, metadata={"Source": source} if source else None)
