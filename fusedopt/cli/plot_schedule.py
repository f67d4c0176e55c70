"""``fusedopt plot-schedule``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..messages import one_line, require
from .arguments import TRUSTED, UsageError, configured, examples, whole_number
from .configs import epoch_length_of, load_config

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "plot-schedule",
        parents=[configured()],
        help="plot the learning rates and other values that the schedulers of a config change",
        description="Run the schedulers of a config without training, and plot every value that they change. "
        f"{TRUSTED} Needs the extra fusedopt[plot].",
        epilog=examples(
            "fusedopt plot-schedule configs/digits_resnet_cosine.py -o curve.png",
            "fusedopt plot-schedule configs/digits_vit.py --epoch-length 100 --log -o curve.svg",
        ),
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("schedule.png"),
        help="picture to write; its suffix sets the format, .png without one (default: schedule.png)",
    )
    parser.add_argument(
        "--epoch-length",
        metavar="N",
        type=whole_number(),
        help="iterations in an epoch (default: those of the config's train_dataloader)",
    )
    parser.add_argument("--log", action="store_true", help="logarithmic axis")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from ..training.config import ConfigError, naming
    from ..training.engine.validation import check_names
    from ..training.schedulers import plot_schedule, simulate_schedule

    require("matplotlib", "plot")
    out = arguments.out if arguments.out.suffix else arguments.out.with_name(f"{arguments.out.name}.png")
    config = load_config(arguments)
    check_names(config, "optim_wrapper", "param_scheduler")  # the model and the data need not exist
    epoch_length = arguments.epoch_length or epoch_length_of(config)
    try:
        with naming(config):
            schedule = simulate_schedule(config, epoch_length=epoch_length)
    except ConfigError as error:
        if epoch_length is None and "epoch_length" in str(error):
            raise UsageError(f"{error}: give --epoch-length") from error
        raise
    figure = plot_schedule(schedule, title=one_line(str(arguments.config)), log=arguments.log)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: cannot save: {getattr(error, 'strerror', None) or error}") from error
    print(f"Saved {out}: {schedule.ticks} {schedule.unit}s, schedulers: {len(schedule.spans)}")
    return 0
