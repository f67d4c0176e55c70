"""The log of a run, on the terminal and in a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO

from ...messages import encodable
from .distributed import is_main_process

__all__ = ["build_logger"]


class _Console(logging.StreamHandler):
    """Writes to the current ``sys.stdout``, which a progress bar replaces while it is shown."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        # Messages that the progress bar shows go only to the file.
        self.addFilter(lambda record: not getattr(record, "on_progress_bar", False))

    def format(self, record: logging.LogRecord) -> str:
        return encodable(super().format(record), sys.stdout)

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    @stream.setter
    def stream(self, stream: TextIO) -> None:
        pass


class _File(logging.Handler):
    """Appends each line and closes the file, so that nothing is lost if the process is killed."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def build_logger(work_dir: str, timestamp: str, level: int | str) -> logging.Logger:
    """A logger that writes to the terminal and to ``<timestamp>.log``, in the main process only.

    Args:
        work_dir: folder of the file.
        timestamp: name of the file, without suffix.
        level: as for ``logging.Logger``.

    Raises:
        TypeError, ValueError: an unknown level.
    """
    logger = logging.Logger("fusedopt")
    try:
        logger.setLevel(level)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Invalid log_level: {level!r}; expected a name such as 'INFO', or a number") from error
    if is_main_process():
        logger.addHandler(_Console())
        logger.addHandler(_File(Path(work_dir) / f"{timestamp}.log"))
    else:
        logger.addHandler(logging.NullHandler())
    return logger
