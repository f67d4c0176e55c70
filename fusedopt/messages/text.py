"""Text that a message or the terminal can show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["encodable", "one_line", "some"]


def one_line(text: object, most: int | None = None) -> str:
    """``text`` in one line: line breaks and other characters that cannot be printed are shown as escapes.

    Args:
        text: converted with ``str``.
        most: of a longer text, so many characters are kept, and the middle is left out.
    """
    whole = str(text)
    if most is not None and len(whole) > most:
        half = (most - 5) // 2
        whole = f"{whole[:half]} ... {whole[-half:]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in whole
    )


def some(names: Sequence[Any], most: int = 5, told: Callable[[Any], object] = str) -> str:
    """The first names, on one line, and how many more there are.

    Args:
        names: anything that ``told`` can make text of.
        most: number of names.
        told: what is shown of a name.
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(told(name), 200) for name in names[:most]) + rest


def encodable(text: str, stream: Any) -> str:
    """``text`` with escapes for the characters that ``stream`` cannot write."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
