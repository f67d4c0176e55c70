"""What a comparison shows: progress, a table, a figure and a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .compare import LOSS_TOLERANCE, Comparison, Listener, Run

__all__ = ["print_comparison", "save_figure", "save_json", "show_progress"]

_STOCK_COLOR, _FUSED_COLOR = "#8a8f98", "#d1495b"


@contextmanager
def show_progress(console: Console) -> Iterator[Listener]:
    """A listener that shows progress: a bar on a terminal, else ten plain lines."""
    if not console.is_terminal:

        def print_line(done: int, total: int, stock_loss: float, fused_loss: float) -> None:
            if done == total or done % max(1, total // 10) == 0:
                console.print(f"iteration {done}/{total}  loss: stock {stock_loss:.4f}, fused {fused_loss:.4f}")

        yield print_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training both")

        def move_bar(done: int, total: int, stock_loss: float, fused_loss: float) -> None:
            description = f"loss: stock {stock_loss:.4f}, fused {fused_loss:.4f}"
            progress.update(task, completed=done, total=total, description=description)

        yield move_bar


def _mebibytes(run: Run) -> str:
    return "n/a" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:.1f}"


def _speed(ratio: float) -> str:
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the figures side by side, and what they mean. No speed-up is given where the losses disagree."""
    stock, fused = comparison.stock, comparison.fused
    losses = [comparison.epoch_losses(run)[-1] for run in (stock, fused)]
    table = Table(title=escape(f"{comparison.config}, {comparison.environment['device']}, epochs: {comparison.epochs}"))
    table.add_column("")
    for heading in (stock.optimizer, fused.optimizer, "fused vs. stock"):
        table.add_column(heading, justify="right")
    table.add_row("training loss, last epoch", *(f"{loss:.4f}" for loss in losses), f"{losses[1] - losses[0]:+.4f}")
    for name, value in stock.metrics.items():
        other = fused.metrics[name]
        table.add_row(f"validation {name}", f"{value:.4f}", f"{other:.4f}", f"{other - value:+.4f}")
    table.add_section()
    for label, name in (
        ("optimizer ms per step, median", "median_ms"),
        ("optimizer ms per step, p90", "p90_ms"),
        ("whole step ms, median", "median_step_ms"),
    ):
        values = getattr(stock, name), getattr(fused, name)
        ratio = _speed(values[0] / values[1]) if comparison.agrees else "-"
        table.add_row(label, *(f"{value:.2f}" for value in values), ratio)
    table.add_row("optimizer's share of the whole step", f"{stock.share:.1%}", f"{fused.share:.1%}", "")
    table.add_row("extra memory of the optimizer, MiB", _mebibytes(stock), _mebibytes(fused), "")
    table.add_section()
    table.add_row("backend", stock.backend, fused.backend, "")
    table.add_row("param groups", str(stock.param_groups), str(fused.param_groups), "")
    console.print(table)
    steps, excluded = len(stock.timed_ms), stock.excluded_steps
    console.print(
        f"Optimizer: everything after backward (unscale, clip, step, scaler update, zero_grad), over {steps} steps "
        f"without the first {excluded}. Largest difference of the losses of one iteration: "
        f"{comparison.largest_loss_difference:.4f}."
    )
    if comparison.agrees:
        console.print(
            f"[bold]Speed-up of the optimizer: {comparison.speed_up:.2f}x[/bold] (median of {steps} paired steps; "
            f"80 % of them lie within {comparison.speed_up_p10:.2f}x and {comparison.speed_up_p90:.2f}x)"
        )
    else:
        console.print(
            f"[bold red]The mean losses of an epoch differ by more than {LOSS_TOLERANCE}, or are not finite: no "
            "speed-up is given.[/bold red]"
        )


def save_json(comparison: Comparison, path: Path) -> None:
    """Write every figure, with versions and seeds."""
    path.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")


def _label(run: Run) -> str:
    return f"{run.optimizer} ({run.backend})"


def _plot_losses(axes: Axes, comparison: Comparison) -> None:
    total = len(comparison.stock.losses)
    middles = [(epoch + 0.5) * total / comparison.epochs for epoch in range(comparison.epochs)]
    # The wide pale marks of the stock run stay visible under the narrow ones of the fused run where both coincide.
    for run, color, width, size in (
        (comparison.stock, _STOCK_COLOR, 2.0, 11.0),
        (comparison.fused, _FUSED_COLOR, 0.7, 5.0),
    ):
        axes.plot(range(1, total + 1), run.losses, color=color, alpha=0.35, linewidth=width)
        axes.plot(
            middles,
            comparison.epoch_losses(run),
            "o-",
            color=color,
            linewidth=2 * width,
            markersize=size,
            label=_label(run),
        )
    axes.set(title="Training loss: every iteration, and the mean of each epoch", xlabel="iteration", yscale="log")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)


def _plot_times(axes: Axes, comparison: Comparison) -> None:
    excluded = comparison.stock.excluded_steps
    for run, color in ((comparison.stock, _STOCK_COLOR), (comparison.fused, _FUSED_COLOR)):
        steps = range(excluded + 1, len(run.optimizer_ms) + 1)
        axes.plot(steps, run.timed_ms, ".", color=color, markersize=4, alpha=0.7, markeredgewidth=0)
        axes.axhline(run.median_ms, color=color, linewidth=1.5, label=f"{_label(run)}: median {run.median_ms:.2f} ms")
    # A machine that pauses now and then must not flatten the rest.
    highest = 1.5 * max(comparison.stock.p90_ms, comparison.fused.p90_ms)
    axes.set(
        title="Optimizer time per step: unscale, clip, step, zero_grad",
        xlabel="optimizer step",
        ylabel="ms",
        ylim=(0, highest),
    )
    axes.legend(frameon=False, loc="upper right")


def save_figure(comparison: Comparison, path: Path) -> None:
    """Draw the loss curves and the optimizer's times as a PNG."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_losses(left, comparison)
    _plot_times(right, comparison)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    outcome = f"optimizer {_speed(comparison.speed_up)}" if comparison.agrees else "the losses disagree"
    figure.suptitle(f"{comparison.config}: {outcome}", fontweight="bold")
    environment = comparison.environment
    figure.supxlabel(
        f"{environment['device']}, {environment['threads']} threads, {environment['cpu_capability']}, torch "
        f"{environment['torch']}, fusedopt {environment['fusedopt']}; times without the first "
        f"{comparison.stock.excluded_steps} steps",
        fontsize="small",
        color="gray",
    )
    figure.savefig(path, dpi=150)
