"""The log of a training: lines on the terminal and in a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from .distributed import is_main_process

__all__ = ["build_logger"]


class _Console(logging.StreamHandler):
    """Writes to what ``sys.stdout`` is at the moment: a progress bar replaces it while it shows."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        # What the progress bar shows already goes to the file alone.
        self.addFilter(lambda record: not getattr(record, "on_progress_bar", False))

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


class _File(logging.Handler):
    """Appends each line and closes the file: nothing is lost when the process is killed."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def build_logger(work_dir: str, timestamp: str, level: int | str) -> logging.Logger:
    """A logger of its own, which writes to the terminal and to ``<timestamp>.log``; silent but in the main process.

    Args:
        work_dir: where the file goes.
        timestamp: name of the file.
        level: as for ``logging.Logger``.

    Raises:
        TypeError, ValueError: an unknown level.
    """
    logger = logging.Logger("fusedopt")
    try:
        logger.setLevel(level)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Invalid log_level: {level!r}; expected 'INFO' and the like, or a number") from error
    if is_main_process():
        logger.addHandler(_Console())
        logger.addHandler(_File(Path(work_dir) / f"{timestamp}.log"))
    else:
        logger.addHandler(logging.NullHandler())
    return logger
