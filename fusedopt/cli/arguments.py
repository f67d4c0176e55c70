"""What the commands share: arguments and usage errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..messages import one_line

__all__ = ["TRUSTED", "Parser", "UsageError", "common", "configured", "examples", "placed", "whole_number"]

TRUSTED = "The config file is Python and is run: use only files you trust."


class UsageError(Exception):
    """The user asked for something impossible; the message is one line."""


_EXAMPLES = "examples:\n"


class _HelpFormatter(argparse.HelpFormatter):
    """Keeps the lines of examples, and fills other text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        text, separator, commands = text.partition(_EXAMPLES)
        filled = super()._fill_text(text, width, indent)
        return filled + "\n\n" * bool(filled and separator) + separator + commands


class Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def examples(*commands: str) -> str:
    """The end of a command's help, which shows how it is used."""
    return _EXAMPLES + "\n".join(f"  {command}" for command in commands)


def whole_number(least: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above {least - 1}")
        return value

    return parse


def common() -> Parser:
    """The arguments that every command has."""
    parser = Parser(add_help=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def configured() -> Parser:
    """The arguments of a command that takes a config."""
    parser = Parser(add_help=False, parents=[common()])
    parser.add_argument("config", metavar="CONFIG", type=Path, help="config file, such as configs/digits_vit.py")
    parser.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change the config: train_cfg.max_epochs=5, param_scheduler.0.end=10, optim_wrapper.clip_grad=None, "
        "model.channels=(8,16), custom_hooks=[]",
    )
    return parser


def placed(command: str) -> Parser:
    """The arguments of a command that runs a Runner: its folder, and what starts its processes."""
    parser = Parser(add_help=False)
    parser.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder for logs and checkpoints (default: the config's work_dir, else work_dirs/<config name>)",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        help=f"pytorch: for processes started by torchrun, as in torchrun --nproc-per-node 2 -m fusedopt {command} "
        "CONFIG --launcher pytorch (default: the config's, else none)",
    )
    return parser
