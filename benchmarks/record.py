"""Figures as JSON: on what they were measured, and with no more digits than a clock has.

``python -m benchmarks.record SOURCE TARGET`` makes such a file of what another program has written.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt.cli.info import info


def git(*arguments: str) -> str:
    """What git prints, or ``'unknown'``."""
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> dict[str, Any]:
    """The commit, and whether the tree was changed. What is being measured does not count as a change."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!benchmarks/results")
    return {"id": git("rev-parse", "--short=9", "HEAD"), "dirty": bool(changes)}


def environment() -> dict[str, Any]:
    """Machine, versions, commit and day."""
    processor = next(line for line in info().splitlines() if line.startswith("processor"))
    return {
        "processor": re.sub(r", \d+ torch threads", "", processor.removeprefix("processor").strip()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def rounded(value: Any, digits: int = 5) -> Any:
    """A value for JSON with every float in it cut to so many digits."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def save(content: dict[str, Any], path: Path) -> None:
    """Write figures; a list of numbers takes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_text(rounded(content)) + "\n", encoding="utf-8")


def _text(value: Any, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = (f"{inner}{json.dumps(str(key))}: {_text(each, inner)}" for key, each in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        return "[\n" + ",\n".join(inner + _text(each, inner) for each in value) + f"\n{indent}]"
    return json.dumps(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description="Cut a JSON of figures to size.")
    parser.add_argument("source", type=Path, help="such as the comparison.json of `fusedopt compare`")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    content = json.loads(arguments.source.read_text(encoding="utf-8"))
    save({**content, "measured": environment()}, arguments.target)


if __name__ == "__main__":
    main()
