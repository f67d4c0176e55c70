"""benchmarks/sharded.py: all parts in two processes, the table, and the verdicts."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing

from benchmarks import sharded
from benchmarks.sharded import BARE, FORMER, HALVES, PARTS, case_of, holds, main, ratio_of, table
from fusedopt.bench.contenders import OURS, RIVAL


def content(**changes: Any) -> dict[str, Any]:
    case = {"part": "fsdp2", "workload": "vit-b", "tensors": 3, "parameters": 10**6, "left_out": {}, "floor": 1.5}
    case |= {"rival": RIVAL, "seconds": {OURS: [0.1, 0.2, 0.1], RIVAL: [0.4, 0.6, 0.2]}, "collectives": []}
    return {"cases": [{**case, **changes}]}


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend")
@pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'")
def test_every_part_is_right_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A contender with other parameters than torch's for-loop optimizer has in float64 would be left out."""
    file = tmp_path / "figures.json"
    assert main(["--workload", "5x7", "--rounds", "2", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["rounds"] == 2
    assert (written["environment"]["processes"], written["environment"]["threads"]) == (2, 1)
    cases = {case["part"]: case for case in written["cases"]}
    assert list(cases) == list(PARTS)
    shown = capsys.readouterr().out
    for name, part in PARTS.items():
        left_out = cases[name]["left_out"]
        assert all("not installed" in reason for reason in left_out.values()), left_out
        if importlib.util.find_spec("deepspeed") is None:
            assert set(left_out) == ({"deepspeed"} if name == "offload" else set())
        expected = [*(set(part.contenders) - set(left_out)), *([OURS + BARE, FORMER + BARE] if part.exchange else [])]
        seconds = cases[name]["seconds"]
        assert set(seconds) == set(expected)
        assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
        assert len(cases[name]["collectives"]) == (0 if name == "halves" else 2)
        assert all(0 < spent < whole for whole, spent in cases[name]["collectives"])
        assert f"| {part.title}, 5x7: 5 tensors, 3.5e-05 M" in shown
        assert all(f"| {each} " in shown for each in expected)


def test_a_ratio_is_that_of_the_rounds() -> None:
    (case,) = content()["cases"]
    assert ratio_of(case) == (pytest.approx(3), pytest.approx(2), pytest.approx(4))
    assert ratio_of(case, OURS) == (1, 1, 1)
    assert ratio_of(case, "deepspeed") is None
    (case,) = content(seconds={OURS: [1.0, 1.0], OURS + BARE: [0.25, 0.25], FORMER + BARE: [0.5, 0.5]})["cases"]
    assert ratio_of(case, FORMER + BARE) == (2, 2, 2)


def test_the_table_has_floors_collectives_and_who_is_left_out() -> None:
    collectives = [[0.1, 0.01], [0.2, 0.08], [0.1, 0.02]]
    text = table(content(collectives=collectives, left_out={"deepspeed": "not installed"}))
    assert "| FSDP2, vit-b: 3 tensors, 1 M | fusedopt    | 100 ms | 1 " in text
    assert "3.00 [2.00, 4.00] | 1.5, holds |" in text
    assert "20 ms, 20%" in table(content(collectives=collectives))
    assert text.endswith("\n\n- FSDP2, vit-b: deepspeed is left out: not installed")
    assert "4, broken" in table(content(floor=4.0))


@pytest.mark.parametrize(
    ("changes", "verdict", "code"),
    [
        ({}, True, 0),
        ({"floor": 3.5}, False, 1),
        ({"rival": HALVES}, None, 2),
        ({"seconds": {RIVAL: [0.1, 0.1]}}, None, 2),
        ({"left_out": {"deepspeed": "wrong result: a is off"}}, True, 2),
        ({"left_out": {"deepspeed": "not installed"}}, True, 0),
    ],
)
def test_the_exit_code_is_the_verdict_when_asked_for(
    changes: dict[str, Any], verdict: bool | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spawn(_: Any, arguments: tuple[Any, ...], nprocs: int) -> None:
        Path(arguments[0], "cases.json").write_text(json.dumps(found["cases"]))

    found = content(**changes)
    assert holds(found["cases"][0]) is verdict
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    assert main([]) == 0
    assert main(["--check"]) == code


def test_a_workload_has_a_name_or_sizes() -> None:
    assert case_of("vit-b").parameters > 8 * 10**7
    assert case_of("3x5").shapes == {f"vectors.{i}": (5,) for i in range(3)}
    with pytest.raises(SystemExit):
        sharded.main(["--workload", "vit-x"])
