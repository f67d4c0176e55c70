"""The examples that need no trainer, and the table of all of them. Those of trainers are tested in tests/trainers."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = REPOSITORY / "examples"


def test_the_table_has_each_example_with_the_command_of_its_docstring() -> None:
    table = re.findall(r"^\| `(.*?)` \| \S", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    files = [path for path in EXAMPLES.glob("*.py") if path.name != "__init__.py"]
    shown = {path.name: re.search(r"^    (\S.*)$", path.read_text(), re.MULTILINE) for path in files}
    assert all(shown.values())
    assert sorted(table) == sorted(found[1].partition(" [")[0] for found in shown.values() if found)


def test_each_example_is_run_by_a_test() -> None:
    tests = "\n".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    for path in EXAMPLES.glob("*_digits.py"):
        assert path.name in tests or path.stem in tests, path


class TestExamples:
    @pytest.fixture(autouse=True)
    def _needs_the_digits(self) -> None:
        pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")

    def test_a_plain_loop(self, capsys: pytest.CaptureFixture[str]) -> None:
        runpy.run_path(str(EXAMPLES / "plain_digits.py"), run_name="__main__")
        *epochs, result = capsys.readouterr().out.splitlines()
        assert len(epochs) == 6
        assert float(result.split()[-1].rstrip("%")) > 90

    @pytest.mark.slow
    def test_distributed_data_parallel(self) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        done = subprocess.run(
            [sys.executable, *launch, str(EXAMPLES / "ddp_digits.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *epochs, result = done.stdout.splitlines()
        assert len(epochs) == 6
        accuracy, rest = result.removeprefix("accuracy: ").split("; ")
        assert float(accuracy.rstrip("%")) > 90
        assert rest == "2 processes with the same weights"

    def test_without_torchrun_it_says_how_to_start_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node 2 examples/ddp_digits\.py"):
            runpy.run_path(str(EXAMPLES / "ddp_digits.py"), run_name="__main__")
