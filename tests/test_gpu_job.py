"""The GPU job: the verdict and the summary of .ci/gpu_report.py, and that .ci/gpu ends as it should in every case."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
if not (ROOT / ".ci" / "gpu").exists():
    pytest.skip("not in a source tree", allow_module_level=True)


def script(name: str) -> Any:
    """A script of .ci as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_figures = script("gpu_figures")
gpu_readings = script("gpu_readings")
gpu_report = script("gpu_report")
gpu_shards = script("gpu_shards")

PASSED, FAILED = (
    '<testcase classname="t" name="good[{}]"/>',
    '<testcase classname="t" name="bad[{}]"><failure/></testcase>',
)
SKIPPED = '<testcase classname="t" name="s"><skipped/></testcase>'

CLEAN = """\
========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
INVALID_READ = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void fusedopt::cuda::gpu::<unnamed>::update_kernel<fusedopt::Adam>(UpdateArguments)+0x90
=========     by thread (0,0,0) in block (3,0,0)
=========     Address 0x7f0000000000 is out of bounds
=========
========= ERROR SUMMARY: 1 error
"""
UNINITIALIZED_ELSEWHERE = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4, ...>(int)+0x120
=========     by thread (0,0,0) in block (0,0,0)
=========
========= Uninitialized access at 0x7f00 on access by cudaMemcpy source
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at fusedopt::cuda::gpu::statistics_kernel(int)+0xf0
=========     and Read access at fusedopt::cuda::gpu::statistics_kernel(int)+0xd0 [32 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
RACE_WARNING = RACE.replace("Error: Race", "Warning: Race").replace("1 error, 0 warnings", "0 errors, 1 warning")
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
=========
========= ERROR SUMMARY: 0 errors
"""
CRASHED = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""


def junit(*cases: str) -> str:
    """A JUnit XML as pytest writes it."""
    text = "".join(case.format(number) for number, case in enumerate(cases))
    return f'<?xml version="1.0" encoding="utf-8"?><testsuites><testsuite name="pytest">{text}</testsuite></testsuites>'


def gate_record(case: str = "vit-l/one/adamw/amp-clip/cuda", ratio: float = 1.7, **more: Any) -> dict[str, Any]:
    """A record as benchmarks.gate writes it."""
    broken = ["ratio"] if ratio < 1.5 else []
    return {
        "case": case,
        "ours": "fusedopt",
        "rival": "torch-fused",
        "verdict": "BROKEN" if broken else "holds",
        "broken": broken,
        "error": None,
        "rounds": 21,
        "limits": {"ratio": 1.5, "bandwidth": 0.9},
        "ratio": {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1},
        "bandwidth": {"median": 0.93, "low": 0.92, "high": 0.94},
        "seconds": 2.3e-3,
        "host_seconds": 1.2e-4,
        **more,
    }


class Folders:
    """What the steps of a job leave, made up."""

    def __init__(self, root: Path):
        self.work, self.out = root / "work", root / "out"
        self.work.mkdir()
        self.out.mkdir()
        self.step("environment")
        (self.work / "environment.txt").write_text("GPU  NVIDIA H200\n")

    def step(self, name: str, code: int | str = 0, reason: str = "", seconds: int = 5) -> Folders:
        with (self.work / "steps.tsv").open("a") as file:
            file.write(f"{name}\t{code}\t{seconds}\t{reason}\n")
        return self

    def tests(self, code: int, *cases: str, step: str = "tests") -> Folders:
        (self.work / f"{step}.xml").write_text(junit(*cases))
        return self.step("build").step(step, code)

    def sanitizer(self, name: str, log: str, code: int = 0, *cases: str) -> Folders:
        (self.work / f"{name}.log").write_text(log)
        (self.work / f"{name}.xml").write_text(junit(*(cases or [PASSED])))
        return self.step(name, code)

    def gates(self, code: int, *records: dict[str, Any], complete: bool = True, step: str = "gates") -> Folders:
        content = {"device": "NVIDIA H200", "complete": complete, "gates": list(records)}
        (self.work / f"{step}.json").write_text(json.dumps(content))
        return self.step(step, code)

    def report(self, plot: bool = False) -> tuple[int, str]:
        if plot:
            gpu_report.plot(self.work, self.out)
        code = gpu_report.report(self.work, self.out)
        return code, (self.out / "summary.md").read_text()


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


class TestVerdict:
    def test_all_is_well(self, folders: Folders) -> None:
        folders.tests(0, PASSED, PASSED, SKIPPED).sanitizer("memcheck", CLEAN).gates(0, gate_record())
        code, text = folders.report()
        assert code == gpu_report.GOOD
        assert "NVIDIA H200" in text
        assert "2 passed, 0 failed, 1 skipped" in text
        assert "| memcheck | clean | 1 | 0 | 0 |" in text
        row = "| fusedopt : torch-fused | 2.3 ms | 1.70 [1.60, 1.80] (≥ 1.5) | 93.0% (≥ 90%) |  | holds |"
        assert f"| vit-l/one/adamw/amp-clip {row}" in text

    def test_failed_tests_are_named(self, folders: Folders) -> None:
        code, text = folders.tests(1, PASSED, FAILED, FAILED).gates(0, gate_record()).report()
        assert code == gpu_report.TESTS_FAILED
        assert "tests: 2 of 3 failed" in text
        assert "- `t::bad[1]`" in text
        assert "holds" in text, "the floors are reported all the same"

    def test_a_long_list_of_failures_is_cut(self, folders: Folders) -> None:
        _, text = folders.tests(1, *[FAILED] * 100).report()
        assert text.count("- `t::bad") == gpu_report.MOST_NAMES
        assert f"and {100 - gpu_report.MOST_NAMES} more" in text

    @pytest.mark.parametrize(
        ("code", "reason"), [(124, "timed out after 5 s"), (137, "timed out"), (139, "exit code 139"), (3, "code 3")]
    )
    def test_tests_that_hang_or_crash_have_failed(self, folders: Folders, code: int, reason: str) -> None:
        result, text = folders.step("build").step("tests", code).report()
        assert result == gpu_report.TESTS_FAILED
        assert reason in text

    def test_a_file_that_cannot_be_collected_has_failed(self, folders: Folders) -> None:
        broken = '<testcase classname="" name="tests.test_x"><error message="collection failure"/></testcase>'
        code, text = folders.tests(1, PASSED, broken).report()
        assert code == gpu_report.TESTS_FAILED
        assert "`tests.test_x`" in text

    @pytest.mark.parametrize(("code", "cases"), [(0, [SKIPPED, SKIPPED]), (5, [])])
    def test_no_gpu_test_ran(self, folders: Folders, code: int, cases: list[str]) -> None:
        result, text = folders.tests(code, *cases).gates(0, gate_record()).report()
        assert result == gpu_report.NO_TESTS
        assert "none ran on the GPU" in text

    def test_kernels_that_do_not_load_are_the_reason(self, folders: Folders) -> None:
        folders.step("kernels", 1, "this build has kernels for sm_80").tests(5).step("gates", "-", "the kernels ...")
        code, text = folders.report()
        assert code == gpu_report.NO_TESTS
        assert "none ran on the GPU: this build has kernels for sm_80" in text

    def test_a_broken_floor(self, folders: Folders) -> None:
        slow = gate_record("resnet-50/one/adamw/amp-clip/cuda", ratio=1.2)
        code, text = folders.tests(0, PASSED).gates(1, gate_record(), slow).report()
        assert code == gpu_report.TOO_SLOW
        assert "gates: resnet-50/one/adamw/amp-clip/cuda: fusedopt against torch-fused: ratio" in text
        assert "BROKEN" in text

    def test_tests_count_more_than_floors(self, folders: Folders) -> None:
        code, text = folders.tests(1, FAILED).gates(1, gate_record(ratio=1.0)).sanitizer("racecheck", RACE).report()
        assert code == gpu_report.TESTS_FAILED
        assert "racecheck: 1 errors" in text
        assert "fusedopt against torch-fused: ratio" in text

    @pytest.mark.parametrize("complete", [True, False])
    def test_floors_that_cannot_be_checked(self, folders: Folders, complete: bool) -> None:
        record = gate_record(verdict="not checked", error="vit-l: torch-fused: wrong result", rounds=0)
        del record["ratio"], record["bandwidth"], record["seconds"]
        code, text = folders.tests(0, PASSED).gates(2, gate_record(), record, complete=complete).report()
        assert code == gpu_report.NOTHING_SAID
        assert "torch-fused: wrong result" in text
        assert ("not all were checked" in text) is not complete

    def test_without_results_the_floors_were_not_checked(self, folders: Folders) -> None:
        code, text = folders.tests(0, PASSED).step("gates", 1).report()
        assert code == gpu_report.NOTHING_SAID
        assert "not all were checked: exit code 1" in text

    def test_no_time_for_the_floors(self, folders: Folders) -> None:
        code, text = folders.tests(0, PASSED).step("gates", "-", "no time was left").report()
        assert code == gpu_report.NOTHING_SAID
        assert "no time was left" in text

    @pytest.mark.parametrize("name", ["environment", "build", "stopped"])
    def test_infrastructure(self, tmp_path: Path, name: str) -> None:
        folders = Folders(tmp_path)
        (folders.work / "steps.tsv").unlink()
        code, text = folders.step(name, 1, "no GPU: torch finds none").report()
        assert code == gpu_report.NOTHING_SAID
        assert f"{name}: no GPU: torch finds none" in text

    def test_what_was_left_out_is_not_missed(self, folders: Folders) -> None:
        steps = ("smoke", "micro", "tests", "gates", "mixed", "sanitizer", "ncu", "warmup", "triton", "triton-gates")
        for number, name in enumerate(steps):
            folders.step(name, "-", "left out by FUSEDOPT_GPU_SKIP" if number % 2 else "not asked for")
        code, text = folders.report()
        assert code == gpu_report.GOOD
        assert f"- not asked for: {', '.join(steps[::2])}\n" in text
        assert f"- left out by FUSEDOPT_GPU_SKIP: {', '.join(steps[1::2])}\n" in text

    def test_nothing_ran(self, tmp_path: Path) -> None:
        assert gpu_report.report(tmp_path, tmp_path) == gpu_report.NOTHING_SAID
        assert "nothing ran" in (tmp_path / "summary.md").read_text()

    def test_half_an_xml_is_none(self, folders: Folders) -> None:
        folders.tests(124, PASSED)
        (folders.work / "tests.xml").write_text(junit(PASSED)[:80])
        assert folders.report()[0] == gpu_report.TESTS_FAILED
        assert not (folders.out / "junit.xml").exists()


class TestTriton:
    """The tests and floors of the Triton backend, which not every machine can run."""

    def test_its_tests_are_reported_apart_and_kept_together(self, folders: Folders) -> None:
        folders.tests(0, PASSED, PASSED).tests(1, PASSED, FAILED, step="triton")
        code, text = folders.report()
        assert code == gpu_report.TESTS_FAILED
        assert "- triton: 1 of 2 failed" in text
        assert "- tests:" not in text
        own, triton = text.split("## Tests marked gpu, of the Triton backend")
        assert "2 passed, 0 failed" in own
        assert "1 passed, 1 failed" in triton
        assert "- `t::bad[1]`" in triton
        assert gpu_report.read_junit(folders.out / "junit.xml").ran == 4

    @pytest.mark.parametrize(
        ("code", "reason", "verdict"),
        [
            ("-", "triton is not installed (No module named 'triton')", "GOOD"),
            ("-", "triton 3.4.0 is installed; 3.6 or later is needed", "GOOD"),
            ("-", "left out by FUSEDOPT_GPU_SKIP", "GOOD"),
            ("-", "triton 3.6.0 finds no driver: 0 active drivers", "NOTHING_SAID"),
            ("-", "no time was left", "NOTHING_SAID"),
            (5, "", "NOTHING_SAID"),
            (124, "", "TESTS_FAILED"),
            (139, "", "TESTS_FAILED"),
        ],
    )
    def test_what_its_absence_means(self, folders: Folders, code: int | str, reason: str, verdict: str) -> None:
        result, text = folders.tests(0, PASSED).step("triton", code, reason).report()
        assert result == getattr(gpu_report, verdict)
        assert "triton" in text.partition("## Steps")[2]
        assert reason in text

    def test_kernels_that_do_not_load_are_no_reason_of_it(self, folders: Folders) -> None:
        folders.step("kernels", 1, "this build has kernels for sm_80").tests(0, PASSED, step="triton").tests(5)
        code, text = folders.report()
        assert code == gpu_report.NO_TESTS
        assert "- triton:" not in text

    @pytest.mark.parametrize("code", [0, 1, 124])
    def test_a_failed_warm_up_is_noted_and_not_fatal(self, folders: Folders, code: int) -> None:
        (folders.work / "warmup.txt").write_text("warm-up of adam, float32 on cuda:0  9.5 s\n")
        result, text = folders.tests(0, PASSED).step("warmup", code).report()
        assert result == gpu_report.GOOD
        assert "9.5 s" in text
        assert ("| warmup | done |" in text) == (code == 0)

    def test_a_floor_tells_whose_it_is(self, folders: Folders) -> None:
        slow = gate_record(ratio=0.7, ours="fusedopt-triton", rival="fusedopt-native", limits={"ratio": 0.85})
        code, text = folders.tests(0, PASSED).gates(1, gate_record(), slow).report()
        assert code == gpu_report.TOO_SLOW
        assert "amp-clip/cuda: fusedopt-triton against fusedopt-native: ratio" in text
        assert "| triton : native | 2.3 ms | 0.70 [0.60, 0.80] (≥ 0.85) |" in text


SHARED = """
import os, time
import pytest

@pytest.mark.parametrize("number", range(9))
def test_number(number, record_property):
    record_property("share", os.environ["FUSEDOPT_SHARD"])
    if os.environ.get("HANG") and number == 8:
        time.sleep(60)
    assert number != int(os.environ.get("BAD", -1))

def test_other():
    pass
"""


class TestShares:
    """Tests that several processes share."""

    def run(self, folder: Path, *arguments: str, limit: float = 60, **environment: str) -> tuple[int, str, Any]:
        (folder / "test_shared.py").write_text(SHARED)
        shares = [sys.executable, ROOT / ".ci" / "gpu_shards.py", "--processes", "3", "--xml", folder / "all.xml", "--"]
        plain = ["-p", "no:cacheprovider", "-q", "-k", "number", f"--rootdir={folder}", "test_shared.py"]
        result = subprocess.run(
            ["timeout", "-s", "INT", "-k", "10", str(limit), *shares, *plain, *arguments],
            cwd=folder, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        return result.returncode, result.stdout, gpu_report.read_junit(folder / "all.xml")

    def test_each_runs_once_in_one_of_them(self, tmp_path: Path) -> None:
        code, text, tests = self.run(tmp_path)
        assert code == 0, text
        assert (tests.passed, tests.failures) == (9, [])
        assert text.count("3 passed") == 3
        xml = (tmp_path / "all.xml").read_text()
        assert [xml.count(f'value="{index}/3"') for index in range(3)] == [3, 3, 3]

    def test_they_can_be_dealt_in_turns(self, tmp_path: Path) -> None:
        environment = {"FUSEDOPT_SHARD_DEAL": "1", "BAD": "4"}
        code, text, tests = self.run(tmp_path, **environment)
        assert code == 1, text
        assert (tests.passed, tests.ran) == (8, 9)
        xml = (tmp_path / "all.xml").read_text()
        shares = re.findall(r'name="test_number\[(\d)\]".*?value="(\d)/3"', xml)
        assert sorted(shares) == [(str(number), str(number % 3)) for number in range(9)]

    def test_a_failure_is_everyone_s(self, tmp_path: Path) -> None:
        code, text, tests = self.run(tmp_path, BAD="4")
        assert code == 1
        assert tests.failures == ["test_shared::test_number[4]"]
        assert tests.passed == 8
        assert "assert 4 != 4" in text

    @pytest.mark.slow
    def test_when_time_is_up_what_was_found_is_there(self, tmp_path: Path) -> None:
        code, text, tests = self.run(tmp_path, limit=12, HANG="1")
        assert code == 124, text
        assert tests.ran >= 8

    @pytest.mark.parametrize(
        ("codes", "code"),
        [([0, 0], 0), ([0, 5], 0), ([5, 5], 5), ([0, 1, 5], 1), ([0, -11, 1], 139), ([1, 2], 2), ([3, 0], 3)],
    )
    def test_one_exit_code_for_several(self, codes: list[int], code: int) -> None:
        assert gpu_shards.combined(codes) == code


class TestSanitizer:
    @pytest.mark.parametrize(("name", "log"), [("memcheck", INVALID_READ), ("racecheck", RACE)])
    def test_errors_in_our_kernels(self, folders: Folders, name: str, log: str) -> None:
        code, text = folders.tests(0, PASSED).sanitizer(name, log, 99).report()
        assert code == gpu_report.SANITIZER_ERRORS
        assert f"{name}: 1 errors in our kernels" in text
        assert "_kernel" in text

    def test_errors_count_when_time_ran_out_after_them(self, folders: Folders) -> None:
        assert folders.tests(0, PASSED).sanitizer("memcheck", INVALID_READ, 124).report()[0] == 5

    def test_errors_count_when_the_test_died_of_them(self, folders: Folders) -> None:
        assert folders.tests(0, PASSED).sanitizer("memcheck", INVALID_READ, 1, SKIPPED).report()[0] == 5

    def test_other_kernels_are_not_ours_to_mend(self, folders: Folders) -> None:
        code, text = folders.tests(0, PASSED).sanitizer("initcheck", UNINITIALIZED_ELSEWHERE, 99).report()
        assert code == gpu_report.GOOD
        assert "| initcheck | clean | 1 | 0 | 1 |" in text

    def test_a_warning_is_no_error(self, folders: Folders) -> None:
        assert folders.tests(0, PASSED).sanitizer("racecheck", RACE_WARNING).report()[0] == gpu_report.GOOD

    def test_errors_that_cannot_be_read_count_as_ours(self, folders: Folders) -> None:
        log = CLEAN.replace("0 errors", "3 errors")
        assert folders.tests(0, PASSED).sanitizer("memcheck", log, 99).report()[0] == gpu_report.SANITIZER_ERRORS

    @pytest.mark.parametrize(
        ("log", "code", "cases", "reason"),
        [
            (REFUSED, 255, [FAILED], "it does not support this device"),
            (CRASHED, 255, [SKIPPED], "it ended before any test had run (Error: Target application terminated"),
            ("", 127, [SKIPPED], "it ended before any test had run (exit code 127)"),
            (CLEAN, 124, [PASSED], "timed out after 5 s"),
            (CLEAN, 1, [PASSED, FAILED], "1 of 2 tests failed under it, without a finding"),
            ("========= COMPUTE-SANITIZER\n", 0, [PASSED], "its log has no summary"),
        ],
    )
    def test_what_says_nothing_is_left_out_with_its_reason(
        self, folders: Folders, log: str, code: int, cases: list[str], reason: str
    ) -> None:
        result, text = folders.tests(0, PASSED).sanitizer("memcheck", log, code, *cases).report()
        assert result == gpu_report.GOOD
        assert f"| memcheck | skipped: {reason}" in text

    def test_a_missing_tool(self, folders: Folders) -> None:
        folders.tests(0, PASSED).step("memcheck", "-", "compute-sanitizer is not on PATH")
        code, text = folders.report()
        assert code == gpu_report.GOOD
        assert "skipped: compute-sanitizer is not on PATH" in text


BANDWIDTH = """\
{"what": "copy, cudaMemcpyAsync", "elements": 1e6, "bytes": 8, "dtype": "fp32", "milliseconds": 1, \
"gigabytes_per_second": 4310, "of_copy": 1}
{"what": "read only", "elements": 1e6, "bytes": 4, "dtype": "fp32", "milliseconds": 1, \
"gigabytes_per_second": 4741, "of_copy": 1.1}
"""


def bandwidth_lines() -> str:
    """As the microbenchmark writes them, cut off in the last line."""
    text = BANDWIDTH
    for rule in ("adamw", "sgd"):
        for number, chunk in enumerate((8192, 16384, 32768)):
            for what, share in (("full", 0.8), ("full, early", 0.9), ("full, early, forwards", 0.85), ("bare", 0.88)):
                record = {"what": what, "rule": rule, "dtype": "bf16-grads", "chunk": chunk}
                share += 0.01 * (1 - abs(number - 1))
                text += json.dumps({**record, "elements": 1e6, "bytes": 32, "of_copy": share}) + "\n"
    record = {"what": "by hand: per 16Ki", "rule": "adamw", "dtype": "fp32", "of_copy": 0.97}
    return text + json.dumps({**record, "elements": 1e6, "bytes": 28}) + '\n{"what": "by ha'


COUNTERS = """\
==PROF== Connected to process 4242 (build/gpu/bandwidth-90)
==PROF== Profiling "statistics_kernel" - 0: 0%....50%....100% - 8 passes
"ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum",\
"dram__throughput.avg.pct_of_peak_sustained_elapsed","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio"
"","","byte","byte","%","inst","inst"
"0","statistics_kernel","4,100,000","12,000","91.25","0.5","17.25"
"1","update_kernel","16200000","11900000","88.1","0.25","21.5"
"""
LAUNCHES = """\
{"what": "statistics", "elements": 1000000, "bytes": 4, "rule": "adamw", "dtype": "fp32", "chunk": 32768}
{"what": "update", "elements": 1000000, "bytes": 28, "rule": "adamw", "dtype": "fp32", "chunk": 32768}
"""


class TestFigures:
    """The microbenchmark's and ncu's figures."""

    def test_a_row_per_rule_and_dtypes_at_the_best_chunk(self, folders: Folders) -> None:
        (folders.work / "bandwidth.jsonl").write_text(bandwidth_lines())
        code, text = folders.tests(0, PASSED).step("micro").report()
        assert code == gpu_report.GOOD
        assert "The copy moves 4310 GB/s" in text
        assert "- read only: 110.0%" in text
        assert "the fastest of 1 updates by hand: per 16Ki: 97.0%" in text
        assert "| full, 8Ki | full, 16Ki | full, 32Ki | best | not early | forwards | statistics | bare |" in text
        assert "| adamw bf16-grads | 90.0% | 91.0% | 90.0% | 16Ki | 81.0% | 86.0% |  | 89.0% |" in text
        assert "| sgd bf16-grads |" in text
        assert (folders.out / "bandwidth.jsonl").read_text() == bandwidth_lines()

    def test_a_microbenchmark_that_fails_is_a_reason(self, folders: Folders) -> None:
        code, text = folders.tests(0, PASSED).step("micro", 1).report()
        assert code == gpu_report.NOTHING_SAID
        assert "- micro: exit code 1" in text

    def test_bytes_per_element_beside_those_to_move(self, folders: Folders) -> None:
        (folders.work / "ncu.csv").write_text(COUNTERS)
        (folders.work / "profile.jsonl").write_text(LAUNCHES)
        code, text = folders.tests(0, PASSED).step("ncu").report()
        assert code == gpu_report.GOOD
        assert "| adamw fp32 statistics | 4 | 4.1 | 0.0 | 91 % | long_scoreboard 17.2, barrier 0.5 |" in text
        assert "| adamw fp32 update | 28 | 16.2 | 11.9 | 88 % | long_scoreboard 21.5, barrier 0.2 |" in text

    def test_figures_that_cannot_be_read_do_not_cost_the_report(self, folders: Folders) -> None:
        (folders.work / "ncu.csv").write_text(COUNTERS)
        (folders.work / "profile.jsonl").write_text('{"what": "update"}\n' * 2)
        (folders.work / "bandwidth.jsonl").write_text('{"chunk": 8192}\n')
        code, text = folders.tests(0, PASSED).step("micro").step("ncu").report()
        assert code == gpu_report.GOOD
        assert text.count("cannot be read: KeyError") == 2

    @pytest.mark.parametrize("code", [1, 124, "-"])
    def test_ncu_may_be_refused(self, folders: Folders, code: int | str) -> None:
        (folders.work / "ncu.csv").write_text("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n")
        result, text = folders.tests(0, PASSED).step("ncu", code, "ncu is not on PATH" * (code == "-")).report()
        assert result == gpu_report.GOOD
        assert "ERR_NVGPUCTRPERM" in text


class TestArtifacts:
    """They are few and small, and the summary can be read from the end of a log."""

    def job(self, folders: Folders) -> Folders:
        names = ["smoke", "tests", "triton"]
        for name in names:
            folders.tests(1, PASSED, *[FAILED.replace("bad", "bad" * 30)] * 300, step=name)
        for name in gpu_report.PASSES:
            log = RACE if name == "racecheck" else INVALID_READ
            folders.sanitizer(name, log * 3, 99, PASSED)
            with (folders.work / f"{name}.log").open("a") as file:
                file.write(f"========= {'padding' * 100}\n" * 10_000)
        for name in gpu_report.GATE_STEPS:
            folders.gates(1, *[gate_record(ratio=0.5 + number / 20) for number in range(16)], step=name)
        (folders.work / "bandwidth.jsonl").write_text(bandwidth_lines())
        (folders.work / "ncu.csv").write_text(COUNTERS + f"==PROF== {'padding' * 100}\n" * 30_000)
        (folders.work / "profile.jsonl").write_text(LAUNCHES)
        return folders.step("micro").step("ncu")

    def test_at_most_eight_of_at_most_sixteen_mebibytes(self, folders: Folders) -> None:
        self.job(folders).report()
        (folders.out / "log.txt").write_text("and the log and the picture, which others write")
        (folders.out / "gates.png").write_bytes(b"")
        files = sorted(folders.out.rglob("*"))
        assert len(files) == 8
        assert all(path.is_file() and path.stat().st_size < 16 * 2**20 for path in files)
        text = (folders.out / "sanitizer.txt").read_text()
        assert [text.count(f"== {name}\n") for name in gpu_report.PASSES] == [1] * 4
        assert len(json.loads((folders.out / "results.json").read_text())["gates"]) == 48

    def test_the_summary_is_short_and_its_beginning_is_what_matters(self, folders: Folders) -> None:
        code, text = self.job(folders).report()
        assert code == gpu_report.TESTS_FAILED
        assert len(text) <= gpu_report.MOST_CHARACTERS < 12_000
        assert text.index("# GPU job: tests failed") < text.index("- smoke: 300 of 301 failed") < text.index("## Steps")
        assert "No room here, but among the artifacts: " in text

    def test_floors_of_all_steps_are_in_one_file_and_broken_ones_first(self, folders: Folders) -> None:
        folders.tests(0, PASSED).gates(0, gate_record("fine/one/adamw/amp-clip/cuda"))
        folders.gates(1, gate_record("slow/one/adamw/amp-clip/bf16/cuda", ratio=1.1), step="mixed")
        folders.gates(0, gate_record("other/one/adamw/amp-clip/cuda"), complete=False, step="triton-gates")
        code, text = folders.report()
        assert code == gpu_report.TOO_SLOW
        assert "- mixed: slow/one/adamw/amp-clip/bf16/cuda: fusedopt against torch-fused: ratio" in text
        assert "- triton-gates: not all were checked" in text
        assert text.index("| slow/") < text.index("| fine/")
        content = json.loads((folders.out / "results.json").read_text())
        assert [gate["step"] for gate in content["gates"]] == ["gates", "mixed", "triton-gates"]
        assert (content["complete"], content["device"]) == (False, "NVIDIA H200")


class TestSmoke:
    def test_a_failure_is_a_failed_test(self, folders: Folders) -> None:
        code, text = folders.tests(1, PASSED, FAILED, step="smoke").sanitizer("memcheck", INVALID_READ, 99).report()
        assert code == gpu_report.TESTS_FAILED
        assert "- smoke: 1 of 2 failed" in text
        assert "- memcheck: 1 errors in our kernels" in text

    @pytest.mark.parametrize(("code", "reason", "verdict"), [(5, "", "NO_TESTS"), ("-", "no time", "NOTHING_SAID")])
    def test_none_that_ran(self, folders: Folders, code: int | str, reason: str, verdict: str) -> None:
        result, text = folders.tests(0, PASSED).step("smoke", code, reason).report()
        assert result == getattr(gpu_report, verdict)
        assert "- smoke: none ran on the GPU" in text


class TestPicture:
    def test_it_shows_every_gate(self, folders: Folders) -> None:
        pytest.importorskip("matplotlib")
        host = gate_record("400x64/one/adamw/amp-clip/cuda", limits={"host_us": 60})
        host["host_us"] = {"median": 45.0, "low": 44.0, "high": 46.0}
        _, text = folders.tests(0, PASSED).gates(0, gate_record(), host).report(plot=True)
        assert (folders.out / "gates.png").stat().st_size > 10_000
        assert "![gates](gates.png)" in text
        assert "| 45.0 µs (≤ 60) |" in text

    def test_without_matplotlib_the_reason_is_there(self, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
        code, text = folders.tests(0, PASSED).gates(0, gate_record()).report(plot=True)
        assert code == gpu_report.GOOD
        assert "did not run: matplotlib is not installed" in text
        assert "gates.png" not in text


# Stands in for python3: the report is the real one, all that would need a GPU is made up.
PYTHON = """\
#!/usr/bin/env bash
arguments="$*"
case "$arguments" in
  ".ci/gpu_report.py --environment "*) echo "GPU  made up" >"$3"; echo 90 ;;
  .ci/gpu_report.py*" --plot") [ -z "${{FAKE_PLOT-}}" ] || exec "{python}" "$@" ;;
  .ci/gpu_report.py*) exec "{python}" "$@" ;;
  csrc/build.py*) [ "$FUSEDOPT_CUDA_ARCHS" = 90 ] && exit "${{FAKE_BUILD:-0}}" ;;
  "-m pytest -m gpu "*test_gpu_smoke.py*)
    echo "smoke: waits ${{CUDA_LAUNCH_BLOCKING-0}}"
    cp "{smoke}" "${{arguments##*--junit-xml=}}"
    exit "${{FAKE_SMOKE:-0}}" ;;
  ".ci/gpu_shards.py --deal "*'-k not triton')
    echo "tests begin"
    ${{FAKE_HANG:+sleep 60}}
    cp "{junit}" "$4"
    exit "${{FAKE_TESTS:-0}}" ;;
  ".ci/gpu_shards.py "*" -m gpu "*" -k triton")
    [ -d "$(dirname "$TRITON_CACHE_DIR")" ] || exit 98
    cp "{triton}" "$3"
    exit "${{FAKE_TRITON_TESTS:-0}}" ;;
  "-m fusedopt info --warmup") echo "warm-up took ${{FAKE_WARMUP:-no time}}"; [ -z "${{FAKE_WARMUP-}}" ] ;;
  "-m benchmarks.gate "*)
    echo "gates: $arguments"
    xml=${{arguments##*--json }}
    cp "{results}" "${{xml%% *}}"
    exit 0 ;;
  -c*TritonBackend*) echo "${{FAKE_KERNELS-}}"; echo "${{FAKE_TRITON-}}" ;;
  *) exit 99 ;;
esac
"""
SANITIZER = """\
#!/usr/bin/env bash
tool=$2
${{FAKE_SLOW:+sleep $FAKE_SLOW}}
echo "sanitizer: $*"
while [ "$1" != --log-file ]; do shift; done
printf '%s\\n' "========= COMPUTE-SANITIZER" "========= ERROR SUMMARY: 0 errors" >"$2"
while [[ "$1" != --junit-xml=* ]]; do shift; done
cp "{junit}" "${{1#--junit-xml=}}"
echo "$tool ends"
"""
# What nvcc makes is the microbenchmark, which writes as much as the log may hold where that is asked.
NVCC = """\
#!/usr/bin/env bash
while [ "$1" != -o ]; do shift; done
cat >"$2" <<'MICRO'
#!/usr/bin/env bash
while [ "$1" != --json ]; do shift; done
[ -z "$FAKE_FLOOD" ] || head -c 17000000 /dev/zero | tr '\\0' x
cp "{bandwidth}" "$2"
exit "${{FAKE_MICRO:-0}}"
MICRO
[ -z "${{FAKE_NVCC-}}" ] && chmod +x "$2"
"""
NCU = """\
#!/usr/bin/env bash
while [ "$1" != --log-file ]; do shift; done
cp "{counters}" "$2"
while [ "$1" != --profile ]; do shift; done
cp "{launches}" "$3"
exit "${{FAKE_NCU:-0}}"
"""


@pytest.fixture
def fake(tmp_path: Path) -> dict[str, str]:
    """The environment of a job for which a GPU and tools are made up."""
    (tmp_path / "bin").mkdir()
    files = {
        "junit": junit(PASSED),
        "smoke": junit(PASSED),
        "triton": junit(PASSED, PASSED),
        "results": json.dumps({"complete": True, "gates": [gate_record()]}),
        "bandwidth": bandwidth_lines(),
        "counters": COUNTERS,
        "launches": LAUNCHES,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = {"python": sys.executable, **{name: tmp_path / name for name in files}}
    quiet = "#!/usr/bin/env bash\n"
    scripts = {"python3": PYTHON, "compute-sanitizer": SANITIZER, "nvcc": NVCC, "ncu": NCU}
    for name, text in {**scripts, "cmake": quiet, "ninja": quiet}.items():
        path = tmp_path / "bin" / name
        path.write_text(text.format(**names))
        path.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "FUSEDOPT_ARTIFACTS": str(tmp_path / "artifacts"),
        "FUSEDOPT_BUILD_DIR": str(tmp_path / "build"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step_summary.md"),
    }


def run_job(environment: dict[str, str], *steps: str) -> tuple[int, str]:
    """Exit code and summary, which the output ends with; the log is the output."""
    command = ["bash", ROOT / ".ci" / "gpu", *steps]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    folder = Path(environment["FUSEDOPT_ARTIFACTS"])
    text = (folder / "summary.md").read_text()
    assert result.stdout.endswith(f"\n{text}"), result.stdout + result.stderr
    assert (folder / "log.txt").read_text() == result.stdout[-gpu_report.MOST_BYTES :]
    files = list(folder.iterdir())
    assert len(files) <= 8
    assert all(path.is_file() and path.stat().st_size <= 16 * 2**20 for path in files)
    return result.returncode, text


def steps_of(text: str) -> list[str]:
    """The steps that a summary shows, in their order."""
    rows = text.partition("## Steps")[2].partition("\n\n- ")[0].partition("\n## ")[0]
    return [line.split("|")[1].strip() for line in rows.splitlines() if line.startswith("| ")][2:]


@contextlib.contextmanager
def hanging_job(fake: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """The job, in a session of its own, once its tests have begun, which do not end."""
    command, environment = ["bash", ROOT / ".ci" / "gpu"], {**fake, "FAKE_HANG": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as job:
        assert job.stdout is not None
        while "tests begin" not in job.stdout.readline():
            pass
        yield job


@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils")
class TestScript:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_so_at_once(self, tmp_path: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        begin = time.monotonic()
        code, text = run_job(
            {**os.environ, "PATH": path, "FUSEDOPT_ARTIFACTS": str(tmp_path), "GITHUB_STEP_SUMMARY": ""}
        )
        assert code == 3
        assert "environment: no GPU: torch" in text or "python3 has no" in text
        assert time.monotonic() - begin < 60
        assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "summary.md"]

    def test_every_step_runs(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_PLOT": "1"})
        assert code == 0, text
        order = ["environment", "micro-build", "build", "smoke", "micro", "tests", "gates", "mixed"]
        order += ["memcheck", "racecheck", "initcheck", "synccheck", "ncu", "warmup", "triton", "triton-gates", "plot"]
        found = steps_of(text)
        assert sorted(found) == sorted(order)
        assert [name for name in found if name != "micro-build"] == [name for name in order if name != "micro-build"]
        assert text.count(" | done | ") == len(order)
        for name in gpu_report.PASSES:
            assert f"| {name} | clean | 1 | 0 | 0 |" in text
        assert "| adamw bf16-grads | 90.0% |" in text
        assert "| adamw fp32 update | 28 |" in text
        assert "warm-up took no time" in text
        assert "| triton | done |" in text
        assert "2 passed, 0 failed" in text.partition("of the Triton backend")[2]
        artifacts = Path(fake["FUSEDOPT_ARTIFACTS"])
        assert gpu_report.read_junit(artifacts / "junit.xml").passed == 4
        assert len(json.loads((artifacts / "results.json").read_text())["gates"]) == 3
        assert Path(fake["GITHUB_STEP_SUMMARY"]).read_text() == text
        log = (artifacts / "log.txt").read_text()
        assert "smoke: waits 1" in log
        gates = [line for line in log.splitlines() if line.startswith("gates: ")]
        assert [line.partition(".json ")[2] for line in gates] == [
            "--dtype fp32 --without fusedopt-triton",
            "--dtype bf16 --dtype bf16-grads --without fusedopt-triton",
            "--about fusedopt-triton",
        ]
        assert len(list(artifacts.iterdir())) == 8

    def test_a_failing_smoke_step_is_looked_at_and_ends_it(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "smoke").write_text(junit(PASSED, FAILED))
        code, text = run_job({**fake, "FAKE_SMOKE": "1"})
        assert code == 1
        assert "- smoke: 1 of 2 failed" in text
        assert [name for name in steps_of(text) if "build" not in name] == ["environment", "smoke", "memcheck"]
        log = (Path(fake["FUSEDOPT_ARTIFACTS"]) / "log.txt").read_text()
        (line,) = [line for line in log.splitlines() if line.startswith("sanitizer: ")]
        assert "tests/test_gpu_smoke.py" in line

    def test_a_smoke_step_that_crashes_ends_it_too(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "smoke").write_text("")
        (tmp_path / "bin" / "compute-sanitizer").unlink()
        code, text = run_job({**fake, "FAKE_SMOKE": "139"})
        assert code == 1
        assert "- smoke: pytest ended with exit code 139" in text
        assert [name for name in steps_of(text) if "build" not in name] == ["environment", "smoke", "memcheck"]

    def test_the_sanitizers_run_at_once(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_SLOW": "1"}, "sanitizer")
        assert code == 0, text
        seconds = [int(row.split("|")[3].split()[0]) for row in text.splitlines() if "check | done" in row]
        assert len(seconds) == 4
        assert max(seconds) <= 3, "each waits for a second"

    def test_steps_can_be_run_by_name(self, fake: dict[str, str]) -> None:
        for environment, names in ((fake, ("smoke", "micro")), ({**fake, "FUSEDOPT_GPU_ONLY": "mixed"}, ())):
            code, text = run_job(environment, *names)
            assert code == 0, text
            wanted = [name for name in steps_of(text) if name not in ("environment", "build", "micro-build", "plot")]
            assert wanted == list(names or ["mixed"])
            assert "- not asked for: " in text
        assert "micro-build" not in steps_of(text), "it is up to date"

    @pytest.mark.parametrize("how", ["argument", "FUSEDOPT_GPU_ONLY", "FUSEDOPT_GPU_SKIP"])
    def test_an_unknown_step_is_refused(self, fake: dict[str, str], how: str) -> None:
        code, text = run_job(fake, "bench") if how == "argument" else run_job({**fake, how: "gates bench"})
        assert code == 3
        assert "there is no step bench; there are: smoke micro tests gates" in text

    @pytest.mark.parametrize("name", ["FAKE_NVCC", "FAKE_MICRO"])
    def test_without_the_microbenchmark_all_else_runs(self, fake: dict[str, str], name: str) -> None:
        code, text = run_job({**fake, name: "1"})
        assert code == 3
        assert "- micro: " in text
        assert "| tests | done |" in text

    def test_without_ncu_all_else_runs(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "bin" / "ncu").unlink()
        code, text = run_job(fake)
        assert code == 0, text
        assert "| ncu | did not run: ncu is not on PATH |" in text or shutil.which("ncu")

    def test_kernels_that_do_not_load_leave_the_tests_to_say_so(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "junit").write_text(junit())
        code, text = run_job({**fake, "FAKE_KERNELS": "this build has kernels for sm_80", "FAKE_TESTS": "5"})
        assert code == 4
        assert "tests: none ran on the GPU: this build has kernels for sm_80" in text
        for name in ("smoke", "micro", "gates", "mixed", "memcheck", "synccheck", "ncu", "triton-gates"):
            assert f"| {name} | did not run: the kernels do not load |" in text
        assert "| triton | done |" in text

    def test_a_flood_of_output_does_not_make_the_log_too_large(self, fake: dict[str, str]) -> None:
        code, _ = run_job({**fake, "FAKE_FLOOD": "1"}, "micro")
        assert code == 0

    def test_what_was_done_is_there_when_it_is_killed(self, fake: dict[str, str]) -> None:
        with hanging_job(fake) as job:
            os.killpg(job.pid, signal.SIGKILL)
        artifacts = Path(fake["FUSEDOPT_ARTIFACTS"])
        text = (artifacts / "summary.md").read_text()
        assert "Exit code 0 so far." in text
        assert "| smoke | done |" in text and "| micro | done |" in text
        assert (artifacts / "bandwidth.jsonl").read_text() == bandwidth_lines()

    def test_the_default_budget_ends_within_570_seconds(self) -> None:
        """With the last step's grace, the picture's limit and a second or two."""
        text = (ROOT / ".ci" / "gpu").read_text()
        budget = int(text.partition("budget=${FUSEDOPT_GPU_BUDGET:-")[2].partition("}")[0])
        grace = int(text.partition("timeout -s INT -k ")[2].partition(" ")[0])
        picture = sum(map(int, text.partition("timeout -k ")[2].split()[:2]))
        assert budget + grace + picture + 5 <= 570

    def test_failed_tests_do_not_keep_the_rest_from_running(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "junit").write_text(junit(FAILED))
        code, text = run_job({**fake, "FAKE_TESTS": "1"})
        assert code == 1
        assert "| gates | done |" in text

    def test_without_triton_all_else_runs(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_TRITON": "triton is not installed (No module named 'triton')"})
        assert code == 0, text
        assert text.count("did not run: triton is not installed") == 3
        assert "| gates | done |" in text
        log = (Path(fake["FUSEDOPT_ARTIFACTS"]) / "log.txt").read_text()
        assert "--about" not in log

    def test_triton_s_tests_count_as_the_others(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "triton").write_text(junit(PASSED, FAILED))
        code, text = run_job({**fake, "FAKE_TRITON_TESTS": "1"})
        assert code == 1
        assert "triton: 1 of 2 failed" in text
        assert "| memcheck | clean | 1 |" in text

    def test_triton_s_tests_are_not_begun_with_little_time(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FUSEDOPT_GPU_BUDGET": "55"})
        assert code == 3
        assert "- triton: none ran on the GPU: no time was left" in text
        assert "| gates | done |" in text

    def test_a_warm_up_that_fails_does_not_fail_the_job(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_WARMUP": "a bad turn"})
        assert code == 0, text
        assert "| warmup | exit code 1 |" in text
        assert "warm-up took a bad turn" in text

    def test_a_failed_build_ends_it(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_BUILD": "7"})
        assert code == 3
        assert "build: exit code 7" in text
        assert "| tests |" not in text

    def test_a_broken_floor(self, fake: dict[str, str], tmp_path: Path) -> None:
        content = {"complete": True, "gates": [gate_record(ratio=1.0)]}
        (tmp_path / "results").write_text(json.dumps(content))
        assert run_job(fake)[0] == 2

    def test_steps_can_be_left_out(self, fake: dict[str, str]) -> None:
        names = "gates mixed sanitizer warmup triton triton-gates"
        code, text = run_job({**fake, "FUSEDOPT_GPU_SKIP": names})
        assert code == 0
        assert f"- left out by FUSEDOPT_GPU_SKIP: {', '.join(names.split())}" in text
        assert "Triton backend" not in text
        assert "## Floors" not in text

    def test_without_time_nothing_starts(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FUSEDOPT_GPU_BUDGET": "5"})
        assert code == 3
        assert "build: did not run: no time was left" in text

    def test_without_python_there_is_a_summary_too(self, fake: dict[str, str], tmp_path: Path) -> None:
        (tmp_path / "bin" / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
        code, text = run_job(fake)
        assert code == 3
        assert "environment" in text

    def test_stopped_from_outside_it_still_reports(self, fake: dict[str, str]) -> None:
        with hanging_job(fake) as job:
            os.killpg(job.pid, signal.SIGTERM)
            rest = job.stdout.read()
            assert job.wait(timeout=30) == 3
        assert "stopped: the job was stopped from outside" in rest
        assert "stopped from outside" in (Path(fake["FUSEDOPT_ARTIFACTS"]) / "summary.md").read_text()

    @pytest.mark.slow
    def test_tests_that_hang_are_ended(self, fake: dict[str, str]) -> None:
        code, text = run_job({**fake, "FAKE_HANG": "1", "FUSEDOPT_GPU_BUDGET": "13"})
        assert code == 1
        assert "tests: timed out after" in text


def test_of_torch_s_warnings_one_is_no_error() -> None:
    """torch gives it once in a process that asks for errors where the host waits, as the GPU tests do."""
    whole = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    warnings.warn(whole, UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
