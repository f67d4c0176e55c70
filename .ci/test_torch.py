"""Runs the core tests under another release of torch, or another Python, in a virtual environment of their own.

    python3 .ci/test_torch.py --torch 2.11 --python python3.12 tests/test_steps.py

It leaves .venv and the checkout alone: a copy of the sources is built there, without CUDA and against that torch. What
pip is configured with decides where packages come from, so its variables choose another index, such as one with CPU
builds. The last line is a row for docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = (
    *("setuptools>=77", "wheel", "cmake>=3.18", "ninja"),
    *("numpy", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "tomli; python_version < '3.11'"),
    *("PyYAML", "safetensors", "rich", "scikit-learn", "matplotlib"),
)
#: What a copy of the sources leaves out: what is made, at the top or anywhere.
MADE = {".git", ".venv", "build", "dist", "work_dirs"}
MADE_ANYWHERE = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*_cache", ".hypothesis", ".benchmarks")


class Failure(Exception):
    """A step before the tests did not work; the message is for the table."""


class Counts(NamedTuple):
    """What came of the tests."""

    passed: int
    failed: int
    skipped: int

    @classmethod
    def read(cls, path: Path) -> Counts:
        """Add up the suites of a JUnit XML."""
        suites = ElementTree.parse(path).getroot().iter("testsuite")
        total, failed, skipped = 0, 0, 0
        for suite in suites:
            total += int(suite.get("tests", 0))
            failed += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            skipped += int(suite.get("skipped", 0))
        return cls(total - failed - skipped, failed, skipped)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def run(command: Sequence[object], failure: str, cwd: Path = ROOT, **environment: str) -> None:
    """Run a command, whose output is shown.

    Raises:
        Failure: with ``failure`` as its message, if the exit code is not 0.
    """
    words = [str(word) for word in command]
    if subprocess.run(words, cwd=cwd, env={**os.environ, **environment}, check=False).returncode != 0:
        raise Failure(failure)


def output(*command: object) -> str:
    """What a command prints, or nothing if it fails."""
    words = [str(word) for word in command]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def python_version(python: str) -> str:
    """The version of an interpreter, such as 3.12.1.

    Raises:
        SystemExit: there is no such interpreter, or it is older than 3.10.
    """
    found = output(python, "-c", "import platform; print(platform.python_version())")
    if not found:
        raise SystemExit(f"--python {python}: does not run; expected an interpreter such as python3.12")
    if tuple(map(int, found.split(".")[:2])) < (3, 10):
        raise SystemExit(f"--python {python}: Python >= 3.10 is needed, this is {found}")
    return found


def commit() -> str:
    """The commit of the checkout, with a plus if files differ from it."""
    found = output("git", "rev-parse", "--short=9", "HEAD") or "unknown"
    return found + "+" * bool(output("git", "status", "--porcelain", "--untracked-files=no"))


def copy_sources(tree: Path) -> None:
    """Copy what is not made. Times of change are kept, so that a second build compiles only what has changed."""
    shutil.rmtree(tree, ignore_errors=True)

    def left_out(folder: str, names: list[str]) -> set[str]:
        return MADE_ANYWHERE(folder, names) | (MADE & set(names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, tree, ignore=left_out)


def install(folder: Path, python: str, torch: str) -> Path:
    """Make the environment, or complete it; return its interpreter."""
    here = folder / "venv" / "bin" / "python"
    if not here.exists():
        run([python, "-m", "venv", folder / "venv"], "no virtual environment")
    pip = [here, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    release = torch if torch.count(".") > 1 else f"{torch}.*"
    run([*pip, f"torch=={release}"], f"pip installs no torch {torch} for this Python")
    run([*pip, *TOOLS], "the tools of the tests cannot be installed")
    return here


def test(folder: Path, python: Path, arguments: Sequence[str]) -> Counts:
    """Build a copy of the sources, and run pytest in it."""
    tree, report = folder / "tree", folder / "junit.xml"
    copy_sources(tree)
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    settings = {"FUSEDOPT_CUDA": "0", "FUSEDOPT_BUILD_DIR": str(folder / "cmake"), "PATH": path}
    run([python, tree / "csrc" / "build.py"], "fusedopt does not build", cwd=tree, **settings)
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={report}", *arguments]
    words = [str(word) for word in command]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive", "PATH": path}
    subprocess.run(words, cwd=tree, env=environment, check=False)
    if not report.exists():
        raise Failure("pytest stopped before the tests")
    return Counts.read(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Install, build, test and print the row; return 0 if tests ran and none failed, else 1."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0], epilog="Everything else is for pytest."
    )
    parser.add_argument("--torch", required=True, metavar="X.Y", help="release of torch, such as 2.11 or 2.11.0")
    parser.add_argument("--python", default=sys.executable, metavar="PYTHON", help="default: the one that runs this")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "versions", help="for environments and builds; gigabytes each"
    )
    arguments, rest = parser.parse_known_args(argv)
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", arguments.torch):
        raise SystemExit(f"--torch {arguments.torch}: expected a release such as 2.11 or 2.11.0")
    version = python_version(arguments.python)
    minor = ".".join(version.split(".")[:2])
    folder = arguments.folder.resolve() / f"torch-{arguments.torch}-python-{minor}"
    folder.mkdir(parents=True, exist_ok=True)
    torch, counts, tested = arguments.torch, None, commit()
    try:
        here = install(folder, arguments.python, arguments.torch)
        torch = output(here, "-c", "import torch; print(torch.__version__)")
        if not torch:
            raise Failure("torch is installed but does not import")
        tested = commit()  # the checkout may change while the tests of the copy run
        counts = test(folder, here, rest)
        outcome = str(counts)
    except Failure as failure:
        torch, outcome = torch or arguments.torch, str(failure)
    day = datetime.datetime.now(datetime.timezone.utc).date()
    print(f"| {torch} | {version} | {outcome} | {day} | `{tested}` |")
    return 0 if counts is not None and counts.passed and not counts.failed else 1


if __name__ == "__main__":
    sys.exit(main())
