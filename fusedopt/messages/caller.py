"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]


def warn_caller(message: str) -> None:
    """Warn at the line outside this package that led here."""
    skipped = (__name__.partition(".")[0], "contextlib")
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in skipped:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
