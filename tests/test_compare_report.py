"""What ``fusedopt compare`` shows: ratios, the table, the JSON, the picture, progress."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest

pytest.importorskip("matplotlib", reason="the demonstration needs the extra fusedopt[demo]: matplotlib is missing")
pytest.importorskip("rich", reason="the demonstration needs the extra fusedopt[demo]: rich is missing")

from matplotlib.axes import Axes
from rich.console import Console

from fusedopt.compare.comparison import LOSS_TOLERANCE, Comparison, Moved, Run
from fusedopt.compare.figure import save_figure
from fusedopt.compare.report import print_comparison, save_json, show_progress


def make_comparison(
    stock_losses: list[float], fused_losses: list[float], epochs: int = 2, torch_fused_losses: list[float] | None = None
) -> Comparison:
    """The stock optimizer takes 4 ms, torch's fused one 3 ms and the fused twin 2 ms, of 20 ms each."""
    steps = len(stock_losses)
    stock = Run(
        "AdamW", "for-loop", 3, stock_losses, ([9.0] * 5 + [4.0] * steps)[:steps], [20.0] * steps, None, {"loss": 0.5}
    )
    fused = dataclasses.replace(
        stock, optimizer="FusedAdamW", backend="native", losses=fused_losses, optimizer_ms=[2.0] * steps
    )
    torch_fused = dataclasses.replace(
        stock, backend="fused", losses=torch_fused_losses or stock_losses, optimizer_ms=[3.0] * steps
    )
    moved = Moved("layer.weight", 1.0, 1.0 + 2**-23, [loss + 0.02 for loss in stock_losses], {"loss": 0.5})
    environment = {"device": "cpu", "threads": 2, "cpu_capability": "any", "torch": "any", "fusedopt": "any"}
    return Comparison("configs/some.py", epochs, 0, environment, stock, fused, moved, torch_fused)


def printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=160))
    return " ".join(stream.getvalue().split())


class TestReport:
    def test_times_leave_out_the_warm_up(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 10)
        assert comparison.stock.excluded_steps == 5
        assert (comparison.stock.median_ms, comparison.stock.p90_ms, comparison.stock.share) == (4.0, 4.0, 0.2)
        assert make_comparison([1.0] * 2, [1.0] * 2).stock.excluded_steps == 1

    def test_every_ratio_says_against_what(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 10)
        stock, other, fused = (run.name for run in comparison.timed)
        assert (stock, other, fused) == ("torch's for-loop AdamW", "torch's fused AdamW", "FusedAdamW")
        found = {(ratio.part, ratio.of, ratio.against): ratio.median for ratio in comparison.ratios}
        assert found == {
            ("optimizer", other, stock): pytest.approx(4 / 3),
            ("optimizer", fused, stock): 2.0,
            ("optimizer", fused, other): 1.5,
            ("whole step", other, stock): 1.0,
            ("whole step", fused, stock): 1.0,
            ("whole step", fused, other): 1.0,
        }
        texts = [ratio["text"] for ratio in comparison.as_dict()["ratios"]]
        assert texts[1:3] == [
            "2.00 times as fast as torch's for-loop AdamW", "1.50 times as fast as torch's fused AdamW"
        ]  # fmt: skip

    def test_a_ratio_is_the_median_of_paired_steps(self):
        comparison = make_comparison([1.0] * 14, [1.0] * 14)
        times = [9.0] * 5 + [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0]
        paired = dataclasses.replace(
            comparison,
            stock=dataclasses.replace(comparison.stock, optimizer_ms=[3 * time for time in times]),
            fused=dataclasses.replace(comparison.fused, optimizer_ms=times),
        )
        ratio = paired.ratio("optimizer", paired.fused, paired.stock)
        assert (ratio.median, ratio.p10, ratio.p90) == (3.0, 3.0, 3.0)

    def test_prints_all_runs(self):
        text = printed(make_comparison([1.0] * 10, [1.0] * 9 + [1.01]))
        assert "FusedAdamW is 2.00 times as fast as torch's for-loop AdamW (80 % of the steps: 2.00 to 2.00" in text
        assert "FusedAdamW is 1.50 times as fast as torch's fused AdamW" in text
        assert "over 5 steps without the first 5" in text
        assert "n/a │ n/a │ n/a │" in text  # memory, where the system does not tell

    def test_differences_stand_beside_what_one_ulp_makes(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 9 + [1.01])
        text = printed(comparison)
        assert "│ 0.0000 │ 0.0100 │ 0.0200 │" in text
        assert "AdamW: 0.0100 for FusedAdamW, 0.0000 for torch's fused AdamW; 0.0200 for torch's for-loop" in text
        assert comparison.as_dict()["largest_loss_difference"] == {
            "against": "torch's for-loop AdamW",
            "torch_fused": 0.0,
            "fused": pytest.approx(0.01),
            "moved": pytest.approx(0.02),
        }

    def test_the_table_fits_80_columns(self):
        stream = io.StringIO()
        print_comparison(make_comparison([1.0] * 10, [1.0] * 10), Console(file=stream, width=80))
        assert "moved by" in stream.getvalue()
        assert all(len(line.rstrip()) <= 80 for line in stream.getvalue().splitlines())

    def test_slower_is_a_ratio_below_one(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 10)
        slow = dataclasses.replace(comparison.fused, optimizer_ms=[8.0] * 10)
        assert "FusedAdamW is 0.50 times as fast as" in printed(dataclasses.replace(comparison, fused=slow))

    @pytest.mark.parametrize("wrong", [1 + 5.1 * LOSS_TOLERANCE, math.nan, math.inf])
    def test_gives_no_ratio_when_the_losses_disagree(self, wrong, tmp_path):
        comparison = make_comparison([1.0] * 10, [1.0] * 9 + [wrong])
        assert not comparison.agrees
        assert comparison.ratios == []
        text = printed(comparison)
        assert "no ratio is given" in text
        assert "FusedAdamW is" not in text
        save_figure(comparison, tmp_path / "figure.png")

    def test_gives_no_ratio_against_a_torch_fused_that_disagrees(self, tmp_path):
        comparison = make_comparison([1.0] * 10, [1.0] * 10, torch_fused_losses=[2.0] * 10)
        assert comparison.agrees
        assert {(ratio.of, ratio.against) for ratio in comparison.ratios} == {("FusedAdamW", "torch's for-loop AdamW")}
        text = printed(comparison)
        assert "No ratio against torch's fused AdamW" in text
        assert "FusedAdamW is 2.00 times as fast as torch's for-loop AdamW" in text
        save_figure(comparison, tmp_path / "figure.png")

    def test_says_why_there_is_no_torch_fused(self, tmp_path):
        comparison = dataclasses.replace(
            make_comparison([1.0] * 10, [1.0] * 10), torch_fused=None, no_torch_fused="torch has [none]"
        )
        assert "No run with torch's fused=True: torch has [none]." in printed(comparison)
        save_figure(comparison, tmp_path / "figure.png")

    @pytest.mark.parametrize(("epochs", "points"), [(1, 10), (2, 10), (5, 5)])
    def test_few_epochs_are_no_line_of_few_dots(self, epochs, points, monkeypatch, tmp_path):
        drawn, plot = [], Axes.plot
        monkeypatch.setattr(Axes, "plot", lambda *args, **kwargs: drawn.append(list(args[2])) or plot(*args, **kwargs))
        save_figure(
            dataclasses.replace(make_comparison([2.0, 1.0] * 5, [2.0, 1.0] * 5), epochs=epochs), tmp_path / "a.png"
        )
        assert len(drawn[1]) == points, "the second line is the smooth one of the first run"

    def test_saves_figures_and_picture(self, tmp_path):
        comparison = make_comparison([2.0, 1.0] * 5, [2.0, 1.0] * 5)
        save_json(comparison, tmp_path / "comparison.json")
        save_figure(comparison, tmp_path / "comparison.png", source="some JSON")
        loaded = json.loads((tmp_path / "comparison.json").read_text())
        assert (loaded["config"], loaded["seed"], loaded["agrees"]) == ("configs/some.py", 0, True)
        assert loaded["stock"]["losses"] == [2.0, 1.0] * 5
        assert Comparison.from_dict(loaded) == comparison
        picture = (tmp_path / "comparison.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert b"some JSON" in picture

    def test_a_config_whose_name_is_no_text(self, tmp_path):
        comparison = dataclasses.replace(make_comparison([2.0] * 10, [2.0] * 10), config="a\udcff\n.py")
        save_json(comparison, tmp_path / "comparison.json")
        save_figure(comparison, tmp_path / "comparison.png")
        assert json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))["config"] == "a\udcff\n.py"

    def test_progress_is_plain_lines_without_a_terminal(self, capsys):
        with show_progress(Console(force_terminal=False)) as listener:
            for done in range(1, 41):
                listener(done, 40, 0.5, 0.25)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert lines[-1] == "iteration 40/40  loss: stock 0.5000, fused 0.2500"

    def test_progress_is_a_bar_on_a_terminal(self, capsys):
        with show_progress(Console(force_terminal=True, width=100)) as listener:
            listener(7, 40, 0.5, 0.25)
        assert "7/40" in capsys.readouterr().out
