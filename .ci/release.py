"""What a release says of itself, in the places that must agree: version.py, CHANGELOG.md, CITATION.cff and the tag.

    python3 .ci/release.py prepare 0.1.0 --date 2026-12-01    write version and date into all of them
    python3 .ci/release.py check v0.1.0                       compare them with a tag; exit code 1 if one differs
    python3 .ci/release.py notes                              print what CHANGELOG.md says of the newest release

RELEASE.md has the steps.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.compile(r'^__version__ = "(.*)"$', re.MULTILINE)
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
CITED_VERSION = re.compile(r"^version: (.*)$", re.MULTILINE)
CITED_DATE = re.compile(r"^date-released: (.*)$", re.MULTILINE)
#: A final release or a candidate, as PEP 440 writes them.
NUMBER = re.compile(r"\d+\.\d+\.\d+(rc\d+)?")


def date(text: str) -> str:
    """The argument, if it is a date such as 2026-12-01."""
    return datetime.date.fromisoformat(text).isoformat()


def number(text: str) -> str:
    """The argument, if it is a version such as 0.1.0 or 0.2.0rc1."""
    if not NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no version; expected one such as 0.1.0 or 0.2.0rc1")
    return text


def only(pattern: re.Pattern[str], text: str, where: str) -> str:
    """The first group of the first match.

    Raises:
        SystemExit: there is none.
    """
    found = pattern.search(text)
    if found is None:
        raise SystemExit(f"{where}: has no line like {pattern.pattern}")
    return found[1]


def prepare(root: Path, version: str, day: str) -> None:
    """Write the version and the date; the first heading of the changelog must be that of unreleased changes.

    Raises:
        SystemExit: there are no unreleased changes. Nothing has been written then.
    """
    paths = {name: root / name for name in ("fusedopt/version.py", "CHANGELOG.md", "CITATION.cff")}
    texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    heading = only(HEADING, texts["CHANGELOG.md"], "CHANGELOG.md")
    if not heading.startswith("Unreleased"):
        raise SystemExit(f"CHANGELOG.md: the first heading is {heading!r}; expected 'Unreleased'")
    for pattern, name in ((VERSION, "fusedopt/version.py"), (CITED_VERSION, "CITATION.cff")):
        only(pattern, texts[name], name)
    texts["fusedopt/version.py"] = VERSION.sub(f'__version__ = "{version}"', texts["fusedopt/version.py"])
    texts["CHANGELOG.md"] = HEADING.sub(f"## {version} ({day})", texts["CHANGELOG.md"], count=1)
    cited = CITED_DATE.sub("", texts["CITATION.cff"]).rstrip("\n") + "\n"
    texts["CITATION.cff"] = CITED_VERSION.sub(f"version: {version}", cited) + f"date-released: {day}\n"
    for name, path in paths.items():
        path.write_text(texts[name], encoding="utf-8")


def differences(root: Path, tag: str) -> list[str]:
    """What does not agree with a tag such as v0.1.0, a line each."""
    version = tag.removeprefix("v")
    if not tag.startswith("v") or not NUMBER.fullmatch(version):
        return [f"the tag is {tag!r}; expected a version such as 'v0.1.0'"]
    found = []
    own = only(VERSION, (root / "fusedopt" / "version.py").read_text(encoding="utf-8"), "fusedopt/version.py")
    if own != version:
        found.append(f"fusedopt/version.py has {own!r}; the tag says {version!r}")
    heading = only(HEADING, (root / "CHANGELOG.md").read_text(encoding="utf-8"), "CHANGELOG.md")
    dated = re.fullmatch(rf"{re.escape(version)} \((\d{{4}}-\d\d-\d\d)\)", heading)
    if dated is None:
        found.append(f"CHANGELOG.md begins with '## {heading}'; expected '## {version} (its date)'")
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    cited, day = only(CITED_VERSION, citation, "CITATION.cff"), CITED_DATE.search(citation)
    if cited != version:
        found.append(f"CITATION.cff has version {cited!r}; the tag says {version!r}")
    if dated is not None and (day is None or day[1] != dated[1]):
        found.append(f"CITATION.cff has date-released {day and day[1]!r}; CHANGELOG.md has {dated[1]!r}")
    return found


def notes(root: Path) -> str:
    """The newest section of the changelog, without its heading."""
    sections = re.split(r"^## .*$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return sections[1].strip() if len(sections) > 1 else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 if something does not agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="write version and date")
    one.add_argument("version", type=number)
    one.add_argument("--date", type=date, default=datetime.datetime.now(datetime.timezone.utc).date().isoformat())
    two = commands.add_parser("check", help="compare everything with a tag")
    two.add_argument("tag")
    commands.add_parser("notes", help="print the newest section of the changelog")
    arguments = parser.parse_args(argv)
    if arguments.command == "prepare":
        prepare(arguments.root, arguments.version, arguments.date)
    elif arguments.command == "notes":
        print(notes(arguments.root))
    else:
        found = differences(arguments.root, arguments.tag)
        print("\n".join(found) or f"{arguments.tag}: version, changelog and citation agree")
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
