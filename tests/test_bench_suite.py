"""benchmarks/: the cases of the suite, and the gate with its floors."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate, suite
from benchmarks.gates import LEAST_ROUNDS
from benchmarks.host import step_times
from benchmarks.kept import KEPT
from fusedopt.backends.native import NativeBackend
from fusedopt.bench import CONTENDERS, DTYPES, OPTIMIZERS, RECIPES, WORKLOADS, Case, Result
from fusedopt.bench.measure import Times


class TestSuite:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_covers_every_axis(self, device: str) -> None:
        entries = suite.entries(device)
        cases = [entry.case for entry in entries]
        assert len({case.name for case in cases}) == len(cases)
        assert {case.device for case in cases} == {device}
        workloads = {name for name, workload in WORKLOADS.items() if device == "cuda" or not workload.gpu_only}
        for workload in workloads:
            assert {case.grouping for case in cases if case.workload == workload} == {"one", "two", "each"}
        assert {case.workload for case in cases} == workloads
        assert {(case.optimizer, case.recipe) for case in cases} >= {(o, r) for o in OPTIMIZERS for r in RECIPES}
        assert {case.dtype for case in cases} == set(DTYPES)
        assert {name for entry in entries for name in entry.contenders} == set(CONTENDERS)
        assert any(case.warm for case in cases)
        assert any(entry.quick for entry in entries)
        assert all(entry.rounds >= 20 for entry in entries)


def scripted(
    monkeypatch: pytest.MonkeyPatch,
    ratios: dict[str, list[list[float]]],
    shares: dict[str, list[list[float]]] | None = None,
) -> list[str]:
    """Have the gate see these ratios, a list for each go of each workload; returns the log of goes.

    ``shares`` are those of the bandwidth, likewise.
    """
    log: list[str] = []

    def run(case: Case, names: list[str], rounds: int, *_: Any) -> Result:
        log.append(case.workload)
        ratio = ratios[case.workload].pop(0)
        moved = case.parameters * case.bytes_per_parameter
        bandwidth = [moved / share for share in (shares or {}).get(case.workload, [[]]).pop(0)]
        times = {"fusedopt": Times([1.0] * len(ratio), [0.5] * len(ratio)), "torch-fused": Times(ratio, ratio)}
        return Result(case, times=times, bandwidth=bandwidth)

    monkeypatch.setattr(gate, "run", run)
    monkeypatch.setattr(gate, "CacheFlush", lambda device: None)
    monkeypatch.setattr(gate, "BandwidthProbe", lambda device: None)
    return log


def write_gates(path: Path, floors: dict[str, float | str], rounds: int = 20, retries: int = 2) -> Path:
    lines = ["[settings]", 'rival = "torch-fused"', f"rounds = {rounds}", f"retries = {retries}", "[cpu]"]
    path.write_text("\n".join([*lines, *(f'"{name}" = {floor}' for name, floor in floors.items())]))
    return path


def noisy(center: float) -> list[float]:
    return [center + 0.05 * (round - 9.5) for round in range(20)]


class TestGate:
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_the_floors_can_be_read(self, device: str) -> None:
        gates, rounds, _ = gate.load(gate.GATES, device)
        assert len(gates) >= 7
        assert rounds >= LEAST_ROUNDS
        for entry in gates:
            assert entry.ours in CONTENDERS
            assert entry.ours.startswith("fusedopt")
            assert entry.rival in CONTENDERS
            if not entry.rival.startswith("fusedopt"):
                assert CONTENDERS[entry.rival].unavailable(entry.case) is None

    def test_only_what_is_uncertain_runs_again(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log = scripted(
            monkeypatch,
            {
                "400x64": [[3.0] * 20],
                "ragged": [noisy(1.9), noisy(2.6)],  # a bad phase of the machine, then a good one
                "vit-tiny": [noisy(2.02)] * 3,  # near its floor
            },
        )
        floors = {f"{name}/one/adamw/amp-clip": 2.0 for name in ("400x64", "ragged", "vit-tiny")}
        assert gate.main(["--gates", str(write_gates(tmp_path / "g.toml", floors))]) == 0
        assert log == ["400x64", "ragged", "vit-tiny", "ragged", "vit-tiny", "vit-tiny"]
        assert "BROKEN" not in capsys.readouterr().out

    def test_a_broken_floor_is_named_after_all_retries(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        log = scripted(monkeypatch, {"400x64": [[3.0] * 20], "ragged": [[1.9] * 20] * 3})
        floors = {"400x64/one/adamw/amp-clip": 2.0, "ragged/one/sgd/clip/bf16": 2.0}
        out = tmp_path / "table.md"
        assert gate.main(["--gates", str(write_gates(tmp_path / "g.toml", floors)), "--out", str(out)]) == 1
        assert log == ["400x64", "ragged", "ragged", "ragged"]
        broken = [line for line in capsys.readouterr().out.splitlines() if "BROKEN" in line]
        assert len(broken) == 1
        assert "ragged/one/sgd/clip/bf16" in broken[0]
        assert broken[0] in out.read_text()

    @pytest.mark.parametrize(
        ("floors", "rounds", "message"),
        [
            ({"400x64": 2.0}, 20, "'400x64' is not workload/grouping"),
            ({"resnet/one/adamw/clip": 2.0}, 20, "workload is 'resnet'; expected one of resnet-50"),
            ({"400x64/one/adamw/clip/fp8": 2.0}, 20, "dtype is 'fp8'; expected one of fp32"),
            ({"400x64/one/lion/clip": 2.0}, 20, "optimizer is 'lion'; expected one of adam"),
            ({"400x64/one/adamw/clip": 2.0}, 19, "a median needs 20"),
            ({}, 20, "no gates to check"),
            ({"400x64/one/sgd/clip/bf16": 1.5}, 20, "torch-fused: wrong result"),
        ],
    )
    def test_what_cannot_be_checked_is_an_error_of_its_own(
        self, floors: dict[str, float], rounds: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert gate.main(["--gates", str(write_gates(tmp_path / "g.toml", floors, rounds))]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("text", "arguments", "message"),
        [
            (None, [], "No such file"),
            ("[settings", [], "Expected"),
            ("[settings]\nrounds = 20\nretries = 1", [], "no 'rival'"),
            ('[settings]\nrounds = 20\nretries = 1\nrival = "torch-fused"', ["--case", "x"], "no floor for 'x'"),
        ],
    )
    def test_a_wrong_file_is_an_error_of_its_own(
        self, text: str | None, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "g.toml"
        if text is not None:
            path.write_text(text)
        assert gate.main(["--gates", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_its_floors_cannot_be_checked(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert gate.main(["--device", "cuda"]) == 2
        assert "no usable CUDA device" in capsys.readouterr().err

    def test_a_planted_slowdown_trips_it(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # The ratio is about 11, and about 0.05 with the sleep: no noise bridges that.
        gates = write_gates(tmp_path / "g.toml", {"400x64/one/adamw/amp-clip": 2.0}, retries=0)
        assert gate.main(["--gates", str(gates)]) == 0
        step = NativeBackend.step

        def slow(self: NativeBackend, *arguments: Any) -> Any:
            time.sleep(0.1)
            return step(self, *arguments)

        monkeypatch.setattr(NativeBackend, "step", slow)
        assert gate.main(["--gates", str(gates)]) == 1


RAGGED = "ragged/one/adamw/amp-clip"
VIT = "vit-tiny/one/adamw/amp-clip"


class TestLimits:
    """What a gate can ask for beside the ratio."""

    def test_the_gpu_s_ask_for_bandwidth_and_host_time(self) -> None:
        gates, _, _ = gate.load(gate.GATES, "cuda")
        assert {name for entry in gates for name in entry.limits} == set(gate.LIMITS)
        for entry in gates:
            if "bandwidth" in entry.limits:
                assert entry.case.parameters >= 10**8
        assert all(set(entry.limits) == {"ratio"} for entry in gate.load(gate.GATES, "cpu")[0])

    def test_a_share_of_the_bandwidth(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shares = [[0.95] * 20, [0.85] * 20, [0.85] * 20, [0.85] * 20]
        log = scripted(
            monkeypatch,
            {"ragged": [[2.0] * 20], "vit-tiny": [[2.0] * 20] * 3},
            {"ragged": shares[:1], "vit-tiny": shares[1:]},
        )
        asked = "{ ratio = 1.5, bandwidth = 0.9 }"
        gates = write_gates(tmp_path / "g.toml", {RAGGED: asked, VIT: asked})
        assert gate.main(["--gates", str(gates), "--json", str(tmp_path / "r.json")]) == 1
        assert log == ["ragged", "vit-tiny", "vit-tiny", "vit-tiny"]
        assert "95.0 [95.0, 95.0] % of the bandwidth, floor 90: holds" in capsys.readouterr().out
        good, bad = json.loads((tmp_path / "r.json").read_text())["gates"]
        assert (good["verdict"], good["broken"]) == ("holds", [])
        assert (bad["verdict"], bad["broken"]) == ("BROKEN", ["bandwidth"])
        assert bad["bandwidth"]["median"] == pytest.approx(0.85)
        assert bad["rounds"] == 60

    @pytest.mark.parametrize(("micros", "code"), [(50.0, 0), (70.0, 1)])
    def test_a_ceiling_on_the_host_s_time_needs_no_ratio(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        micros: float,
        code: int,
    ) -> None:
        scripted(monkeypatch, {"ragged": [[0.5] * 20] * 3})
        monkeypatch.setattr("benchmarks.gates.step_times", lambda case, name: [1e-6 * micros] * 100)
        gates = write_gates(tmp_path / "g.toml", {RAGGED: "{ host_us = 60 }"})
        assert gate.main(["--gates", str(gates), "--json", str(tmp_path / "r.json")]) == code
        out = capsys.readouterr().out
        assert f"{micros:.1f} [{micros:.1f}, {micros:.1f}] µs on the host, ceiling 60" in out
        (row,) = [line for line in out.splitlines() if line.startswith("| ragged")]
        assert [cell.strip() for cell in row.split("|")[5:12]] == ["0.50 [0.50, 0.50]", "", "", "", *row_end(micros)]
        (found,) = json.loads((tmp_path / "r.json").read_text())["gates"]
        assert found["host_us"]["median"] == pytest.approx(micros)
        assert found["host_seconds"] == 0.5

    def test_the_step_is_timed_by_itself(self) -> None:
        times = step_times(Case("400x64", recipe="amp"), "fusedopt-native", steps=5, warmup=1)
        assert len(times) == 5
        assert all(0 < seconds < 1 for seconds in times)

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ("{ speed = 2.0 }", "expected a number, or a table of ratio, bandwidth, host_us"),
            ("{}", "expected a number, or a table"),
            ("'2'", "'2' is not a number"),
            ("{ ratio = true }", "True is not a number"),
            ("{ bandwidth = 0.9 }", "too small for its share of the bandwidth"),
        ],
    )
    def test_what_cannot_be_asked(
        self,
        asked: str,
        message: str,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        scripted(monkeypatch, {"ragged": [[2.0] * 20]})
        assert gate.main(["--gates", str(write_gates(tmp_path / "g.toml", {RAGGED: asked}))]) == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(("ratio", "code"), [(2.0, 2), (1.0, 1)])
    def test_one_that_cannot_be_checked_need_not_stop_the_others(
        self,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        ratio: float,
        code: int,
    ) -> None:
        log = scripted(monkeypatch, {"vit-tiny": [[ratio] * 20] * 3})  # nothing for the other: a KeyError
        gates = write_gates(tmp_path / "g.toml", {RAGGED: 1.5, VIT: 1.5})
        out = tmp_path / "r.json"
        assert gate.main(["--gates", str(gates), "--keep-going", "--json", str(out)]) == code
        assert log[:2] == ["ragged", "vit-tiny"]
        assert f"{RAGGED}: fusedopt against torch-fused: KeyError" in capsys.readouterr().err
        content = json.loads(out.read_text())
        assert content["complete"]
        assert [found["verdict"] for found in content["gates"]] == ["not checked", "holds" if code == 2 else "BROKEN"]
        with pytest.raises(KeyError):
            gate.main(["--gates", str(gates)])


def paired(*asked: str) -> str:
    return f"[{', '.join(asked)}]"


TRITON = '{ ours = "fusedopt-triton", ratio = 1.3 }'
TRITON_NATIVE = '{ ours = "fusedopt-triton", rival = "fusedopt-native", ratio = 0.85 }'


class TestWhoseTimes:
    """A gate may say whose time is compared with whose, and a case may have several."""

    @pytest.fixture
    def goes(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The contenders of each go; changed by ``seconds`` and ``left_out`` of the test's."""
        log: list[list[str]] = []

        def run(case: Case, names: list[str], rounds: int, *_: Any) -> Result:
            log.append(names)
            if failing := next((name for name in names if name in self.failing), None):
                raise RuntimeError(f"{failing} crashed")
            left_out = {name: "cannot run" for name in names if name in self.left_out}
            present = [name for name in names if name not in left_out]
            return Result(case, {name: Times(self.seconds[name], [0.5] * 20) for name in present}, left_out)

        self.seconds = {
            "fusedopt": [1.0] * 20,
            "fusedopt-native": [1.0] * 20,
            "fusedopt-triton": [1.1] * 20,
            "torch-fused": [1.7] * 20,
        }
        self.left_out: set[str] = set()
        self.failing: set[str] = set()
        monkeypatch.setattr(gate, "run", run)
        monkeypatch.setattr(gate, "CacheFlush", lambda device: None)
        monkeypatch.setattr(gate, "BandwidthProbe", lambda device: None)
        return log

    def check(self, folder: Path, asked: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        """Exit code and records."""
        gates, out = write_gates(folder / "g.toml", {RAGGED: asked}, retries=1), folder / "r.json"
        code = gate.main(["--gates", str(gates), "--json", str(out), *arguments])
        return code, json.loads(out.read_text())["gates"] if out.exists() else []

    def test_the_floors_of_the_triton_backend(self) -> None:
        found: dict[str, dict[str, float]] = {}
        for entry in gate.load(gate.GATES, "cuda")[0]:
            if entry.ours == "fusedopt-triton":
                assert entry.case.parameters >= 10**8
                found.setdefault(entry.case.name, {})[entry.rival] = entry.limits["ratio"]
        assert {name.partition("/")[0] for name in found} == {"vit-l", "llama-1b"}
        assert all(limits == {"torch-fused": 1.3, "fusedopt-native": 0.85} for limits in found.values())

    def test_nobody_takes_turns_under_two_names(self) -> None:
        """On a GPU fusedopt is fusedopt-native."""
        for _, gates in itertools.groupby(gate.load(gate.GATES, "cuda")[0], key=lambda entry: entry.case.name):
            names = {name for entry in gates for name in (entry.ours, entry.rival)}
            assert not {"fusedopt", "fusedopt-native"} <= names

    def test_floors_of_fewer_bytes_are_below_what_bytes_allow(self) -> None:
        """Against our own fp32, which is bound by the memory."""
        found = set()
        for entry in gate.load(gate.GATES, "cuda")[0]:
            precise = KEPT.get(entry.ours.removeprefix("fusedopt-"))
            if precise is not None:
                found.add(entry.ours)
                assert CONTENDERS[entry.ours].unavailable(Case(**{**vars(entry.case), "device": "cpu"})) is None
                if entry.rival == "fusedopt-native":
                    assert entry.limits["ratio"] < entry.case.bytes_per_parameter / precise.moved(entry.case)
        assert len(found) == 8

    def test_mixed_dtypes_have_floors_as_bf16(self) -> None:
        gates = gate.load(gate.GATES, "cuda", dtypes=["bf16", "bf16-grads"])[0]
        floors: dict[str, list[float]] = {}
        for entry in gates:
            floors.setdefault(entry.case.name.removesuffix("/cuda"), []).append(entry.limits["ratio"])
        assert set(floors["vit-l/one/adamw/amp-clip/bf16"]) >= set(floors["vit-l/one/adamw/amp-clip/bf16-grads"])
        assert all(name.endswith(("/bf16", "/bf16-grads")) for name in floors)

    def test_those_about_one_contender(self) -> None:
        everyone, triton, rest = (
            gate.load(gate.GATES, "cuda", **chosen)[0]
            for chosen in ({}, {"about": ["fusedopt-triton"]}, {"without": ["fusedopt-triton"]})
        )
        assert triton and rest and len(triton) + len(rest) == len(everyone)
        assert all("fusedopt-triton" in (entry.ours, entry.rival) for entry in triton)

    def test_a_dtype_and_a_contender_can_be_asked_for(self, goes: list[list[str]], tmp_path: Path) -> None:
        asked = paired("1.5", TRITON, TRITON_NATIVE)
        assert len(self.check(tmp_path, asked, "--about", "fusedopt-native", "--dtype", "fp32")[1]) == 1
        assert self.check(tmp_path, asked, "--dtype", "bf16")[0] == 2, "no gates to check"
        assert self.check(tmp_path, asked, "--about", "fused")[0] == 2

    def test_the_gates_of_a_case_share_its_rounds(
        self, goes: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, records = self.check(tmp_path, paired("1.5", TRITON, TRITON_NATIVE))
        assert code == 0
        assert goes == [["fusedopt", "torch-fused", "fusedopt-triton", "fusedopt-native"]]
        pairs = [(record["ours"], record["rival"]) for record in records]
        assert pairs == [
            ("fusedopt", "torch-fused"), ("fusedopt-triton", "torch-fused"), ("fusedopt-triton", "fusedopt-native")
        ]  # fmt: skip
        ratios = [record["ratio"]["median"] for record in records]
        assert ratios == pytest.approx([1.7, 1.7 / 1.1, 1 / 1.1])
        rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ragged")]
        cells = [[cell.strip() for cell in row.split("|")[2:7]] for row in rows]
        assert cells[0] == ["fusedopt", "1 s", "torch-fused", "1.70 [1.70, 1.70]", "1.5"]
        assert cells[2] == ["fusedopt-triton", "1.1 s", "fusedopt-native", "0.91 [0.91, 0.91]", "0.85"]

    def test_only_the_broken_one_runs_again(
        self, goes: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.seconds["fusedopt-triton"] = [1.25] * 20
        code, records = self.check(tmp_path, paired("1.5", TRITON, TRITON_NATIVE))
        assert code == 1
        assert goes[1:] == [["fusedopt-triton", "fusedopt-native"]]
        assert [record["verdict"] for record in records] == ["holds", "holds", "BROKEN"]
        assert [record["rounds"] for record in records] == [20, 20, 40]
        assert f"{RAGGED}: fusedopt-triton against fusedopt-native: 0.80" in capsys.readouterr().out

    @pytest.mark.parametrize("kind", ["left_out", "failing"])
    def test_whom_one_is_about_does_not_cost_the_others_theirs(
        self, goes: list[list[str]], kind: str, tmp_path: Path
    ) -> None:
        getattr(self, kind).add("fusedopt-triton")
        code, records = self.check(tmp_path, paired("1.5", TRITON), "--keep-going")
        assert code == 2
        assert [record["verdict"] for record in records] == ["holds", "not checked"]
        assert "fusedopt-triton" in records[1]["error"]
        assert records[0]["rounds"] == 20

    def test_a_contender_can_be_left_out(self, goes: list[list[str]], tmp_path: Path) -> None:
        code, records = self.check(tmp_path, paired("1.5", TRITON, TRITON_NATIVE), "--without", "fusedopt-triton")
        assert code == 0
        assert goes == [["fusedopt", "torch-fused"]]
        assert [record["ours"] for record in records] == ["fusedopt"]
        assert self.check(tmp_path, TRITON, "--without", "fusedopt-triton")[0] == 2

    def test_the_host_s_time_is_its_own(
        self, goes: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        asked = {"fusedopt": 50e-6, "fusedopt-triton": 90e-6}
        monkeypatch.setattr("benchmarks.gates.step_times", lambda case, name: [asked[name]] * 100)
        code, records = self.check(tmp_path, paired("{ host_us = 60 }", '{ ours = "fusedopt-triton", host_us = 100 }'))
        assert code == 0
        assert [record["host_us"]["median"] for record in records] == pytest.approx([50, 90])

    @pytest.mark.parametrize(
        ("asked", "arguments", "message"),
        [
            ('{ ours = "fusedopt-tritn", ratio = 1 }', [], "ours is 'fusedopt-tritn'; did you mean 'fusedopt-triton'?"),
            ('{ rival = "torch-fusd", ratio = 1 }', [], "rival is 'torch-fusd'; did you mean 'torch-fused'?"),
            ("{ rival = 3, ratio = 1 }", [], "rival is 3; expected one of"),
            ('{ ours = "torch-fused", ratio = 1 }', [], "compares 'torch-fused' with itself"),
            ('{ ours = "fusedopt-triton" }', [], "expected a number, or a table of ratio, bandwidth, host_us"),
            ("[]", [], "[] is not a number"),
            ("[1.5, 'x']", [], "'x' is not a number"),
            ("1.5", ["--without", "triton"], "--without is 'triton'; expected one of"),
        ],
    )
    def test_what_cannot_be_compared(
        self, asked: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.check(tmp_path, asked, *arguments) == (2, [])
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_the_usual_rival_is_looked_up_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_gates(tmp_path / "g.toml", {RAGGED: 1.5})
        path.write_text(path.read_text().replace("torch-fused", "torch-fuse"))
        assert gate.main(["--gates", str(path)]) == 2
        assert "rival is 'torch-fuse'; did you mean 'torch-fused'?" in capsys.readouterr().err


def row_end(micros: float) -> list[str]:
    """The end of a gate's row in the table: host time, ceiling, rounds."""
    return [f"{micros:g} µs", "60 µs", "20" if micros <= 60 else "60"]
