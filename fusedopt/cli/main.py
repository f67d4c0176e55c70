"""The command line: ``fusedopt``, or ``python -m fusedopt``."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..messages import MissingExtraError, one_line
from ..version import __version__
from . import bench, compare, convert, info, plot_schedule, test, train
from .arguments import Parser, UsageError, examples

__all__ = ["main"]


def _build_parser() -> Parser:
    parser = Parser(
        prog="fusedopt",
        description="Fused SGD, Adam and AdamW for PyTorch.",
        epilog="'fusedopt COMMAND --help' shows help for a command. Exit codes: 0, success; 1, a comparison, benchmark "
        "or self-test failed; 2, a mistake in the arguments, the config or a checkpoint; 130, interrupted. "
        + examples("fusedopt info", "fusedopt train configs/digits_vit.py", "fusedopt compare configs/digits_vit.py"),
    )
    parser.add_argument("--version", action="version", version=f"fusedopt {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (train, test, compare, plot_schedule, convert, bench, info):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 (a check failed), 2 (a user's mistake) or 130 (interrupted).

    Args:
        argv: the arguments; by default, those of the process.

    Raises:
        SystemExit: the arguments cannot be parsed (2), or help was asked for (0).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # as stderr: escapes for what the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        with _short_warnings():
            return arguments.run(arguments)
    except KeyboardInterrupt:
        print("fusedopt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_mistake(error):
            raise
        if arguments.debug:
            traceback.print_exc()
        else:
            print(f"fusedopt: {one_line(str(error))}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Show each warning as one line, without its source line."""
    show = warnings.showwarning

    def show_line(message: Warning | str, category: type[Warning], *place: Any, **file: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"fusedopt: warning: {one_line(' '.join(str(message).split()))}", file=sys.stderr)
        else:
            show(message, category, *place, **file)

    warnings.showwarning = show_line
    try:
        yield
    finally:
        warnings.showwarning = show


def _is_mistake(error: Exception) -> bool:
    """Whether the user can correct ``error``, as opposed to a bug in the program."""
    from ..training.engine import CheckpointError, ConfigError

    return isinstance(error, (CheckpointError, ConfigError, MissingExtraError, UsageError))
