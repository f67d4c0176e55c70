"""What stands in a read file for everything that is not built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["StandIn"]


@dataclass(eq=False, repr=False, slots=True)
class StandIn:
    """Stands for a class, a function, or an object that a file describes and that is not built.

    It is inert: nothing was imported or called for it. It keeps what the file gives the object.

    Attributes:
        name: import path of the class or function.
        arguments: what it would be called with; None for the class or function itself.
        state: what its ``__setstate__`` would get.
        elements: what would be appended to it.
        entries: the items that would be set in it.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    elements: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<{self.name}, not built>"
