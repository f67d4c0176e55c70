"""Flags of torch's optimizers that change nothing here."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["note_ignored_flags"]

_noted_ignored_flags = False


def note_ignored_flags(settings: Mapping[str, Any]) -> None:
    global _noted_ignored_flags
    ignored = [flag for flag in ("foreach", "fused") if settings.get(flag)]
    if ignored and not _noted_ignored_flags:
        _noted_ignored_flags = True
        warnings.warn(
            f"{' and '.join(ignored)}=True has no effect on fusedopt's optimizers: they are always fused over all "
            "parameter groups. This note appears once.",
            stacklevel=5,
        )
