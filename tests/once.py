"""What is made once for all workers of a run: processes whose start takes longest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["once"]


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` has filled: in the first worker that gets here, while the others wait for it.

    Args:
        tmp_path_factory: pytest's.
        name: of the folder, another for each use.
        make: is given the folder.
    """
    import fcntl  # of Unix

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which all workers have
    folder = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / f"{name}.done").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (root / f"{name}.done").touch()
    return folder
