"""``python -m benchmarks.pages`` writes the measured figures of README.md and docs/ from the JSON of `make measure`.

A page has its generated parts between ``<!-- results: name -->`` and ``<!-- end of results -->``; SECTIONS makes the
text for each name. Nothing is measured here, and a figure that is in no JSON file has no place in a page. With
``--check`` nothing is written; the exit code is 1 when a page is not what the JSON files give.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from fusedopt.bench import Result
from fusedopt.bench.contenders import OURS
from fusedopt.bench.tables import markdown, times
from fusedopt.compare.comparison import Comparison
from fusedopt.compare.figure import save_figure

from . import (
    averaging,
    case_words,
    dry,
    fewer_bytes,
    growth,
    host,
    precision,
    precision_figures,
    report,
    sharded,
    trainers,
)

ROOT = Path(__file__).parents[1]
#: The machine whose figures the pages show; what its files are named after.
MACHINE = "epyc-2core"
PAGES = ("README.md", "docs/averaging.md", "docs/benchmarks.md", "docs/precision.md", "docs/trainers.md")
END = "<!-- end of results -->"
PART = re.compile(rf"^(<!-- results: ([\w-]+) -->\n)(?:(?!<!-- ).*\n)*?({END})$", re.MULTILINE)
MARK = re.compile(rf"^(?:<!-- results: .*|{END})$", re.MULTILINE)

#: What the table of steps shows.
RECIPES = ("amp-clip", "bare")
WORKLOADS = ("64x1Mi", "vit-b", "vit-tiny", "resnet-50", "400x64", "10000x64")


class PageError(Exception):
    """A page or a JSON file is not as it should be; the message is one line."""


class Results:
    """The JSON files of a folder, read when they are asked for.

    Args:
        folder: where they are.
        machine: what they are named after.
    """

    def __init__(self, folder: Path, machine: str = MACHINE):
        self.folder, self.machine = folder, machine

    def path(self, kind: str = "") -> Path:
        """Of the JSON of one kind; of the suite without."""
        return self.folder / f"{self.machine}{'-' if kind else ''}{kind}.json"

    def content(self, kind: str) -> dict[str, Any] | None:
        """The JSON of one kind, or None while there is none."""
        path = self.path(kind)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def note(self, kind: str = "") -> str:
        """What a picture says of the file it is made from."""
        digest = hashlib.sha256(self.path(kind).read_bytes()).hexdigest()
        return f"{self.path(kind).name} sha256:{digest}"

    @cached_property
    def suite(self) -> report.Report | None:
        """The cases of the suite."""
        return report.Report.load(self.path()) if self.path().exists() else None

    @cached_property
    def demo(self) -> Comparison | None:
        """What `make demo` trains."""
        content = self.content("demo")
        return None if content is None else Comparison.from_dict(content)


def missing(results: Results, kind: str = "") -> str:
    """In place of figures that nobody has measured yet."""
    return f"*No figures yet: `make measure` writes `{results.path(kind).name}`.*"


def _on(environment: Mapping[str, Any]) -> str:
    """Where and of what figures are."""
    commit = environment["commit"]
    changed = " with changes" if commit["dirty"] else ""
    return (
        f"{environment['processor']}, {environment['cpu_capability']}, Python {environment['python']}, torch "
        f"{environment['torch']}, fusedopt {environment['fusedopt']} at {commit['id']}{changed}, {environment['date']}"
    )


def picture(results: Results) -> str:
    """The demonstration in a picture and its main figures in a sentence."""
    demo = results.demo
    if demo is None:
        return missing(results, "demo")
    parts = []
    for part, words in (("optimizer", "the optimizer's part of a step"), ("whole step", "the whole step")):
        ratios = [ratio for run in demo.timed[:-1] if (ratio := demo.ratio(part, demo.fused, run)) is not None]
        if ratios:
            parts.append(f"{words} is {' and '.join(map(str, ratios))}")
    shown = "![Loss curves and step times of the demo](docs/demo.png)"
    return f"{shown}\n\nWith {demo.fused.name} {'; '.join(parts)}." if parts else shown


def steps(results: Results) -> str:
    """One step: a row for each case that the README names."""
    suite = results.suite
    if suite is None:
        return missing(results)
    chosen = [
        result
        for result in suite.results
        if result.case.workload in WORKLOADS and result.case.recipe in RECIPES and not result.case.warm
    ]
    head = ["optimizer, recipe", "parameters", OURS]
    head += [*(f"× {label}" for label in report.COMPARED.values()), "of the memory's bandwidth"]
    about = f"{suite.title}, torch {suite.machine['torch']}:"
    return f"{about}\n\n{markdown(head, [_step(result) for result in chosen if OURS in result.times])}"


def _step(result: Result) -> list[str]:
    case = result.case
    return [
        case_words.step(case),
        case_words.parameters(case),
        times(result.seconds(OURS).median),
        *(report.ratio_cell(result, name) for name in report.COMPARED),
        f"{result.share_of_bandwidth(OURS):.0%}" if result.bandwidth else "",
    ]


def training(results: Results) -> str:
    """The demonstration's runs side by side."""
    return missing(results, "demo") if results.demo is None else report.training_section(results.demo)


def gates(results: Results) -> str:
    """The floors, and what was measured."""
    content = results.content("gates")
    if content is None:
        return missing(results, "gates")
    rows = []
    for gate in content["gates"]:
        measured = gate.get("ratio")
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**measured) if measured else ""
        rows.append([gate["case"], gate["rival"], ratio, f"{gate['limits'].get('ratio', '')}", gate["verdict"]])
    table = markdown(["case", "rival", "times as long as fusedopt [95 %]", "floor", "verdict"], rows)
    return f"torch {content['torch']}, fusedopt {content['fusedopt']}, {content['device']}:\n\n{table}"


def host_path(results: Results) -> str:
    """Where the microseconds of a step on small tensors go."""
    content = results.content("host")
    if content is None:
        return missing(results, "host")
    parts = [f"{_on(content['environment'])}; one thread, {content['rounds']} rounds:", host.time_table(content)]
    parts += [host.event_tables(events, content[events]) for events in ("instructions", "misses") if events in content]
    return "\n\n".join(parts)


def dry_steps(results: Results) -> str:
    """What a step on a GPU costs on the host, with launches that do nothing."""
    content = results.content("dry")
    if content is None:
        return missing(results, "dry")
    parts = [f"{_on(run['environment'])}; one thread, {run['rounds']} rounds." for run in content.values()]
    return "\n\n".join([*parts, dry.table(content)])


def growing(results: Results) -> str:
    """What grows with the groups, the tensors or the iterations."""
    content = results.content("host")
    if content is None or "growth" not in content:
        return missing(results, "host")
    about = f"{_on(content['environment'])}; one thread, at most {content['growth_rounds']} rounds:"
    return f"{about}\n\n{growth.growth_table(content['growth'])}"


def averages(results: Results) -> str:
    """What an update of an average takes."""
    content = results.content("averaging")
    if content is None:
        return missing(results, "averaging")
    about = f"{_on(content['environment'])}; {content['environment']['threads']} threads, {content['rounds']} rounds:"
    return f"{about}\n\n{averaging.table(content)}"


def sharded_steps(results: Results) -> str:
    """What a step on sharded parameters takes."""
    content = results.content("sharded")
    if content is None:
        return missing(results, "sharded")
    about = content["environment"]
    words = f"{about['processes']} processes, threads in each: {about['threads']}; {content['rounds']} rounds"
    return f"{_on(about)}; {words}:\n\n{sharded.table(content)}"


def under_trainers(results: Results) -> str:
    """What the optimizer's part of a step takes under other trainers."""
    content = results.content("trainers")
    if content is None:
        return missing(results, "trainers")
    return f"{_on(content['environment'])}; one thread, {content['rounds']} rounds:\n\n{trainers.table(content)}"


def precisions(results: Results) -> str:
    """Final losses in each precision."""
    content = results.content("precision")
    if content is None:
        return missing(results, "precision")
    parts = [f"{_on(content['environment'])}; one thread."]
    parts += [f"{precision.title(task)}:\n\n{precision.table(task)}" for task in content["tasks"]]
    return "\n\n".join(parts)


def fewer(results: Results) -> str:
    """What steps take whose state lies in fewer bytes."""
    content = results.content("bytes")
    if content is None:
        return missing(results, "bytes")
    about = content["environment"]
    words = f"{about['threads']} threads, {content['rounds']} rounds"
    size = f"AdamW with AMP and clipping, {content['tensors']} tensors of {content['elements']:,} elements"
    return f"{_on(about)}; {words}; {size}:\n\n{fewer_bytes.table(content)}"


SECTIONS: dict[str, Callable[[Results], str]] = {
    "demo": picture,
    "steps": steps,
    "training": training,
    "gates": gates,
    "host": host_path,
    "dry": dry_steps,
    "growth": growing,
    "averaging": averages,
    "sharded": sharded_steps,
    "trainers": under_trainers,
    "precision": precisions,
    "bytes": fewer,
}


def fill(text: str, results: Results, name: str = "the page") -> str:
    """A page with its generated parts made anew.

    Raises:
        PageError: a part has no end, or a name that SECTIONS does not have.
    """
    if 2 * len(PART.findall(text)) != len(MARK.findall(text)):
        raise PageError(f"{name}: every '<!-- results: name -->' needs a line '{END}' of its own after it")

    def made(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise PageError(f"{name}: no section {match[2]!r}; expected one of {', '.join(SECTIONS)}")
        return f"{match[1]}{SECTIONS[match[2]](results)}\n{match[3]}"

    return PART.sub(made, text)


def texts(results: Results, root: Path = ROOT) -> dict[Path, str]:
    """What every generated file of text should hold."""
    found = {root / page: fill((root / page).read_text(encoding="utf-8"), results, page) for page in PAGES}
    if results.suite is not None:
        suite = results.suite
        suite.training = results.demo  # one training run for all pages
        found[results.path().with_suffix(".md")] = report.page(suite, report.pictures(suite, results.machine))
    return found


def notes(results: Results, root: Path = ROOT) -> dict[Path, str]:
    """What every generated picture should say it is made from."""
    found = {}
    if results.suite is not None:
        for name in report.pictures(results.suite, results.machine):
            found[results.folder / name] = results.note()
    if results.demo is not None:
        found[root / "docs" / "demo.png"] = results.note("demo")
    if results.content("precision") is not None:
        for name in precision_figures.PICTURES:
            found[root / "docs" / name] = results.note("precision")
    return found


def stale(results: Results, root: Path = ROOT) -> list[Path]:
    """Generated files that are not what the JSON files give."""
    old = [
        path
        for path, text in texts(results, root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, note in notes(results, root).items():
        if not path.exists() or note.encode() not in path.read_bytes():
            old.append(path)
    return old


def write(results: Results, root: Path = ROOT) -> None:
    """Write every generated file."""
    for path, text in texts(results, root).items():
        path.write_text(text, encoding="utf-8")
    if results.suite is not None:
        report.draw(results.suite, results.folder, results.machine, results.note())
    if results.demo is not None:
        save_figure(results.demo, root / "docs" / "demo.png", results.note("demo"))
    trained = results.content("precision")
    if trained is not None:
        precision_figures.draw(trained, root / "docs", results.note("precision"))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, or 1 with ``--check`` and a file that is not as it should be, or 2 for a wrong page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; tell which files are stale")
    arguments = parser.parse_args(argv)
    results = Results(ROOT / "benchmarks" / "results")
    try:
        old = stale(results)
        if not arguments.check:
            write(results)
    except PageError as error:
        print(f"benchmarks.pages: {error}", file=sys.stderr)
        return 2
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is stale: run make results' if arguments.check else 'written'}")
    return 1 if arguments.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
