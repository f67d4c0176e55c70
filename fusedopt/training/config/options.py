"""Command-line options that change a config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError
from .dicts import MOST_LEVELS

__all__ = ["parse_options"]


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """Parse the values of ``--cfg-options`` for :meth:`Config.merge_from_dict`.

    Args:
        options: strings ``KEY=VALUE``. A value is an int, a float, ``true``, ``false`` or ``None``; a list ``[a, b]``
            or ``a,b``; a tuple ``(a, b)``; these may be nested. Anything else, or in quotes, is a string.

    Raises:
        ConfigError: there is no ``=``, or brackets or quotes do not match.
    """
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        shown = option if len(option) <= 200 else f"{option[:200]}..."
        if not equals or not key:
            raise ConfigError(f"--cfg-options {shown}: expected KEY=VALUE")
        try:
            values[key] = _parse_value(text)
        except ValueError as error:
            raise ConfigError(f"--cfg-options {shown}: {error}") from error
    return values


def _parse_value(text: str) -> Any:
    text = text.strip()
    parts = _split(text) if "," in text or text[:1] in ("[", "(") else [text]
    if len(parts) > 1:
        return [_parse_value(part) for part in (parts if parts[-1].strip() else parts[:-1])]
    if text[:1] in ("[", "(") and text[-1:] in ("]", ")"):
        inner = _split(text[1:-1])
        items = [_parse_value(part) for part in (inner if inner[-1].strip() else inner[:-1])]
        return items if text[0] == "[" else tuple(items)
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            if "Exceeds the limit" in str(error):  # a float would take its value for infinite
                raise
    return {"true": True, "false": False}.get(text.lower(), None if text == "None" else text)


def _split(text: str) -> list[str]:
    """Split at the commas that are outside brackets and quotes."""
    parts, brackets, quote = [""], "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (not parts[-1].strip() or parts[-1].rstrip()[-1] in "[(,"):
            quote = character
        elif character in "[(":
            brackets += {"[": "]", "(": ")"}[character]
            if len(brackets) > MOST_LEVELS:
                raise ValueError(f"expected at most {MOST_LEVELS} nested brackets")
        elif character in "])":
            if brackets[-1:] != character:
                raise ValueError(f"unexpected {character!r}")
            brackets = brackets[:-1]
        elif character == "," and not brackets:
            parts.append("")
            continue
        parts[-1] += character
    if quote or brackets:
        raise ValueError(f"expected {(quote or brackets)[-1]!r} at the end")
    return parts
