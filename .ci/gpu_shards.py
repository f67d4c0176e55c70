"""Runs pytest in several processes at once, each with a share of the tests, and merges what they report.

For the tests in .ci/gpu, each of which leaves most of a GPU idle, and all processors but one. Triton compiles every
variant of a kernel on its first use, which takes a second or so, so a share is a run of neighbours, which need the same
kernels. With --deal the tests are dealt in turns instead, which shares long ones out more evenly.

In the processes this is a plugin of pytest, which keeps their share of the tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_report import merge_junit

SHARE, DEAL = "FUSEDOPT_SHARD", "FUSEDOPT_SHARD_DEAL"
#: Processes, each with torch and a CUDA context, are not started by the dozen.
MOST = 8
#: Seconds to report what was found, after an interrupt; .ci/gpu kills everyone in ten.
GRACE = 7


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep a share of the tests that -m and -k have left."""
    index, count = map(int, os.environ[SHARE].split("/"))
    run = slice(index * len(items) // count, (index + 1) * len(items) // count)
    kept = items[slice(index, None, count) if os.environ.get(DEAL) else run]
    names = {item.nodeid for item in kept}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in names])
    items[:] = kept


def combined(codes: Iterable[int]) -> int:
    """One exit code of pytest for several: a crash, or else failed tests, or else success, or else no tests."""
    codes = {code if code >= 0 else 128 - code for code in codes}
    return max(codes - {0, 1, 5}, default=1 if 1 in codes else 0 if 0 in codes else 5)


def run(count: int, xml: Path, arguments: Sequence[str]) -> int:
    """Run the shares, print what they print, one after the other, and write one XML."""
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        logs, reports = ([Path(folder, f"{index}.{kind}") for index in range(count)] for kind in ("txt", "xml"))
        processes = []
        for index in range(count):
            command = [sys.executable, "-m", "pytest", "-p", "gpu_shards", f"--junit-xml={reports[index]}", *arguments]
            environment = {**os.environ, "PYTHONPATH": path, SHARE: f"{index}/{count}", "OMP_NUM_THREADS": "1"}
            with logs[index].open("wb") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            for process in processes:
                process.wait()
        except KeyboardInterrupt:  # which they have got too
            end = time.monotonic() + GRACE
            for process in processes:
                try:
                    process.wait(max(0.1, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        finally:
            for index, log in enumerate(logs):
                print(f"-- share {index + 1} of {count}\n{log.read_text(errors='replace')}", flush=True)
            merge_junit(reports, xml)
    return combined(process.returncode for process in processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Everything after ``--`` is for pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, help="default: one for two processors, and at most 8")
    parser.add_argument("--deal", action="store_true", help="deal tests in turns, rather than runs of neighbours")
    parser.add_argument("--xml", type=Path, required=True, help="where the merged JUnit XML goes")
    parser.add_argument("arguments", nargs="*", help="pytest's")
    options = parser.parse_args(argv)
    count = options.processes or max(1, min(MOST, len(os.sched_getaffinity(0)) // 2))
    if options.deal:
        os.environ[DEAL] = "1"
    return run(count, options.xml, options.arguments)


if __name__ == "__main__":
    sys.exit(main())
