"""Reads what the steps of the GPU job have left behind: exit codes, test results and the sanitizers' findings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

#: Reasons of a step not to run that nobody has to mend.
LEFT_OUT = (
    "left out by FUSEDOPT_GPU_SKIP",
    "not asked for",
    "triton is not installed",
    "or later is needed",
    "ncu is not on PATH",
)


@dataclass(frozen=True)
class Step:
    """A step of the job; ``code`` is None when it did not run, for ``reason``."""

    name: str
    code: int | None
    seconds: int
    reason: str = ""

    @property
    def timed_out(self) -> bool:
        """Whether ``timeout`` ended it."""
        return self.code in (124, 137)

    @property
    def left_out(self) -> bool:
        """Whether it did not run, and nothing is amiss."""
        return self.code is None and any(text in self.reason for text in LEFT_OUT)

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.code is None:
            return f"did not run: {self.reason}"
        if self.reason:
            return self.reason
        return "done" if self.code == 0 else "timed out" if self.timed_out else f"exit code {self.code}"


def read_steps(path: Path) -> dict[str, Step]:
    """The lines that `note` of .ci/gpu wrote, by name."""
    steps = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        name, code, seconds, reason = line.split("\t")
        steps[name] = Step(name, None if code == "-" else int(code), int(seconds), reason)
    return steps


@dataclass
class Tests:
    """A run of pytest. An error in set-up or collection is a failure; an expected failure is not counted as run."""

    passed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ran(self) -> int:
        """Those that were executed."""
        return self.passed + len(self.failures)


def read_junit(path: Path) -> Tests | None:
    """The tests in a JUnit XML, or None when there is no (whole) one."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    tests = Tests()
    for case in root.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
            if name not in tests.failures:  # a test that fails, and then in tear-down too, is there twice
                tests.failures.append(name)
        elif case.find("skipped") is not None:
            tests.skipped += 1
        else:
            tests.passed += 1
    return tests


def merge_junit(paths: Iterable[Path], out: Path) -> None:
    """Put the test suites of several JUnit XMLs into one, without those that are missing or not whole."""
    merged = ElementTree.Element("testsuites")
    for path in paths:
        try:
            merged.extend(ElementTree.parse(path).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            continue
    if len(merged):
        ElementTree.ElementTree(merged).write(out, encoding="utf-8", xml_declaration=True)


@dataclass
class Pass:
    """A run under one of compute-sanitizer's tools: ``clean``, ``errors``, or ``skipped`` for ``reason``.

    ``ours`` counts the findings in this package's kernels, ``others`` those elsewhere, which are not ours to mend.
    """

    name: str
    verdict: str
    reason: str = ""
    ours: int = 0
    others: int = 0
    tests: int = 0
    findings: list[str] = field(default_factory=list)


def read_findings(log: str) -> tuple[list[str], list[str]]:
    """The findings in a log of compute-sanitizer: those in our kernels, and the others.

    A finding is a headline and indented lines that tell where. What the tool says of itself has no such lines, and a
    race that it warns of is not an error.
    """
    records: list[list[str]] = []
    for line in log.splitlines():
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========")
        if text.startswith("  ") and records:
            records[-1].append(text.strip())
        elif text.strip():
            records.append([text.strip()])
    about_itself = r"COMPUTE-SANITIZER|[A-Z]+ SUMMARY|Target application|Internal Sanitizer|(Error|Warning): (?!Race)"
    found: tuple[list[str], list[str]] = [], []
    for headline, *places in records:
        if re.match(about_itself, headline) or headline.lower().startswith("warn"):
            continue
        if places or "Race reported" in headline:
            found["fusedopt" not in " ".join([headline, *places])].append(" ".join([headline, *places[:1]]))
    return found


def judge_pass(step: Step, log: str | None, tests: Tests | None) -> Pass:
    """What a run under compute-sanitizer says, from its log and the tests that ran under it."""
    log = log or ""
    ran = tests.ran if tests else 0
    ours, others = read_findings(log)
    result = Pass(step.name, "skipped", "", len(ours), len(others), ran, ours)
    summaries = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY:.*\()(\d+) error", log)
    if ours:
        result.verdict = "errors"
    elif step.code is None:
        result.reason = step.reason
    elif "Device not supported" in log:
        result.reason = "it does not support this device"
    elif step.timed_out:
        result.reason = f"timed out after {step.seconds} s"
    elif not ran:
        words = [line.removeprefix("=========").strip() for line in log.splitlines() if "Error" in line]
        result.reason = f"it ended before any test had run ({words[-1] if words else f'exit code {step.code}'})"
    elif sum(map(int, summaries)) and not others:
        result.verdict, result.ours = "errors", sum(map(int, summaries))
        result.reason = "its summary counts errors, and the log does not say where"
    elif not summaries:
        result.reason = "its log has no summary"
    elif tests and tests.failures:
        result.reason = f"{len(tests.failures)} of {ran} tests failed under it, without a finding"
    elif "Internal Sanitizer Error" in log:
        result.reason = "it could not follow every launch"
    else:
        result.verdict = "clean"
    return result
