"""As tests/test_docstrings.py, for the modules that need a trainer."""

from __future__ import annotations

import pytest
from test_docstrings import undocumented_in


@pytest.mark.parametrize("package", ["accelerate", "lightning", "pytorch_lightning", "timm", "transformers"])
def test_every_argument_is_documented(package: str) -> None:
    for needed in ("torchvision", "timm") if package == "timm" else (package,):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    assert undocumented_in(f"fusedopt.integrations.{package}") == {}
