"""The GPU job (.ci/gpu): what there is to run on, the verdict, the artifacts, and with matplotlib the picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_figures import (
    bandwidth_summary,
    counter_table,
    read_counters,
    read_lines,
    readable,
    seconds,
    table,
    why_no_counters,
)
from gpu_readings import Pass, Step, Tests, judge_pass, merge_junit, read_junit, read_steps

GOOD, TESTS_FAILED, TOO_SLOW, NOTHING_SAID, NO_TESTS, SANITIZER_ERRORS = range(6)
MEANINGS = {
    GOOD: "all is well",
    TESTS_FAILED: "tests failed",
    TOO_SLOW: "a floor on speed is broken",
    NOTHING_SAID: "nothing can be said",
    NO_TESTS: "no GPU test ran",
    SANITIZER_ERRORS: "compute-sanitizer found errors",
}
#: Which of several exit codes is the job's.
PRECEDENCE = (TESTS_FAILED, NO_TESTS, SANITIZER_ERRORS, TOO_SLOW, NOTHING_SAID)
#: Steps without which the others do not run, and the job being stopped.
REQUIRED = ("environment", "build", "stopped")
#: Steps that run tests, with the heading of what they found.
TEST_STEPS = {
    "smoke": "Smoke tests",
    "tests": "Tests marked gpu",
    "triton": "Tests marked gpu, of the Triton backend",
}
#: Steps that check floors on speed.
GATE_STEPS = ("gates", "mixed", "triton-gates")
PASSES = ("memcheck", "racecheck", "initcheck", "synccheck")
MODULES = ("torch", "numpy", "pytest", "pytest_benchmark", "hypothesis")
MOST_NAMES = 20
#: Characters of the summary, which is to be read from the end of a log that may have been cut.
MOST_CHARACTERS = 11_000
#: Bytes of an artifact.
MOST_BYTES = 15 * 2**20


@dataclass
class Job:
    """All that the steps have left."""

    environment: str
    steps: dict[str, Step]
    tests: dict[str, Tests | None]
    passes: list[Pass]
    results: dict[str, dict[str, Any]]
    warmup: str
    bandwidth: str
    counters: str

    @classmethod
    def load(cls, work: Path) -> Job:
        """Read the folder of the steps."""
        steps = read_steps(work / "steps.tsv")
        passes = []
        for name in PASSES:
            if name in steps:
                log = work / f"{name}.log"
                text = log.read_text(errors="replace") if log.exists() else None
                passes.append(judge_pass(steps[name], text, read_junit(work / f"{name}.xml")))
        results = {}
        for name in GATE_STEPS:
            try:
                results[name] = json.loads((work / f"{name}.json").read_text())
            except (OSError, ValueError):
                continue
        environment, warmup = (
            path.read_text(errors="replace").strip() if path.exists() else ""
            for path in (work / "environment.txt", work / "warmup.txt")
        )
        tests = {name: read_junit(work / f"{name}.xml") for name in TEST_STEPS}
        bandwidth = readable(lambda: bandwidth_summary(read_lines(work / "bandwidth.jsonl")))
        launches = read_lines(work / "profile.jsonl")
        counters = readable(lambda: counter_table(read_counters(work / "ncu.csv"), launches))
        counters = counters or why_no_counters(work / "ncu.csv")
        return cls(environment, steps, tests, passes, results, warmup, bandwidth, counters)

    @property
    def gates(self) -> list[dict[str, Any]]:
        """The records of benchmarks.gate."""
        return [gate for found in self.results.values() for gate in found["gates"]]

    def judge(self) -> tuple[int, list[str]]:
        """The exit code, and what led to it."""
        for name in REQUIRED:
            step = self.steps.get(name)
            if step and step.code != 0:
                return NOTHING_SAID, [f"{name}: {step.outcome}"]
        if not self.steps:
            return NOTHING_SAID, ["nothing ran"]
        tests = [finding for name in TEST_STEPS for finding in self._judge_tests(name)]
        gates = [finding for name in GATE_STEPS for finding in self._judge_gates(name)]
        found = [*tests, *self._judge_passes(), *gates, *self._judge_measures()]
        code = next((code for code in PRECEDENCE if any(code == other for other, _ in found)), GOOD)
        return code, [text for _, text in found]

    def _judge_tests(self, name: str) -> Iterable[tuple[int, str]]:
        step, tests = self.steps.get(name), self.tests[name]
        if step is None or step.left_out:
            return
        if tests and tests.failures:
            yield TESTS_FAILED, f"{name}: {len(tests.failures)} of {tests.ran} failed"
        if step.timed_out:
            yield TESTS_FAILED, f"{name}: timed out after {step.seconds} s"
        elif step.code is not None and step.code not in (0, 1, 5) and not (tests and tests.failures):
            yield TESTS_FAILED, f"{name}: pytest ended with exit code {step.code}"
        elif step.code is None or not (tests and tests.ran):
            kernels = self.steps.get("kernels") if name != "triton" else None
            reason = f": {kernels.reason}" if kernels else f": {step.reason}" if step.reason else ""
            none = name == "tests" or (name == "smoke" and step.code is not None)
            yield NO_TESTS if none else NOTHING_SAID, f"{name}: none ran on the GPU{reason}"
        elif step.code == 1 and not tests.failures:
            yield TESTS_FAILED, f"{name}: pytest failed"

    def _judge_passes(self) -> Iterable[tuple[int, str]]:
        for result in self.passes:
            if result.verdict == "errors":
                yield SANITIZER_ERRORS, f"{result.name}: {result.ours} errors in our kernels"

    def _judge_gates(self, name: str) -> Iterable[tuple[int, str]]:
        step, results = self.steps.get(name), self.results.get(name)
        if step is None or step.left_out:
            return
        for gate in results["gates"] if results else []:
            if gate["broken"]:
                about = f"{gate['case']}: {gate['ours']} against {gate['rival']}"
                yield TOO_SLOW, f"{name}: {about}: {', '.join(gate['broken'])}"
            elif gate["verdict"] != "holds":
                yield NOTHING_SAID, f"{name}: {gate['error'] or gate['case'] + ': not checked'}"
        if step.code is None or not results or not results["complete"]:
            yield NOTHING_SAID, f"{name}: not all were checked: {step.outcome}"

    def _judge_measures(self) -> Iterable[tuple[int, str]]:
        step = self.steps.get("micro")
        if step and step.code != 0 and not step.left_out:
            yield NOTHING_SAID, f"micro: {step.outcome}"


def gate_table(gates: list[dict[str, Any]]) -> str:
    """The verdicts, and what was measured, each beside what is asked."""

    def bound(gate: dict[str, Any], name: str, form: str) -> str:
        limit = gate["limits"].get(name)
        return "" if limit is None else f" ({'≤' if name == 'host_us' else '≥'} {form.format(limit)})"

    rows = []
    for gate in sorted(gates, key=lambda gate: gate["verdict"] == "holds"):
        ratio, share, host = (gate.get(name) for name in ("ratio", "bandwidth", "host_us"))
        interval = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
        rows.append(
            [
                gate["case"].replace("/cuda", ""),
                f"{gate['ours']} : {gate['rival']}".replace("fusedopt-", ""),
                seconds(gate.get("seconds")),
                interval + bound(gate, "ratio", "{:g}"),
                (f"{share['median']:.1%}" if share else "") + bound(gate, "bandwidth", "{:.0%}"),
                (f"{host['median']:.1f} µs" if host else "") + bound(gate, "host_us", "{:g}"),
                gate["verdict"],
            ]
        )
    return table(["case", "whose : against", "time", "ratio", "of the bandwidth", "host, warm", "verdict"], rows)


def step_table(steps: list[Step]) -> str:
    """What ran for how long; those that nobody has asked for are named in a line below."""
    unwanted = ("not asked for", "left out by FUSEDOPT_GPU_SKIP")
    rows = [[step.name, step.outcome, f"{step.seconds} s"] for step in steps if step.reason not in unwanted]
    lines = [table(["step", "outcome", "time"], rows)]
    for reason in unwanted:
        if names := [step.name for step in steps if step.reason == reason]:
            lines += ["", f"- {reason}: {', '.join(names)}"]
    return "\n".join(lines)


def pass_table(passes: list[Pass]) -> str:
    """The tools of compute-sanitizer, and what they found in our kernels."""
    head = ["tool", "verdict", "tests", "in our kernels", "elsewhere"]
    rows = [
        [
            result.name,
            result.verdict + (f": {result.reason}" if result.reason else ""),
            *map(str, (result.tests, result.ours, result.others)),
        ]
        for result in passes
    ]
    found = [f"- {result.name}: {text}" for result in passes for text in dict.fromkeys(result.findings)]
    return "\n".join([table(head, rows), *([""] if found else []), *found[:MOST_NAMES]])


def test_list(tests: Tests) -> str:
    """How many there were, and the first that failed."""
    lines = [f"{tests.passed} passed, {len(tests.failures)} failed, {tests.skipped} skipped."]
    lines += ["", *(f"- `{failure}`" for failure in tests.failures[:MOST_NAMES])] if tests.failures else []
    if len(tests.failures) > MOST_NAMES:
        lines.append(f"- and {len(tests.failures) - MOST_NAMES} more, in junit.xml")
    return "\n".join(lines)


def summary(job: Job, pictures: Sequence[str] = (), unfinished: bool = False) -> str:
    """The job as a page: what matters most comes first, and what there is no room for is named."""
    code, reasons = job.judge()
    lines = [f"# GPU job: {MEANINGS[code]}", "", f"Exit code {code}{' so far' if unfinished else ''}."]
    lines += [""] * bool(reasons) + [f"- {reason}" for reason in reasons[: 2 * MOST_NAMES]]
    if len(reasons) > 2 * MOST_NAMES:
        lines.append(f"- and {len(reasons) - 2 * MOST_NAMES} more")
    if job.environment:
        lines += ["", "```", job.environment, "```"]
    sections = {"Steps": step_table(list(job.steps.values()))}
    tests = {heading: tests for name, heading in TEST_STEPS.items() if (tests := job.tests[name])}
    sections |= {heading: test_list(found) for heading, found in tests.items()}
    sections["Share of a copy's bandwidth, by elements to a chunk"] = job.bandwidth
    sections["Floors on speed"] = gate_table(job.gates) if job.gates else ""
    sections["compute-sanitizer"] = pass_table(job.passes) if job.passes else ""
    sections["Bytes per element, under ncu"] = job.counters
    sections["First steps of the Triton backend"] = f"```\n{job.warmup}\n```" if job.warmup else ""
    text = "\n".join(lines).rstrip() + "\n"
    omitted = []
    for heading, content in sections.items():
        section = f"\n## {heading}\n\n{content}\n"
        if content and len(text) + len(section) > MOST_CHARACTERS - 600:
            omitted.append(heading)
        elif content:
            text += section
    if omitted:
        text += f"\nNo room here, but among the artifacts: {'; '.join(omitted)}.\n"
    return text + "".join(f"\n![{Path(name).stem}]({name})\n" for name in pictures)


def draw(gates: list[dict[str, Any]], path: Path) -> str | None:
    """Bars of the ratios and of the shares of the bandwidth, with what is asked of them; or why there are none."""
    gates = [gate for gate in gates if "ratio" in gate]
    if not gates:
        return "no floors were checked"
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = 1.2 + 0.4 * len(gates)
    figure, panels = plt.subplots(1, 2, figsize=(11, height), sharey=True, layout="constrained")
    for axes, key, factor in zip(panels, ("ratio", "bandwidth"), (1, 100), strict=True):
        for row, gate in enumerate(gates):
            if key in gate:
                median, low, high = (factor * gate[key][part] for part in ("median", "low", "high"))
                colour = "#d1495b" if key in gate["broken"] else "#30638e"
                axes.barh(row, median, xerr=[[max(0.0, median - low)], [max(0.0, high - median)]], color=colour)
            if key in gate["limits"]:
                limit = factor * gate["limits"][key]
                axes.plot([limit, limit], [row - 0.45, row + 0.45], color="black")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set(xscale="log", xlabel="times as long as the contender: its rival (line: floor)")
    panels[1].set(xlabel="% of a copy's bandwidth (line: floor)")
    names = [f"{gate['case'].replace('/cuda', '')}\n{gate['ours']} : {gate['rival']}" for gate in gates]
    panels[0].set_yticks(range(len(gates)), names, fontsize=7)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None


def collect(job: Job, work: Path, out: Path) -> None:
    """Make the artifacts of what the steps have left: few, and none of them large."""
    merge_junit([work / f"{name}.xml" for name in TEST_STEPS], out / "junit.xml")
    if job.results:
        about, *_ = job.results.values()
        content = {key: about[key] for key in ("fusedopt", "torch", "device") if key in about}
        content["complete"] = all(found["complete"] for found in job.results.values())
        content["gates"] = [{"step": name, **gate} for name, found in job.results.items() for gate in found["gates"]]
        (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    logs = [work / f"{name}.log" for name in PASSES if (work / f"{name}.log").exists()]
    if logs:
        with (out / "sanitizer.txt").open("w") as file:
            for log in logs:
                file.write(f"== {log.stem}\n{log.read_text(errors='replace')[: MOST_BYTES // 8]}\n")
    for name in ("bandwidth.jsonl", "ncu.csv"):
        if (work / name).exists():
            (out / name).write_bytes((work / name).read_bytes()[:MOST_BYTES])
    junit = out / "junit.xml"
    if junit.exists() and junit.stat().st_size > MOST_BYTES:  # half an XML would be none
        junit.unlink()


def report(work: Path, out: Path, unfinished: bool = False) -> int:
    """Write the artifacts and print the summary; returns the job's exit code."""
    job = Job.load(work)
    code, _ = job.judge()
    pictures = [name for name in ("gates.png",) if (out / name).exists()]
    text = summary(job, pictures, unfinished)
    (out / "summary.md").write_text(text)
    collect(job, work, out)
    print(text)
    return code


def plot(work: Path, out: Path) -> int:
    """Draw the floors, if any were checked, and note how that went."""
    job = Job.load(work)
    if not set(GATE_STEPS) & {name for name, step in job.steps.items() if not step.left_out}:
        return 0
    try:
        reason = draw(job.gates, out / "gates.png")
    except Exception as error:  # the picture must not cost the summary
        reason = f"{type(error).__name__}: {error}"
    with (work / "steps.tsv").open("a") as file:
        file.write(f"plot\t{'-' if reason else 0}\t0\t{reason or ''}\n")
    return 0


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(module: str) -> str:
    try:
        return importlib.import_module(module).__version__
    except ImportError:
        return "not installed"


def environment(path: Path) -> int:
    """Write what there is to run on, and print the GPU's compute capability; or print what is missing."""
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"python3 has no {' and no '.join(missing)}")
        return 1
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"no GPU: torch {torch.__version__}, {built}, finds no usable CUDA device")
        return 1
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        print(f"the GPU has compute capability {major}.{minor}; 8.0 is needed")
        return 1
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    gpus = re.sub(r" \(UUID: [^)]*\)", "", _output("nvidia-smi", "-L"))
    nvcc = re.search(r"release .*", _output("nvcc", "--version"))
    rows = {
        "GPU": f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, of {torch.cuda.device_count()}",
        "nvidia-smi -L": gpus.replace("\n", "; ") or "no answer",
        "driver": driver or "unknown",
        "nvcc": nvcc[0] if nvcc else "not found",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": _version("triton"),
        "Python": f"{platform.python_version()}, {os.cpu_count()} processors",
        "commit": _output("git", "rev-parse", "--short=9", "HEAD") or "unknown",
    }
    path.write_text("".join(f"{key:<14} {value}\n" for key, value in rows.items()))
    print(f"{major}{minor}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Report, or draw, or look at the environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, help="write what there is to run on to this file, and no report")
    parser.add_argument("--work", type=Path, help="folder with what the steps have left")
    parser.add_argument("--out", type=Path, help="folder of the artifacts")
    parser.add_argument("--plot", action="store_true", help="draw the picture, and write no report")
    parser.add_argument("--unfinished", action="store_true", help="say in the report that the job goes on")
    arguments = parser.parse_args(argv)
    if arguments.environment:
        return environment(arguments.environment)
    if arguments.plot:
        return plot(arguments.work, arguments.out)
    return report(arguments.work, arguments.out, arguments.unfinished)


if __name__ == "__main__":
    sys.exit(main())
