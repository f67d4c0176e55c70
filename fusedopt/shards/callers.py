"""Who is calling, where torch's own code leaves no other way to know."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["locals_of_caller"]


def locals_of_caller(module: str, function: str) -> dict[str, Any]:
    """The local variables of the nearest caller that is this function of a module; empty without.

    Only of that one: to look at the variables of any other frame would keep all that is in them for as long as it runs.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return dict(frame.f_locals)
        frame = frame.f_back  # type: ignore[assignment]
    return {}
