"""``fusedopt train``."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import TRUSTED, UsageError, configured, examples, placed
from .configs import load_config, set_launcher, set_work_dir

__all__ = ["add", "run"]

#: Value of ``--resume`` without a checkpoint.
_NEWEST = "newest"


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "train",
        parents=[configured(), placed("train")],
        help="train what a config describes",
        description=f"Train what a config describes. {TRUSTED}",
        epilog=examples(
            "fusedopt train configs/digits_vit.py",
            "fusedopt train configs/digits_vit.py --work-dir runs/first --cfg-options train_cfg.max_epochs=5",
            "fusedopt train configs/digits_vit.py --work-dir runs/first --resume",
            "torchrun --nproc-per-node 2 -m fusedopt train configs/digits_vit.py --launcher pytorch",
        ),
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: OptimWrapper becomes AmpOptimWrapper")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="multiply the learning rates by the batch size of all processes divided by the config's "
        "auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        nargs="?",
        const=_NEWEST,
        help="resume a run from CHECKPOINT, by default from the newest checkpoint in the work folder",
    )
    parser.add_argument(
        "--resume-overrides",
        action="store_true",
        help="with --resume: apply edited settings of optimizers and schedulers, as if they had been set from the "
        "start (default: keep those of the checkpoint)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from ..training.builder import enable_amp
    from ..training.config import naming
    from ..training.engine import Runner
    from ..training.engine.validation import check_names

    config = load_config(arguments)
    if arguments.amp:
        with naming(config, "optim_wrapper"):
            config.optim_wrapper = enable_amp(config.get("optim_wrapper", {}))
    if arguments.auto_scale_lr:
        config.auto_scale_lr = {**(config.get("auto_scale_lr") or {}), "enable": True}
    set_work_dir(config, arguments)
    if arguments.resume is not None:
        config.resume = True
        config.load_from = None if arguments.resume is _NEWEST else arguments.resume
    if arguments.resume_overrides:
        if not config.get("resume"):
            raise UsageError("--resume-overrides: there is nothing to resume; give --resume too")
        config.resume_overrides = True
    set_launcher(config, arguments, "train")
    check_names(config)
    with naming(config):
        runner = Runner.from_cfg(config)
        if runner.train_loop is None:
            raise ValueError("there is nothing to train: set train_dataloader, train_cfg and optim_wrapper")
    runner.train()
    return 0
