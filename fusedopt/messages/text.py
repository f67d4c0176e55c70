"""Text that a message or the terminal can show."""

from __future__ import annotations

from typing import Any

__all__ = ["encodable", "one_line"]


def one_line(text: str) -> str:
    """``text`` in one line: line breaks and other characters that cannot be printed are shown as escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def encodable(text: str, stream: Any) -> str:
    """``text`` with escapes for the characters that ``stream`` cannot write."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
