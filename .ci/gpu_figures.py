"""What the microbenchmark (benchmarks/gpu) and ncu have measured, as short tables; with the standard library alone."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

#: Reasons of warps to wait that are shown of each kernel.
STALLS = 3
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


def seconds(value: float | None) -> str:
    """With a unit."""
    return "" if value is None else f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"


def readable(figures: Callable[[], str]) -> str:
    """Figures, or why they cannot be read: that must not cost the report."""
    try:
        return figures()
    except Exception as error:
        return f"cannot be read: {type(error).__name__}: {error}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON a line; the last line may be cut off."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _percent(record: dict[str, Any] | None) -> str:
    return f"{record['of_copy']:.1%}" if record else ""


def bandwidth_summary(records: list[dict[str, Any]]) -> str:
    """The references, then a row per rule and dtypes: full steps by chunk size, and the variants at the best size."""
    if not records:
        return ""
    ours = [record for record in records if "chunk" in record]
    copies = [record for record in records if "rule" not in record]
    by_hand = [record for record in records if record not in ours and record not in copies]
    lines = []
    if copies:
        lines.append(f"The copy moves {copies[0]['gigabytes_per_second']:.0f} GB/s, which is 100 %.")
        lines += [f"- {record['what']}: {_percent(record)}" for record in copies[1:]]
    if by_hand:
        best = max(by_hand, key=lambda record: record["of_copy"])
        lines.append(f"- the fastest of {len(by_hand)} updates {best['what']}: {_percent(best)}")
    chunks = sorted({record["chunk"] for record in ours})
    rows = []
    for rule, dtype in dict.fromkeys((record["rule"], record["dtype"]) for record in ours):
        found = {
            (record["chunk"], record["what"]): record
            for record in ours
            if (record["rule"], record["dtype"]) == (rule, dtype)
        }
        full = [found.get((chunk, "full, early")) for chunk in chunks]
        best_chunk = max((record for record in full if record), key=lambda record: record["of_copy"], default=None)
        at = best_chunk["chunk"] if best_chunk else chunks[0]
        variants = ("full", "full, early, forwards", "statistics", "bare")
        rows.append([f"{rule} {dtype}", *map(_percent, full), f"{at // 1024}Ki"])
        rows[-1] += [_percent(found.get((at, what))) for what in variants]
    if rows:
        sizes = [f"full, {chunk // 1024}Ki" for chunk in chunks]
        lines += ["", table(["", *sizes, "best", "not early", "forwards", "statistics", "bare"], rows)]
    return "\n".join(lines)


def read_counters(path: Path) -> list[dict[str, str]]:
    """The rows of ncu's CSV, without what it says of itself and without the row of units."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    begin = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    return [row for row in csv.DictReader(lines[begin:]) if row.get("ID")]


def why_no_counters(path: Path) -> str:
    """The error that ncu ended with, or an empty text."""
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.findall(r"==ERROR== (.*)", text)
    return found[0].strip() if found else ""


def _number(row: dict[str, str], key: str) -> float | None:
    try:
        return float(row.get(key, "").replace(",", ""))
    except ValueError:
        return None


def counter_table(rows: list[dict[str, str]], launches: list[dict[str, Any]]) -> str:
    """Of each kernel that the microbenchmark has announced: bytes per element, those it has to move too, and stalls."""
    lines = []
    for row, launch in zip(rows, launches, strict=False):
        moved = [_number(row, f"dram__bytes_{way}.sum") for way in ("read", "write")]
        share = _number(row, "dram__throughput.avg.pct_of_peak_sustained_elapsed")
        stalls = {found[1]: _number(row, key) or 0.0 for key in row if (found := _STALL.fullmatch(key or ""))}
        worst = sorted(stalls, key=lambda name: -stalls[name])[:STALLS]
        lines.append(
            [
                f"{launch['rule']} {launch['dtype']} {launch['what']}",
                f"{launch['bytes']:g}",
                *("" if value is None else f"{value / launch['elements']:.1f}" for value in moved),
                "" if share is None else f"{share:.0f} %",
                ", ".join(f"{name} {stalls[name]:.1f}" for name in worst),
            ]
        )
    if not lines:
        return ""
    return table(
        ["kernel", "bytes to move", "read", "written", "DRAM", "warps wait for, per instruction issued"], lines
    )
