"""What belongs to a release and to a repository: versions that agree, the forms, the checks before a commit."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fusedopt

REPOSITORY = Path(__file__).resolve().parent.parent
if not (REPOSITORY / ".ci").exists():
    pytest.skip("not in a source tree", allow_module_level=True)

RELEASE = runpy.run_path(str(REPOSITORY / ".ci" / "release.py"))
PLACES = ("fusedopt/version.py", "CHANGELOG.md", "CITATION.cff")


def read_yaml(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install 'fusedopt[engine]'")
    return yaml.safe_load((REPOSITORY / name).read_text())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that name a version, as they are here."""
    for name in PLACES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    heading = re.compile("^## .*$", re.MULTILINE)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(heading.sub("## Unreleased (0.7.0)", changelog.read_text(), count=1))
    return tmp_path


def release(tree: Path, *arguments: str) -> int:
    return RELEASE["main"](["--root", str(tree), *arguments])


class TestRelease:
    def test_what_is_prepared_agrees_with_its_tag(self, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert release(tree, "prepare", "0.7.0", "--date", "2026-12-01") == 0
        assert release(tree, "check", "v0.7.0") == 0
        assert '__version__ = "0.7.0"' in (tree / PLACES[0]).read_text()
        assert "\n## 0.7.0 (2026-12-01)\n" in (tree / PLACES[1]).read_text()
        assert "\nversion: 0.7.0\ndate-released: 2026-12-01\n" in (tree / PLACES[2]).read_text()
        capsys.readouterr()
        assert release(tree, "notes") == 0
        assert capsys.readouterr().out.startswith("First version.\n")

    def test_the_next_release_replaces_the_date(self, tree: Path) -> None:
        release(tree, "prepare", "0.7.0", "--date", "2026-12-01")
        changelog = tree / "CHANGELOG.md"
        changelog.write_text(changelog.read_text().replace("## 0.7.0", "## Unreleased (0.8.0)\n\nMore.\n\n## 0.7.0"))
        release(tree, "prepare", "0.8.0rc1", "--date", "2027-01-02")
        assert release(tree, "check", "v0.8.0rc1") == 0
        assert (tree / "CITATION.cff").read_text().count("date-released") == 1
        assert "\n## 0.7.0 (2026-12-01)\n" in changelog.read_text()

    @pytest.mark.parametrize(
        ("tag", "message"),
        [
            ("0.7.0", "the tag is '0.7.0'"),
            ("v0.7", "the tag is 'v0.7'"),
            ("v0.7.1", "fusedopt/version.py has '0.7.0'; the tag says '0.7.1'"),
        ],
    )
    def test_another_tag(self, tree: Path, capsys: pytest.CaptureFixture[str], tag: str, message: str) -> None:
        release(tree, "prepare", "0.7.0", "--date", "2026-12-01")
        assert release(tree, "check", tag) == 1
        assert message in capsys.readouterr().out

    @pytest.mark.parametrize("name", PLACES)
    def test_a_place_that_was_forgotten(self, tree: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
        before = (tree / name).read_text()
        release(tree, "prepare", "0.7.0", "--date", "2026-12-01")
        (tree / name).write_text(before)
        assert release(tree, "check", "v0.7.0") == 1
        assert all(line.startswith((name, "CITATION.cff")) for line in capsys.readouterr().out.splitlines())

    def test_a_second_time_is_refused_and_changes_nothing(self, tree: Path) -> None:
        release(tree, "prepare", "0.7.0", "--date", "2026-12-01")
        before = [(tree / name).read_text() for name in PLACES]
        with pytest.raises(SystemExit, match=r"the first heading is '0\.7\.0 \(2026-12-01\)'; expected 'Unreleased'"):
            release(tree, "prepare", "0.7.1")
        assert [(tree / name).read_text() for name in PLACES] == before

    def test_mistakes(self, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in (["prepare", "1"], ["prepare", "0.7.0", "--date", "tomorrow"]):
            with pytest.raises(SystemExit):
                release(tree, *arguments)
        assert "'1' is no version; expected one such as 0.1.0 or 0.2.0rc1" in capsys.readouterr().err

    def test_the_citation_is_of_this_version(self) -> None:
        cited = read_yaml("CITATION.cff")
        assert cited["version"] == fusedopt.__version__
        assert {"cff-version", "message", "title", "authors"} <= set(cited)
        heading = re.search("^## (.*)$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
        assert heading and fusedopt.__version__ in heading[1]


class TestForms:
    def test_the_hooks_before_a_commit_are_make_lint(self) -> None:
        (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
        assert local["repo"] == "local"
        hooks = [hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in local["hooks"]]
        recipe = re.search(r"^lint: setup\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert recipe
        lines = [line.strip() for line in recipe[1].splitlines()]
        assert hooks == [line.removesuffix(" .").removesuffix(" $(CXX_SOURCES)") for line in lines]

    @pytest.mark.parametrize("name", ["bug", "feature"])
    def test_issue_forms(self, name: str) -> None:
        form = read_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert {"name", "description", "body"} <= set(form)
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in fields}) == len(fields)
        assert all(part["attributes"]["label"] for part in fields)
        for part in fields:  # a bare yes is a boolean, which the forms refuse
            assert all(isinstance(option, str) for option in part["attributes"].get("options", []))

    def test_a_workflow_runs_only_files_and_targets_that_there_are(self) -> None:
        targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
        for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
            jobs = read_yaml(f".github/workflows/{path.name}")["jobs"]
            for job in jobs.values():
                needed = job.get("needs", [])
                assert set([needed] if isinstance(needed, str) else needed) <= set(jobs), path
                commands = "\n".join(step.get("run", "") for step in job.get("steps", []))
                assert set(re.findall(r"\bmake ([\w-]+)", commands)) <= targets, path
                assert all((REPOSITORY / file).is_file() for file in re.findall(r"\.ci/\w+(?:\.py)?", commands)), path


@pytest.mark.parametrize("page", ["CODE_OF_CONDUCT", "RELEASE", "SECURITY", "examples/README"])
def test_links_lead_to_files_that_there_are(page: str) -> None:
    path = REPOSITORY / f"{page}.md"
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


class TestTorch:
    """``make test-torch``, up to where it would install."""

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / ".ci" / "test_torch.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def test_mistakes(self) -> None:
        done = self.run("--torch", "newest")
        assert done.returncode == 1 and done.stderr == "--torch newest: expected a release such as 2.11 or 2.11.0\n"
        done = self.run("--torch", "2.15", "--python", "no-such-python")
        assert done.returncode == 1 and done.stderr.startswith("--python no-such-python: does not run; expected")

    def test_the_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        script = runpy.run_path(str(REPOSITORY / ".ci" / "test_torch.py"))
        counts, failure = script["Counts"], script["Failure"]
        names = script["main"].__globals__
        python = sys.version.split()[0]
        monkeypatch.setitem(names, "output", lambda *command: "2.99.1" if "import torch" in command[-1] else python)
        monkeypatch.setitem(names, "install", lambda folder, python, torch: Path(sys.executable))
        monkeypatch.setitem(names, "test", lambda folder, python, arguments: counts(7, 0, len(arguments)))
        common = ["--torch", "2.99", "--folder", str(tmp_path)]
        assert script["main"]([*common, "-q", "tests/test_steps.py"]) == 0
        row = [cell.strip() for cell in capsys.readouterr().out.strip("|\n").split("|")]
        assert row[:3] == ["2.99.1", python, "7 passed, 0 failed, 2 skipped"]
        monkeypatch.setitem(names, "test", lambda folder, python, arguments: counts(7, 1, 0))
        assert script["main"](common) == 1

        def refuse(*arguments: object) -> None:
            raise failure("pip installs no torch 2.99 for this Python")

        monkeypatch.setitem(names, "install", refuse)
        assert script["main"](common) == 1
        assert "| 2.99 | " in (out := capsys.readouterr().out) and "pip installs no torch 2.99" in out

    def test_what_is_made_is_not_copied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        script = runpy.run_path(str(REPOSITORY / ".ci" / "test_torch.py"))
        source = tmp_path / "source"
        for name in ("fusedopt/a.py", "fusedopt/_C.so", "build/x", "tests/build/y", "a/__pycache__/z", ".ci/run"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("")
        monkeypatch.setitem(script["copy_sources"].__globals__, "ROOT", source)
        (tmp_path / "tree").mkdir()
        (tmp_path / "tree" / "old.py").write_text("")
        script["copy_sources"](tmp_path / "tree")
        found = [path.relative_to(tmp_path / "tree").as_posix() for path in (tmp_path / "tree").rglob("*.*")]
        assert sorted(found) == [".ci", "fusedopt/a.py"]
        assert (tmp_path / "tree" / "tests" / "build" / "y").exists()
