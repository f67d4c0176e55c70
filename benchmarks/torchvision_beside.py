"""torchvision beside a build of torch that it was not made for. timm imports it."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import torch

__all__ = ["make_torchvision_importable"]

#: Where `make test-trainers` has put it, or None.
folder_of_its_own = os.environ.get("FUSEDOPT_TORCHVISION")
#: What it defines stays defined as long as somebody has this.
_library: torch.library.Library | None = None


def make_torchvision_importable() -> None:
    """Define the operators that torchvision describes while it is imported, where its compiled part does not load.

    timm trains without them. The torchvision on the package index is built for another torch than the one that is
    pinned here, so `make test-trainers` puts it into a folder of its own, where MMEngine does not find it.
    """
    global _library
    if folder_of_its_own and importlib.util.find_spec("torchvision") is None:
        sys.path.append(folder_of_its_own)
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    folder = Path(found.origin).parent
    try:
        torch.ops.load_library(folder / "_C.so")
    except (ImportError, OSError):
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for name in re.findall(
            r'register_fake\("torchvision::(\w+)"\)', (folder / "_meta_registrations.py").read_text(encoding="utf-8")
        ):
            _library.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
