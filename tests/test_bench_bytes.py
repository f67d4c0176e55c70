"""benchmarks/fewer_bytes.py: its rows are what they are called, its bytes those that there are, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import (
    _one_thread,  # noqa: F401  a fixture
    _short_collections,  # noqa: F401  a fixture
)

from benchmarks import fewer_bytes
from benchmarks.fewer_bytes import FLOAT32, ROWS, TORCH, Lerped, held, main, table
from benchmarks.kept import KEPT, OnPrecision
from benchmarks.pages import Results, fewer
from fusedopt.backends import NativeBackend
from fusedopt.bench import CONTENDERS, Case
from fusedopt.bench.contenders import initial_tensors
from fusedopt.bench.workloads import uniform

if NativeBackend.unavailable(torch.device("cpu")) is not None:
    pytest.skip("the compiled module is not built", allow_module_level=True)

OURS = [name for name, (kind, _) in ROWS.items() if issubclass(kind, OnPrecision)]
FAST = [*OURS, TORCH, "torch fused, bf16"]


def made(name: str, elements: int = 4096) -> Any:
    kind, dtype = ROWS[name]
    case = Case("bytes", dtype=dtype, custom=lambda: uniform(2, elements))
    contender = kind(case, {key: grad for key, _, grad in initial_tensors(case)})
    contender()
    return contender


@pytest.mark.parametrize("name", OURS)
def test_bytes_that_are_counted_are_those_of_the_tensors(name: str) -> None:
    contender = made(name)
    kind, _ = ROWS[name]
    found = held(contender) - 4 / 4096  # the step counts
    assert found == pytest.approx(kind.precise.held(contender.case) + 4 * (kind is Lerped), rel=1e-6)
    count = getattr(contender.optimizer, "bytes_per_parameter", None)
    if count is not None and kind is not Lerped:
        memory = count()
        assert memory.held == pytest.approx(held(contender), rel=1e-3)
        assert memory.moved_full == pytest.approx(kind.bytes_moved(contender.case), rel=2e-3)


def test_settings_are_those_of_the_name() -> None:
    for name, precise in KEPT.items():
        if "master" in precise.settings:
            assert f"master {precise.settings['master']}, {precise.settings['state_dtype']} states" in ROWS
        assert precise.description == CONTENDERS[f"fusedopt-{name}"].description.removeprefix("fusedopt with ")
    chance = [name for name in OURS if "by chance" in name]
    assert all(made(name, 64).optimizer.stochastic_rounding for name in chance)
    assert made("master split8, int8 states", 64).optimizer.master == "split8"
    assert KEPT["split8-int8"].held(Case("64x1Mi", dtype="bf16")) < 7.2
    assert KEPT["split-int8"].held(Case("64x1Mi", dtype="bf16")) < 8.2


def test_an_average_in_the_pass_is_that_of_a_pass_of_its_own() -> None:
    inside, outside = made("float32, average in the pass"), made("float32, then torch lerp")
    for _ in range(3):
        inside()
        outside()
    for param, average in zip(inside.params.values(), outside.averages, strict=True):
        # The first update of one in the pass is a copy.
        torch.testing.assert_close(inside.optimizer.state[param]["ema"], average, rtol=0.1, atol=0.02)


def test_a_run_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "epyc-2core-bytes.json"
    names = [argument for name in FAST for argument in ("--case", name)]
    main(["--tensors", "2", "--elements", "4096", "--rounds", "2", "--threads", "1", "--out", str(out), *names])
    content = json.loads(out.read_text())
    assert [row["name"] for row in content["rows"]] == FAST
    assert "commit" in content["environment"]
    assert {len(row["seconds"]) for row in content["rows"]} == {2}
    printed = capsys.readouterr().out
    assert [name for name in FAST if f"| {name} " not in printed] == []
    page = fewer(Results(tmp_path))
    assert page.endswith(table(content))
    assert "2 tensors of 4,096 elements" in page


def test_the_table() -> None:
    def row(name: str, seconds: float, moved: float | None) -> dict[str, Any]:
        return {"name": name, "held": 12.0, "freed": 4.0, "moved": moved, "seconds": [seconds] * 3}

    content = {
        "tensors": 10,
        "elements": 10**6,
        "rounds": 3,
        "moved_by_probe": 10**9,
        "probe_seconds": [0.1] * 3,
        "rows": [row(TORCH, 0.2, 48.0), row(FLOAT32, 0.04, 32.0), row("torchao, 8-bit states", 0.4, None)],
        "left_out": {"somebody": "is not here"},
        "instructions": {FLOAT32: 3.25},
    }
    text = table(content)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    assert lines[0][-1] == "instructions per element"
    assert lines[2][1:] == ["12", "8", "48", "200 ms", "0.20 [0.20, 0.20]", "1.00 [1.00, 1.00]", "24%", "–"]
    assert lines[3][3:] == ["32", "40 ms", "1.00 [1.00, 1.00]", "5.00 [5.00, 5.00]", "80%", "3.2"]
    assert lines[4][3:] == ["–", "400 ms", "0.10 [0.10, 0.10]", "0.50 [0.50, 0.50]", "–", "–"]
    assert "The memory moves 10 GB/s." in text
    assert text.endswith("- left out: somebody: is not here")


def test_a_wrong_result_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(fewer_bytes.Plain):
        def step(self) -> None:
            self.optimizer.zero_grad()

    monkeypatch.setitem(ROWS, "int8 states", (Wrong, "fp32"))
    content = fewer_bytes.measure([FLOAT32, "int8 states"], 1, 256, 2)
    assert [row["name"] for row in content["rows"]] == [FLOAT32]
    assert content["left_out"]["int8 states"].startswith("wrong result")


def test_instructions_are_those_that_callgrind_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {FLOAT32: 3 * 512 * 5, "int8 states": 3 * 512 * 20}

    def run(command: list[str], **_: Any) -> None:
        out = next(word.partition("=")[2] for word in command if word.startswith("--callgrind-out-file="))
        name, elements, steps = command[command.index("--child") + 1 :]
        assert (elements, steps) == ("512", "3")
        Path(out).write_text(f"events: Ir\nsummary: {counts[name]}\n\ntotals: {counts[name]}\n", encoding="utf-8")

    monkeypatch.setattr(fewer_bytes.subprocess, "run", run)
    names = [TORCH, FLOAT32, "bf16 parameters", "int8 states"]
    assert fewer_bytes.measure_instructions(names, 512) == {FLOAT32: 5.0, "int8 states": 20.0}
    assert set(fewer_bytes.COUNTED) <= set(OURS)
    counts[FLOAT32] = 0
    with pytest.raises(RuntimeError, match="callgrind saw no StepPlan::step"):
        fewer_bytes.measure_instructions(names, 512)


def test_the_process_that_is_counted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(fewer_bytes.Plain, "step", lambda self: steps.append(self.case.recipe))
    main(["--child", FLOAT32, "64", "3"])
    assert steps == ["bare"] * 3
