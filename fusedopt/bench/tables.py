"""Results as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .contenders import CONTENDERS, OURS
from .run import Result

__all__ = ["case_table", "markdown", "times"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, padded so that it is also readable as plain text."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def times(seconds: float) -> str:
    """A time with three digits and a unit, such as ``'56.9 ms'``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = float(f"{seconds * factor:.3g}")
        if value >= 1 or unit == "µs":
            return f"{value:g} {unit}"
    raise AssertionError


def _bytes(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 1024:.0f} KiB"


def case_table(result: Result) -> str:
    """One case: a headline, a row for each contender, fastest first, and the contenders that were left out."""
    case = result.case
    rounds = min((len(times.total) for times in result.times.values()), default=0)
    groups = f"{len(case.groups)} group{'s' if len(case.groups) > 1 else ''}"
    lines = [
        f"{case.name}: {len(case.shapes):,} tensors in {groups}, {case.parameters:,} parameters, "
        f"{case.bytes_per_parameter} bytes each to move; {'warm' if case.warm else 'cold'} caches, {rounds} rounds",
        "",
    ]
    if result.times:
        base = OURS if OURS in result.times else next(iter(result.times))
        large = bool(result.bandwidth)
        on_gpu = case.device == "cuda"
        head = ["contender", "median", "p10 – p90", f"× {base} [95 %]"]
        head += ["GB/s", "of the memory's"] * large + ["host"] * on_gpu + ["extra memory"]
        rows = []
        for name in sorted(result.times, key=lambda name: result.seconds(name).median):
            took, (ratio, interval) = result.seconds(name), result.ratio(name, base)
            row = [
                name + (" (approximate)" if CONTENDERS[name].approximate else ""),
                times(took.median),
                f"{times(took.p10)} – {times(took.p90)}",
                "1" if name == base else f"{ratio.median:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]",
            ]
            if large:
                row += [f"{result.bytes_per_second(name) / 1e9:.1f}", f"{result.share_of_bandwidth(name):.0%}"]
            if on_gpu:
                host = sorted(result.times[name].host)
                row.append(times(host[len(host) // 2]))
            rows.append([*row, _bytes(result.extra_memory.get(name))])
        lines.append(markdown(head, rows))
    lines += [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    return "\n".join(lines)
