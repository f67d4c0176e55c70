"""Errors that say in one line what is wrong with a file."""

from __future__ import annotations

from ..messages import one_line

__all__ = ["CheckpointError", "ConfigError"]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used; the one-line message names the file and what is wrong.

    Args:
        message: what is wrong; made one line.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class ConfigError(ValueError):
    """A config cannot be used; the one-line message names the file, the key and what is wrong.

    Args:
        message: what is wrong; made one line.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))
