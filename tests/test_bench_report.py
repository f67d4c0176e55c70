"""benchmarks/: the report of a run, and the lines through measured times."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the report draws pictures: matplotlib is missing")

from benchmarks import record as records
from benchmarks import report
from benchmarks.fit import LIMIT, fit, longest_line, quote
from fusedopt.compare.comparison import Comparison, Moved, Run


def comparison() -> Comparison:
    """Of two epochs of 10 steps; the optimizers take 20, 10 and 4 of 100, 90 and 80 ms."""
    losses = [1.0] * 20
    stock = Run("AdamW", "for-loop", 80, losses, [20.0] * 20, [100.0] * 20, 2**20, {"accuracy": 0.97})
    other = Run("AdamW", "fused", 80, losses, [10.0] * 20, [90.0] * 20, 2**20, {"accuracy": 0.96})
    fused = Run("FusedAdamW", "native", 80, losses, [4.0] * 20, [80.0] * 20, 0, {"accuracy": 0.98})
    moved = Moved("weight", 1.0, 1.0 + 2**-23, [1.25] * 20, {"accuracy": 0.95})
    environment = {"device": "cpu", "threads": 2, "cpu_capability": "A", "torch": "2", "fusedopt": "0"}
    return Comparison("config.py", 2, 0, environment, stock, fused, moved, other)


def record(group: str, contender: str, seconds: list[float], kind: str = "step", **info: Any) -> dict[str, Any]:
    extra = {"kind": kind, "contender": contender, "bandwidth": [], "extra_memory": 4096, **info}
    return {"group": group, "name": "", "extra_info": extra, "stats": {"data": seconds}}


@pytest.fixture
def bench_json(tmp_path: Path) -> Path:
    case = {"workload": "vit-tiny", "grouping": "each"}
    records = [
        record("vit-tiny/each/adamw/amp-clip", "fusedopt", [0.004, 0.005, 0.006], case=case, bandwidth=[5e10] * 3),
        record("vit-tiny/each/adamw/amp-clip", "torch-fused", [0.008, 0.01, 0.012], case=case, bandwidth=[5e10] * 3),
        *(
            record("", name, [1e-5 + count * slope] * 3, "scaling-tensors-one", parameters=64 * count, tensors=count)
            for name, slope in (("fusedopt", 1e-7), ("torch-fused", 1e-6))
            for count in (1, 10, 100)
        ),
        {
            "group": "config",
            "stats": {"data": [0.08] * 15},
            "extra_info": {"kind": "training", "variant": "fused", "comparison": comparison().as_dict()},
        },
    ]
    machine = {
        "torch": "2",
        "fusedopt": "0",
        "threads": 2,
        "python_version": "3",
        "info": ["processor  A", "rules  sgd"],
    }
    content = {
        "machine_info": machine,
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": records,
    }
    path = tmp_path / "box.json"
    path.write_text(json.dumps(content))
    return path


class TestReport:
    def test_a_page_with_every_table_and_picture(self, bench_json: Path, tmp_path: Path) -> None:
        target = report.write(bench_json, tmp_path / "out", "box")
        text = target.read_text()
        assert text.startswith("# A: fusedopt 0 at abc, 2026-01-02\n")
        assert "2.00 [2.00, 2.00]" in text, "the ratio of the medians of paired rounds"
        assert " ".join(cells(text, "optimizer's share of the whole step")) == "20.0% 11.1% 5.0%"
        assert [cells(text, f"times as fast as torch's {way} AdamW") for way in ("for-loop", "fused")] == [
            ["1", "2.00", "5.00"], ["0.50", "1", "2.50"]
        ]  # fmt: skip
        assert "0.0000 for FusedAdamW, 0.0000 for torch's fused AdamW; 0.2500 for torch's for-loop AdamW itself" in text
        assert "### vit-tiny/each/adamw/amp-clip" in text
        for name in ("box-bandwidth.png", "box-scaling.png"):
            assert f"]({name})" in text
            assert (tmp_path / "out" / name).stat().st_size > 10_000

    def test_bars_leave_no_holes_and_the_line_crosses_no_figure(
        self, bench_json: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(report.plt, "close", lambda figure: None)
        report.draw_bandwidth(report.Report.load(bench_json).results, tmp_path / "bars.png")
        figure = report.plt.gcf()
        [axes] = figure.axes
        ours, torchs = sorted(axes.patches, key=lambda bar: bar.get_y())
        assert torchs.get_y() == ours.get_y() + ours.get_height(), "torch-merged and the others took no part"
        assert [label.get_text() for label in axes.get_yticklabels()] == [
            "ViT-tiny, a group for each\nAdamW, AMP + clip"
        ]
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["fusedopt", "torch fused"]
        [line] = axes.lines
        where = line.get_window_extent().x0
        assert all(text.get_window_extent().x1 < where for text in axes.texts) and len(axes.texts) == 2
        monkeypatch.undo()
        report.plt.close(figure)

    def test_what_is_measured_stands_beside_the_line(self, bench_json: Path) -> None:
        table, lines = report.scaling_tables(report.Report.load(bench_json).curves)
        assert cells(table, "10 ") == ["11 µs", "1,100 ns", "20 µs", "2,000 ns"]
        assert "- torch-fused: 10 µs + 1 µs per tensor, from 1 to 100 tensors, within 0%" in lines

    def test_a_run_of_a_part_is_reported_too(self, bench_json: Path, tmp_path: Path) -> None:
        content = json.loads(bench_json.read_text())
        content["benchmarks"] = content["benchmarks"][:1]
        bench_json.write_text(json.dumps(content))
        text = report.write(bench_json, tmp_path, "part").read_text()
        assert "## A training run" not in text
        assert "part-scaling.png" not in text


def cells(text: str, label: str) -> list[str]:
    """The filled cells of the first row of a table that begins so."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell for each in row.split("|")[2:] if (cell := each.strip())]


class TestLines:
    """A line through measured times is quoted only where it holds."""

    def test_it_finds_a_line(self) -> None:
        found = fit({count: 12.0 + 0.1 * count for count in (1, 50, 400, 1000)})
        assert (found.constant, found.per_count) == pytest.approx((12.0, 0.1))
        assert (found.first, found.last) == (1, 1000)
        assert found.residual == pytest.approx(0.0, abs=1e-9)

    def test_it_weighs_relative_errors(self) -> None:
        found = fit({1: 10.1, 2: 10.2, 500: 50.0, 1000: 130.0})  # 10 + 0.1 * count, but for the large ones
        assert found.constant == pytest.approx(10.0, rel=0.01)  # 6.3 if absolute errors counted

    @pytest.mark.parametrize("costs", [{1: 1.0, 10: 20.0, 100: 210.0}, {1: 3.0, 10: 2.0, 100: 1.0}])
    def test_neither_number_is_negative(self, costs: dict[int, float]) -> None:
        found = fit(costs)
        assert min(found.constant, found.per_count) == 0
        assert found.residual == pytest.approx(max(abs(found.at(count) / cost - 1) for count, cost in costs.items()))

    def test_a_point_that_is_missed_is_left_out(self) -> None:
        costs = {1: 106e-6, 10: 120e-6, 100: 132e-6, 1000: 579e-6, 10_000: 18_400e-6}  # a step with cold caches
        assert fit(costs).residual > LIMIT
        found = longest_line(costs)
        assert found is not None
        assert (found.first, found.last) == (1, 1000)
        assert found.residual == max(abs(found.at(count) / costs[count] - 1) for count in (1, 10, 100, 1000)) < LIMIT
        assert quote(found, "tensor") == "104 µs + 445 ns per tensor, from 1 to 1,000 tensors, within 13%"

    @pytest.mark.parametrize("costs", [{1: 1.0, 10: 5.0}, {1: 1.0, 10: 9.0, 100: 1.0, 1000: 9.0, 10_000: 1.0}])
    def test_there_may_be_none(self, costs: dict[int, float]) -> None:
        assert longest_line(costs) is None
        assert quote(None, "tensor") == "no line meets 3 neighbouring sizes within 25%"

    def test_every_line_of_the_published_run_holds(self) -> None:
        published = report.Report.load(Path(__file__).parents[1] / "benchmarks" / "results" / "epyc-2core.json")
        for contenders in published.curves.values():
            for points in contenders.values():
                line = longest_line(report.medians(points))
                assert line is None or all(
                    abs(line.at(count) / statistics.median(rounds) - 1) <= LIMIT
                    for count, rounds in points
                    if line.first <= count <= line.last
                )


def test_a_record_has_no_more_digits_than_a_clock(tmp_path: Path) -> None:
    content = {"seconds": {1: [0.123456789, 2]}, "cases": [{"name": "a", "moved": 3}], "none": None}
    records.save(content, tmp_path / "new" / "record.json")
    text = (tmp_path / "new" / "record.json").read_text()
    assert json.loads(text) == {"seconds": {"1": [0.12346, 2]}, "cases": [{"name": "a", "moved": 3}], "none": None}
    assert "[0.12346, 2]" in text
    assert {"processor", "torch", "commit", "date"} <= records.environment().keys()
