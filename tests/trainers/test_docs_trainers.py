"""docs/trainers.md: the Python of every section runs by itself, and every trainer has a section and an example."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "trainers.md").read_text()
#: The package that a section's fragments need.
NEEDS = {
    "Lightning": "lightning",
    "Fabric": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
    "timm": "timm",
}


def sections() -> dict[str, list[str]]:
    """The Python fragments of each section, by its heading."""
    found = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        fragments = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if fragments:
            found[section.splitlines()[0]] = fragments
    return found


def test_every_trainer_has_a_section() -> None:
    assert set(NEEDS) <= set(sections())


@pytest.mark.parametrize("heading", list(sections()))
def test_fragments_run(heading: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = NEEDS.get(heading)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a trainer whose model and data are too small
        for number, fragment in enumerate(sections()[heading], 1):
            exec(compile(fragment, f"{heading}, fragment {number}", "exec"), namespace)
    if package == "timm":
        importlib.import_module("fusedopt.integrations.timm").register()  # the page ends with unregister()


def test_the_messages_are_those_of_the_source() -> None:
    texts = []
    for path in (REPOSITORY / "fusedopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(each.value if isinstance(each, ast.Constant) else "…" for each in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    tables = re.findall(r"^\|[^\n]*\| (?:Error|You get) \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    messages = [re.findall(r"\| `(?:\w+Error: )?([^`]+)`", row)[0] for table in tables for row in table.splitlines()]
    assert len(tables) >= 4 and len(messages) >= 12
    for message in messages:
        pattern = re.sub(r"(?:…|\\\.\\\.\\\.)+", ".*", re.escape(message))
        assert any(re.search(pattern, text) for text in texts), message
