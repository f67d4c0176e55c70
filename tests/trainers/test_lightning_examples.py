"""The examples with Lightning and Fabric."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)


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
