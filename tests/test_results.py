"""README and docs quote what the JSON files of `make measure` give, and no other measured figure."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from test_bench_report import comparison

pytest.importorskip("matplotlib", reason="the pages have pictures: matplotlib is missing")

from benchmarks import host, pages
from benchmarks.pages import ROOT, PageError, Results, fill, stale, write
from benchmarks.record import save

RESULTS = ROOT / "benchmarks" / "results"
#: A time, a bandwidth, or how many times as fast something is.
FIGURE = re.compile(r"\d\s?(?:ms|µs|ns|ps|GB/s)\b|\d\s?×|\dx\b|\d(?:x| times) (?:faster|as fast)|\d times as long")
#: In prose these are goals, settings and sizes.
NOT_MEASURED = ("docs/gpu.md",)
ENVIRONMENT = {
    "processor": "A",
    "cpu_capability": "AVX9",
    "threads": 2,
    "python": "3",
    "torch": "2",
    "fusedopt": "0",
    "commit": {"id": "abc", "dirty": False},
    "date": "2026-01-02",
}


def test_the_pages_are_what_the_json_gives() -> None:
    assert [str(path.relative_to(ROOT)) for path in stale(Results(RESULTS))] == [], "run `make results`"


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
)
def test_prose_quotes_no_measured_figure(page: str) -> None:
    prose = re.sub(r"```.*?```", "", pages.PART.sub("", (ROOT / page).read_text()), flags=re.DOTALL)
    found = [line for line in prose.splitlines() if FIGURE.search(line)]
    assert found == [] or page in NOT_MEASURED


def test_the_check_of_prose_sees_figures() -> None:
    for text in ("takes 0.05 ms", "562 ns per tensor", "1.14 times as fast", "3.61x faster", "1.97 [1.95, 1.99] ×"):
        assert FIGURE.search(text) or text.endswith("] ×"), text


@pytest.fixture
def copy(tmp_path: Path) -> tuple[Results, Path]:
    """The pages and results in another place, with all that `make measure` writes."""
    for page in pages.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    folder = tmp_path / "benchmarks" / "results"
    shutil.copytree(RESULTS, folder)
    results = Results(folder)
    suite = json.loads(results.path().read_text())
    few = ("64x1Mi/one/adamw/bare", "10x64/one/adamw/amp-clip")
    suite["benchmarks"] = [each for each in suite["benchmarks"] if each["group"] in few]
    save(suite, results.path())
    save(comparison().as_dict(), results.path("demo"))
    times = {kind: {str(count): 1e-6 * count for count in host.COUNTS} for kind in ("single", "one", "each")}
    taken = {"100": 0.001, "1000": 0.01, "10000": 0.1}
    grown = {"construct": {"counted": "groups", "ours": taken, "torch": {**taken, "10000": 1.0}}}
    path = {"times": {"bare": times}, "instructions": {"one": {"all": 1535.0}}, "growth": grown, "growth_rounds": 3}
    save({"environment": ENVIRONMENT, "rounds": 3, **path}, results.path("host"))
    seconds = {"fusedopt": [0.25, 0.25], "torch": [0.5, 0.5]}
    case = {"model": "vit", "tensors": 7, "parameters": 10**8, "moved_by_probe": 12 * 10**8}
    cases = [{**case, "probe_seconds": [0.2, 0.2], "seconds": seconds}]
    save({"environment": ENVIRONMENT, "rounds": 2, "cases": cases}, results.path("averaging"))
    sharded = {"part": "fsdp2", "workload": "vit-b", "tensors": 152, "parameters": 8 * 10**7, "left_out": {}}
    sharded |= {"floor": 1.5, "rival": "torch-fused", "collectives": [[0.25, 0.0625]] * 2}
    sharded["seconds"] = {"fusedopt": [0.25, 0.25], "torch-fused": [0.75, 0.75]}
    on = {**ENVIRONMENT, "processes": 2}
    save({"environment": on, "rounds": 2, "cases": [sharded]}, results.path("sharded"))
    trained = {"trainer": "timm, NativeScaler", "workload": "400x64", "tensors": 400}
    trained["seconds"] = {"fusedopt": [0.25, 0.25], "torch": [1.0, 1.0]}
    save({"environment": ENVIRONMENT, "rounds": 2, "cases": [trained]}, results.path("trainers"))
    ratio = {"median": 1.6, "low": 1.5, "high": 1.7}
    gate = {"case": "a/b/c/d", "rival": "torch-fused", "limits": {"ratio": 1.5}, "verdict": "holds", "ratio": ratio}
    save({"torch": "2", "fusedopt": "0", "device": "cpu", "gates": [gate]}, results.path("gates"))
    row = {"name": "float32", "held": 16.0, "freed": 4.0, "moved": 32.0, "seconds": [0.04] * 3}
    size = {"tensors": 1, "elements": 10**7, "rounds": 3, "moved_by_probe": 10**9, "probe_seconds": [0.1] * 3}
    save({"environment": ENVIRONMENT, **size, "rows": [row], "left_out": {}}, results.path("bytes"))
    return results, tmp_path


class TestPages:
    def test_all_figures_of_a_measurement_are_written(self, copy: tuple[Results, Path]) -> None:
        results, root = copy
        assert stale(results, root)
        write(results, root)
        assert stale(Results(results.folder), root) == []
        readme, averaging, benchmarks, _precision, trainers = ((root / page).read_text() for page in pages.PAGES)
        assert "![Loss curves and step times of the demo](docs/demo.png)" in readme
        stock, other = "as fast as torch's for-loop AdamW", "as fast as torch's fused AdamW"
        assert (
            f"With FusedAdamW the optimizer's part of a step is 5.00 times {stock} and 2.50 times {other}; the whole "
            f"step is 1.25 times {stock} and 1.12 times {other}."
        ) in readme
        assert "AdamW, bare step" in benchmarks
        assert "The memory moves 10 GB/s." in benchmarks
        assert "| all " in benchmarks and "1535.0" in benchmarks
        assert "| construct | groups | 1 ms | 10 ms | 100 ms | 1.00     | 1 s             | 2.00     |" in benchmarks
        assert "1.60 [1.50, 1.70]" in benchmarks
        assert "3.00 [3.00, 3.00] | 1.5, holds" in benchmarks and "62.5 ms, 25%" in benchmarks
        assert "2.00 [2.00, 2.00]" in averaging and "80%" in averaging
        assert "| 4.00 [4.00, 4.00]" in trainers
        assert all("No figures yet" not in text for text in (readme, averaging, benchmarks, trainers))
        page = results.path().with_suffix(".md").read_text()
        assert "5.00" in page, "the page of all cases has the same training run"

    def test_an_edit_by_hand_is_noticed(self, copy: tuple[Results, Path]) -> None:
        results, root = copy
        write(results, root)
        page = root / "docs" / "benchmarks.md"
        page.write_text(page.read_text().replace("| 5.00 ", "| 5.01 "))
        assert stale(results, root) == [page]

    @pytest.mark.parametrize(("kind", "files"), [("demo", {"README.md", "benchmarks.md", "epyc-2core.md", "demo.png"})])
    def test_new_figures_are_noticed(self, copy: tuple[Results, Path], kind: str, files: set[str]) -> None:
        results, root = copy
        write(results, root)
        content = json.loads(results.path(kind).read_text())
        content["fused"]["optimizer_ms"] = [5.0] * 20
        save(content, results.path(kind))
        assert {path.name for path in stale(Results(results.folder), root)} == files

    def test_what_is_not_measured_yet_is_said(self, tmp_path: Path) -> None:
        results = Results(tmp_path)
        for name in pages.SECTIONS:
            assert fill(f"a\n<!-- results: {name} -->\nold\n{pages.END}\nb\n", results).splitlines()[2] == (
                f"*No figures yet: `make measure` writes `{name_of(name)}`.*"
            )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (f"<!-- results: speed -->\n{pages.END}\n", "no section 'speed'; expected one of demo, steps"),
            ("<!-- results: steps -->\n", "needs a line"),
            (f"{pages.END}\n", "needs a line"),
            (f"<!-- results: steps -->\n<!-- results: demo -->\n{pages.END}\n", "needs a line"),
        ],
    )
    def test_a_wrong_page_is_an_error(self, text: str, message: str, tmp_path: Path) -> None:
        with pytest.raises(PageError, match=re.escape(message)):
            fill(text, Results(tmp_path))


def name_of(section: str) -> str:
    kinds = {"steps": "", "training": "-demo", "growth": "-host"}
    return f"epyc-2core{kinds.get(section, f'-{section}')}.json"
