"""Loading the config that a command is given."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..messages import MissingExtraError
from .arguments import UsageError

if TYPE_CHECKING:
    from ..training.config import Config

__all__ = ["epoch_length_of", "load_config", "set_launcher", "set_work_dir"]


def load_config(arguments: argparse.Namespace) -> Config:
    """Load the config and apply the options of the command line."""
    from ..messages import did_you_mean
    from ..training.config import ConfigError
    from ..training.engine import Config, Runner, parse_options

    # For custom_imports; `python -m fusedopt` searches the current folder anyway.
    if os.getcwd() not in map(os.path.abspath, sys.path):
        sys.path.insert(0, os.getcwd())
    options = parse_options(arguments.cfg_options)
    config = Config.fromfile(arguments.config, import_custom_modules=False)
    known = {"custom_imports", *config, *Runner.config_keys()}
    for option in options:
        if option.partition(".")[0] not in known:
            hint = did_you_mean(option.partition(".")[0], known)
            raise ConfigError(f"--cfg-options {option}: there is no such setting; {hint}")
    config.merge_from_dict(options)
    config.import_custom_modules()
    return config


def epoch_length_of(config: Config) -> int | None:
    """Iterations in an epoch of the config's training data; None if the data are not available."""
    from ..training.config import naming
    from ..training.engine import ConfigError, build_dataloader

    if config.get("train_dataloader") is None:
        return None
    try:
        with naming(config):
            return len(build_dataloader(config.train_dataloader, seed=0, shuffle=True))
    except (ConfigError, MissingExtraError):
        return None


def set_work_dir(config: Config, arguments: argparse.Namespace) -> None:
    """Take ``work_dir`` from the command line, or the config, or else from the name of the config's file."""
    if arguments.work_dir is not None:
        config.work_dir = arguments.work_dir
    if config.get("work_dir") is None:
        config.work_dir = str(Path("work_dirs") / arguments.config.stem)


def set_launcher(config: Config, arguments: argparse.Namespace, command: str) -> None:
    """Take ``launcher`` from the command line or the config.

    Raises:
        UsageError: the processes were not started by torchrun.
    """
    if arguments.launcher is not None:
        config.launcher = arguments.launcher
    if config.get("launcher") == "pytorch" and "RANK" not in os.environ:
        what = " ".join(filter(None, (str(arguments.config), getattr(arguments, "checkpoint", None))))
        raise UsageError(
            "--launcher pytorch: start the processes with torchrun, as in torchrun --nproc-per-node 2 -m fusedopt "
            f"{command} {what} --launcher pytorch"
        )
