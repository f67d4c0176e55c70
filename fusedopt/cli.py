"""The command line: ``python -m fusedopt``."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]


class UsageError(Exception):
    """The user asked for something that cannot be; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fusedopt", description="Fused SGD, Adam and AdamW for PyTorch.")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    compare = commands.add_parser(
        "compare",
        parents=[common],
        help="train a config with the stock optimizer and with the fused one, and compare them",
        description="Train the model of a config twice, with torch's optimizer and with its fused twin, taking turns "
        "iteration by iteration, and compare losses, times and memory. The config file is Python and is run: use "
        "only files you trust. Needs the extra fusedopt[demo]. Exits with 1 when the two losses disagree.",
    )
    compare.add_argument("config", metavar="CONFIG", type=Path, help="config file, such as configs/digits_vit.py")
    compare.add_argument("--out", metavar="DIR", type=Path, help="where to save (default: work_dirs/<config name>)")
    compare.add_argument(
        "--epochs", metavar="N", type=_positive_int, help="passes over the data (default: the config's)"
    )
    compare.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default, is CUDA when there"
    )
    compare.add_argument("--threads", metavar="N", type=_positive_int, help="CPU threads (default: torch's choice)")
    compare.set_defaults(run=_compare)

    info = commands.add_parser(
        "info",
        parents=[common],
        help="show versions, devices and backends",
        description="Show versions, devices, and which backends can run here.",
    )
    info.set_defaults(run=_info)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from .info import info

    print(info())
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import torch

    from .demo.extras import require

    for module in ("rich", "matplotlib", "sklearn"):
        require(module)  # now rather than after a minute of training
    from rich.console import Console

    from .demo.compare import compare
    from .demo.report import print_comparison, save_figure, save_json, show_progress

    has_cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch finds no usable CUDA device here")
    device = torch.device("cuda" if has_cuda and arguments.device != "cpu" else "cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or Path("work_dirs") / arguments.config.stem
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a directory")

    console = Console()
    with show_progress(console) as listener:
        comparison = compare(arguments.config, epochs=arguments.epochs, device=device, listener=listener)
    print_comparison(comparison, console)
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_json(comparison, out / "comparison.json")
        save_figure(comparison, out / "comparison.png")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot save: {error.strerror}") from error
    console.print(f"Saved {out / 'comparison.json'} and {out / 'comparison.png'}", soft_wrap=True, markup=False)
    return 0 if comparison.agrees else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 1 (what was compared disagrees), 2 (the user's mistake), 130.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        SystemExit: the arguments cannot be parsed (2), or help was asked for (0).
    """
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
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
            print(f"fusedopt: {error}", file=sys.stderr)
        return 2


def _is_mistake(error: Exception) -> bool:
    """Whether ``error`` is the user's to correct, rather than a fault in the program."""
    from .demo.config import ConfigError
    from .demo.extras import MissingExtraError

    return isinstance(error, (ConfigError, MissingExtraError, UsageError))
