"""What a comparison shows in a terminal: progress and a table; and its JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .compare import Listener
from .comparison import LOSS_TOLERANCE, Comparison
from .rows import remarks, rows

__all__ = ["print_comparison", "save_json", "show_progress"]


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
        task = progress.add_task("training all")

        def move_bar(done: int, total: int, stock_loss: float, fused_loss: float) -> None:
            description = f"loss: stock {stock_loss:.4f}, fused {fused_loss:.4f}"
            progress.update(task, completed=done, total=total, description=description)

        yield move_bar


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the figures side by side, and what they mean. No ratio is given where the losses disagree."""
    table = Table(title=escape(f"{comparison.config}, {comparison.environment['device']}, epochs: {comparison.epochs}"))
    headings, sections = rows(comparison)
    for column, heading in enumerate(headings):
        if column:
            table.add_column(escape(heading), justify="right", max_width=10)
        else:
            table.add_column("", width=24)  # five columns fit a terminal of 80 characters
    for section in sections:
        for row in section:
            table.add_row(*map(escape, row))
        table.add_section()
    console.print(table)
    for remark in remarks(comparison):
        console.print(remark, markup=False)
    if not comparison.agrees:
        console.print(
            f"[bold red]The mean losses of an epoch differ by more than {LOSS_TOLERANCE}, or are not finite: no "
            "ratio is given.[/bold red]"
        )
    for against in comparison.timed[:-1]:
        ratio = comparison.ratio("optimizer", comparison.fused, against)
        if ratio is not None:
            console.print(
                f"[bold]The optimizer's part of a step: {comparison.fused.name} is {ratio}[/bold] "
                f"(80 % of the steps: {ratio.p10:.2f} to {ratio.p90:.2f} times)"
            )


def save_json(comparison: Comparison, path: Path) -> None:
    """Write every figure, with versions and seeds."""
    path.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n", encoding="utf-8")
