"""Errors that name the config file and the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...messages import MissingExtraError
from ..errors import CheckpointError, ConfigError

__all__ = ["config_error", "naming"]


def config_error(filename: str | Path | None, key: str, message: str) -> ConfigError:
    """A ConfigError that names the file, the key, and what is wrong."""
    return ConfigError(": ".join(part for part in (str(filename or ""), key, message) if part))


@contextmanager
def naming(config: Mapping[str, Any], key: str = "") -> Iterator[None]:
    """Turn errors in building from ``config`` into a ConfigError that names its file and ``key``.

    Args:
        config: what is built from; its ``filename`` is named, if it has one.
        key: where in the config.
    """
    try:
        yield
    except (CheckpointError, ConfigError, MissingExtraError):
        raise
    except (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # str() of a KeyError quotes its message.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        message = " ".join(message.split()) or type(error).__name__
        raise config_error(getattr(config, "filename", None), key, message.removeprefix(f"{key}: ")) from error
