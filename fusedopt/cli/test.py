"""``fusedopt test``."""

from __future__ import annotations

import argparse
from typing import Any

from ..messages import aligned, one_line
from .arguments import TRUSTED, configured, examples, placed
from .configs import load_config, set_launcher, set_work_dir

__all__ = ["add", "run"]

#: What a test needs nothing of: the data to train on may not even be there.
_OF_OTHERS = (
    *("train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr", "compile"),
    *("val_dataloader", "val_cfg", "val_evaluator", "resume", "resume_overrides", "load_from"),
)


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "test",
        parents=[configured(), placed("test")],
        help="evaluate a checkpoint on the test data of a config",
        description="Load the weights of a checkpoint into the model of a config, evaluate it on test_dataloader, and "
        "print the metrics of test_evaluator. The checkpoint must have all weights of the model; nothing in it is run. "
        f"{TRUSTED}",
        epilog=examples(
            "fusedopt test configs/digits_vit.py work_dirs/digits_vit/epoch_10.pth",
            "fusedopt test configs/digits_vit.py best.pth --cfg-options test_dataloader.batch_size=64",
            "torchrun --nproc-per-node 2 -m fusedopt test configs/digits_vit.py best.pth --launcher pytorch",
        ),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="file of torch.save or safetensors, such as a checkpoint of train, or a sharded checkpoint, which is a "
        "folder",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from ..training.config import naming
    from ..training.engine import Runner
    from ..training.engine.validation import check_names

    config = load_config(arguments)
    for key in _OF_OTHERS:
        config.pop(key, None)
    set_work_dir(config, arguments)
    set_launcher(config, arguments, "test")
    check_names(config)
    with naming(config):
        if config.get("test_dataloader") is None:
            raise ValueError("there is nothing to test: set test_dataloader, test_cfg and test_evaluator")
        runner = Runner.from_cfg(config)
    assert runner.test_loop is not None
    with runner.running():
        # Strictly: metrics of a model that has kept some of its random weights would mean nothing.
        runner.load_checkpoint(arguments.checkpoint, strict=True)
        metrics = runner.test_loop.run()
    if runner.rank == 0 and metrics:
        print(aligned([(one_line(name), one_line(str(value))) for name, value in metrics.items()]), flush=True)
    return 0
