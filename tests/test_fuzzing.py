"""A short run of each harness in fuzz/; see SECURITY.md for long ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.full
@pytest.mark.parametrize("target", ["checkpoints", "configs", "state_dicts"])
def test_no_input_is_found_that_should_not_be(target, tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: pip install 'fusedopt[fuzz]'")
    arguments = [sys.executable, "-m", "fuzz", target, "--seconds", "20", "--folder", str(tmp_path)]
    run = subprocess.run(arguments, cwd=TESTS, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0 and "DONE" in run.stderr, run.stderr[-3000:]
