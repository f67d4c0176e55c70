"""The page on Lightning and Fabric, and their examples, run as they are."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "trainers-lightning.md").read_text()

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


def test_fragments_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fragments = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(fragments) == 5
    namespace: dict[str, Any] = {}
    for number, fragment in enumerate(fragments, 1):
        exec(compile(fragment, f"trainers-lightning.md, fragment {number}", "exec"), namespace)
    assert not any(tmp_path.iterdir())


def test_the_messages_are_those_of_the_source() -> None:
    texts = []
    for path in (REPOSITORY / "fusedopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    tables = re.findall(r"^\|[^\n]*\| Error \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    messages = [message for table in tables for message in re.findall(r"^\|.* \| `([^`]+)`", table, re.MULTILINE)]
    assert len(tables) == 2 and len(messages) == sum(table.count("\n") for table in tables)
    for message in messages:
        pattern = "….*".join(map(re.escape, message.split("…"))).replace("….*", ".*")
        assert any(re.search(pattern, text) for text in texts), message


@pytest.mark.parametrize(("name", "accuracy"), [("lightning_digits", 0.93), ("fabric_digits", 0.93)])
def test_examples(
    name: str, accuracy: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")
    monkeypatch.chdir(tmp_path)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")  # so that it is restored
    runpy.run_path(str(REPOSITORY / "examples" / f"{name}.py"), run_name="__main__")
    *_, steps, result = capsys.readouterr().out.splitlines()
    assert re.match(r"230 steps", steps)
    assert float(result.removeprefix("validation accuracy: ")) > accuracy
    assert not any(tmp_path.iterdir())
