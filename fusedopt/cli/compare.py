"""``fusedopt compare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..messages import require
from .arguments import TRUSTED, UsageError, configured, examples, whole_number
from .configs import load_config

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "compare",
        parents=[configured()],
        help="train a config with the stock optimizer and with the fused one, and compare them",
        description="Train the model of a config with torch's optimizer, with torch's fused=True and with the fused "
        "twin, taking turns iteration by iteration, and compare losses, times and memory. A fourth run shows how far "
        "losses drift apart by rounding alone: torch's optimizer, from a start in which one weight is moved by one "
        f"ulp. {TRUSTED} Needs the extra fusedopt[demo]. "
        "Exits with 1 when the losses of torch's optimizer and of the fused twin disagree.",
        epilog=examples(
            "fusedopt compare configs/digits_vit.py --epochs 2",
            "fusedopt compare configs/digits_resnet.py --device cpu --threads 1 --out runs/comparison",
        ),
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="output folder (default: work_dirs/<config name>)")
    parser.add_argument(
        "--epochs", metavar="N", type=whole_number(), help="passes over the data (default: the config's)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default, means CUDA if available"
    )
    parser.add_argument("--threads", metavar="N", type=whole_number(), help="CPU threads (default: torch's choice)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import torch

    for module in ("rich", "matplotlib"):
        require(module, "demo")  # fail now rather than after a minute of training
    from rich.console import Console

    from ..compare.compare import compare
    from ..compare.figure import save_figure
    from ..compare.report import print_comparison, save_json, show_progress

    has_cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch finds no usable CUDA device here")
    device = torch.device("cuda" if has_cuda and arguments.device != "cpu" else "cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    config = load_config(arguments)
    if arguments.epochs is not None:
        config.merge_from_dict({"train_cfg.max_epochs": arguments.epochs})
    out = arguments.out or Path("work_dirs") / arguments.config.stem
    try:
        out.mkdir(parents=True, exist_ok=True)  # fail now rather than after training
    except OSError as error:
        raise UsageError(f"--out {out}: cannot make the folder: {error.strerror}") from error

    console = Console()
    with show_progress(console) as listener:
        comparison = compare(config, device=device, listener=listener)
    print_comparison(comparison, console)
    try:
        save_json(comparison, out / "comparison.json")
        save_figure(comparison, out / "comparison.png")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot save: {error.strerror}") from error
    console.print(f"Saved {out / 'comparison.json'} and {out / 'comparison.png'}", soft_wrap=True, markup=False)
    return 0 if comparison.agrees else 1
