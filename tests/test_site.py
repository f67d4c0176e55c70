"""The site of `make docs`, as far as it can be checked without MkDocs: its navigation and reference are complete."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
from test_docstrings import MODULES

ROOT = Path(__file__).resolve().parent.parent
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
HOOKS = (ROOT / "docs" / "_site" / "hooks.py").read_text(encoding="utf-8")
NAVIGATION = re.findall(r"([\w./-]+\.md)$", SITE.partition("\nnav:\n")[2], re.MULTILINE)
REFERENCE = {
    name
    for page in (ROOT / "docs" / "reference").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def outside() -> dict[str, str]:
    """The pages from outside of docs/: their places on the site, by those in the repository."""
    return dict(re.findall(r'^    "(\S+\.md)": "(\S+\.md)",$', HOOKS, re.MULTILINE))


def test_every_page_is_in_the_navigation_once() -> None:
    inside = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(NAVIGATION) == sorted([*inside, *outside().values()])


def test_what_the_navigation_takes_from_outside_is_there() -> None:
    assert set(outside()) >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    for source in outside():
        assert (ROOT / source).is_file(), source


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_in_the_reference(module: str) -> None:
    public = importlib.import_module(module)
    shown = {name.rpartition(".")[2] for name in REFERENCE}
    for name in public.__all__:
        target = getattr(public, name)
        ours = getattr(target, "__module__", "").startswith("fusedopt")
        if ours and (inspect.isclass(target) or inspect.isfunction(target)):
            assert name in shown, f"{module}.{name} is on no page of docs/reference"


def test_the_reference_shows_what_exists() -> None:
    for name in REFERENCE:
        module, _, member = name.rpartition(".")
        if not module.startswith("fusedopt.integrations"):  # needs the trainers
            assert hasattr(importlib.import_module(module), member), name


def test_nothing_comes_from_the_net() -> None:
    """Hooks of the build look at its pages; here, the settings that would make them fetch something."""
    assert "font: false" in SITE
    assert "polyfills: [_site/iframe-worker.js]" in SITE
    assert not re.search(r"^\s*-?\s*(?:extra_javascript|extra_css|src).*https?://", SITE, re.MULTILINE)


def test_a_warning_fails_the_build() -> None:
    """MkDocs with --quiet does not count warnings, so that --strict has no effect."""
    [command] = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert command == "mkdocs build --strict"
