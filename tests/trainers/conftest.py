"""For the tests of trainers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

#: What it defines stays defined as long as somebody has this.
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Define the operators that torchvision describes while it is imported, where its compiled part does not load.

    timm imports torchvision, but trains without its operators. The torchvision on the package index is built for
    another torch than the one that is pinned here.
    """
    global _library
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).parent
    try:
        torch.ops.load_library(folder / "_C.so")
    except (ImportError, OSError):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in re.findall(
            r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text()
        ):
            _library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")


make_torchvision_importable()
