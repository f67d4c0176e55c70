"""The figures of a comparison side by side, as the rows of a table, and the remarks below it."""

from __future__ import annotations

from collections.abc import Callable

from .comparison import Comparison, Moved, Run

__all__ = ["remarks", "rows"]

Row = list[str]


def rows(comparison: Comparison) -> tuple[Row, list[list[Row]]]:
    """The headings, and the rows of each section: losses, times and memory, what ran."""
    stock, timed = comparison.stock, comparison.timed
    everyone: list[Run | Moved] = [*timed, comparison.moved]

    losses: list[Row] = [
        ["training loss, last epoch", *(f"{comparison.epoch_losses(run)[-1]:.4f}" for run in everyone)],
        *([f"validation {name}", *(f"{run.metrics[name]:.4f}" for run in everyone)] for name in stock.metrics),
        [
            f"largest loss difference from {stock.name}",
            *("" if run is stock else f"{comparison.largest_loss_difference(run):.4f}" for run in everyone),
        ],
    ]

    def times(label: str, value: Callable[[Run], float], part: str | None = None) -> list[Row]:
        found = [[label, *(f"{value(run):.2f}" for run in timed), ""]]
        if part is not None:
            found += [
                [f"times as fast as {against.name}", *(_against(comparison, part, run, against) for run in timed), ""]
                for against in timed[:-1]
            ]
        return found

    costs = [
        *times("optimizer ms per step, median", lambda run: run.median_ms, "optimizer"),
        *times("optimizer ms per step, p90", lambda run: run.p90_ms),
        *times("whole step ms, median", lambda run: run.median_step_ms, "whole step"),
        ["optimizer's share of the whole step", *(f"{run.share:.1%}" for run in timed), ""],
        ["extra memory of the optimizer, MiB", *(_mebibytes(run) for run in timed), ""],
    ]
    ran = [
        ["backend", *(run.backend for run in timed), ""],
        ["param groups", *(str(run.param_groups) for run in timed), ""],
    ]
    return ["", *(run.name for run in timed), "start moved by one ulp"], [losses, costs, ran]


def remarks(comparison: Comparison) -> list[str]:
    """What was timed, which run or ratio is missing and why, and what the differences of losses mean."""
    stock, other, moved = comparison.stock, comparison.torch_fused, comparison.moved
    found = [
        "Optimizer: everything after backward (unscale, clip, step, scaler update, zero_grad), over "
        f"{len(stock.timed_ms)} steps without the first {stock.excluded_steps}. Ratios are medians of paired steps."
    ]
    if comparison.no_torch_fused is not None:
        found.append(f"No run with torch's fused=True: {comparison.no_torch_fused}.")
    elif other is not None and not comparison.agree(other):
        found.append(f"No ratio against {other.name}: its losses are not those of {stock.name}.")

    apart = [f"{comparison.largest_loss_difference(run):.4f} for {run.name}" for run in reversed(comparison.timed[1:])]
    found.append(
        f"Largest difference of the losses of one iteration from those of {stock.name}: {', '.join(apart)}; "
        f"{comparison.largest_loss_difference(moved):.4f} for {stock.name} itself when one weight of its start (in "
        f"{moved.parameter or 'no parameter: all are zero'}) is moved by one ulp. "
        "The last figure is the noise floor, the effect of rounding after one bit has changed: smaller differences are "
        "not meaningful."
    )
    return found


def _against(comparison: Comparison, part: str, run: Run, against: Run) -> str:
    if run is against:
        return "1"
    forwards, backwards = comparison.ratio(part, run, against), comparison.ratio(part, against, run)
    if forwards is not None:
        return f"{forwards.median:.2f}"
    return "-" if backwards is None else f"{1 / backwards.median:.2f}"


def _mebibytes(run: Run) -> str:
    return "n/a" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:.1f}"
