"""Names and text from files in messages of one line."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["one_line", "some"]


def one_line(text: object, most: int = 200) -> str:
    """``text`` on one line: whitespace becomes single spaces, other characters that do not print are escaped.

    Args:
        text: converted with ``str``.
        most: number of characters that are kept; the middle of a longer text is left out.
    """
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in words)
    if len(shown) <= most:
        return shown
    half = (most - 5) // 2
    return f"{shown[:half]} ... {shown[-half:]}"


def some(names: Sequence[object], most: int = 5) -> str:
    """The first names, on one line, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + rest
