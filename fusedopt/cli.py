"""The command line: ``fusedopt``, or ``python -m fusedopt``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .extras import MissingExtraError, require

if TYPE_CHECKING:
    from .engine import Config

__all__ = ["main"]


#: ``--resume`` without a checkpoint.
_NEWEST = "newest"


class UsageError(Exception):
    """The user asked for something that cannot be; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _whole_number(least: int = 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above {least - 1}")
        return value

    return parse


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fusedopt",
        description="Fused SGD, Adam and AdamW for PyTorch.",
        epilog="'fusedopt COMMAND --help' tells more of a command. Exit codes: 0; 1, what was compared or timed is not "
        "as it should be; 2, a mistake in the arguments, the config or a checkpoint; 130, interrupted.",
    )
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    configured = _Parser(add_help=False, parents=[common])
    configured.add_argument("config", metavar="CONFIG", type=Path, help="config file, such as configs/digits_vit.py")
    configured.add_argument(
        "--cfg-options",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change the config: train_cfg.max_epochs=5, param_scheduler.0.end=10, optim_wrapper.clip_grad=None, "
        "model.channels=(8,16), custom_hooks=[]",
    )
    trusted = "The config file is Python and is run: use only files you trust."
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        parents=[configured],
        help="train what a config describes",
        description=f"Train what a config describes. {trusted}",
    )
    train.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder for logs and checkpoints (default: the config's work_dir, else work_dirs/<config name>)",
    )
    train.add_argument("--amp", action="store_true", help="mixed precision: OptimWrapper becomes AmpOptimWrapper")
    train.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        nargs="?",
        const=_NEWEST,
        help="go on with a training: that of CHECKPOINT, or of the newest checkpoint in the work folder",
    )
    train.add_argument(
        "--resume-overrides",
        action="store_true",
        help="with --resume: settings of optimizers and schedulers that were edited since count from there on, as if "
        "they had been so all along; else the checkpoint's do",
    )
    train.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        help="pytorch: one of several processes, which torchrun starts: torchrun --nproc-per-node 2 -m fusedopt train "
        "CONFIG --launcher pytorch (default: the config's, else none)",
    )
    train.set_defaults(run=_train)

    compare = commands.add_parser(
        "compare",
        parents=[configured],
        help="train a config with the stock optimizer and with the fused one, and compare them",
        description="Train the model of a config twice, with torch's optimizer and with its fused twin, taking turns "
        f"iteration by iteration, and compare losses, times and memory. {trusted} Needs the extra fusedopt[demo]. "
        "Exits with 1 when the two losses disagree.",
    )
    compare.add_argument("--out", metavar="DIR", type=Path, help="where to save (default: work_dirs/<config name>)")
    compare.add_argument(
        "--epochs", metavar="N", type=_whole_number(), help="passes over the data (default: the config's)"
    )
    compare.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default, is CUDA when there"
    )
    compare.add_argument("--threads", metavar="N", type=_whole_number(), help="CPU threads (default: torch's choice)")
    compare.set_defaults(run=_compare)

    plot = commands.add_parser(
        "plot-schedule",
        parents=[configured],
        help="draw the learning rates and what else the schedulers of a config move",
        description="Run the schedulers of a config without the training, and draw every value that they move. "
        f"{trusted} Needs the extra fusedopt[plot].",
    )
    plot.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        type=Path,
        default=Path("schedule.png"),
        help="picture to write; the suffix tells the format, without one it is .png (default: schedule.png)",
    )
    plot.add_argument(
        "--epoch-length",
        metavar="N",
        type=_whole_number(),
        help="iterations in an epoch (default: those of the config's train_dataloader)",
    )
    plot.add_argument("--log", action="store_true", help="logarithmic axis")
    plot.set_defaults(run=_plot_schedule)

    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="time the optimizer step against torch's and other packages'",
        description="Time one optimizer step, with what a training does around it, on the parameter shapes of a model. "
        "Every contender's result is checked first; then all take turns, round by round. Options that may be repeated "
        "are combined with one another.",
    )
    bench.add_argument(
        "--list", action="store_true", help="show the workloads, recipes, contenders and so on, and exit"
    )
    for option, default, text in (
        ("workload", "vit-tiny", "whose parameters"),
        ("grouping", "one", "parameter groups"),
        ("optimizer", "adamw", "optimizer"),
        ("recipe", "amp-clip", "what happens in a step"),
        ("dtype", "fp32", "dtype of parameters, or of gradients"),
    ):
        bench.add_argument(
            f"--{option}", metavar="NAME", action="append", help=f"{text}; may be repeated (default: {default})"
        )
    bench.add_argument(
        "--contender",
        metavar="NAME",
        action="append",
        help="may be repeated, or 'all' that can run here (default: fusedopt and torch's, not compiled)",
    )
    bench.add_argument(
        "--rounds", metavar="N", type=_whole_number(2), default=25, help="paired rounds (default: 25, least: 2)"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    bench.add_argument("--threads", metavar="N", type=_whole_number(), help="CPU threads (default: torch's choice)")
    bench.add_argument("--warm", action="store_true", help="do not flush the caches between rounds")
    bench.set_defaults(run=_bench)

    info = commands.add_parser(
        "info",
        parents=[common],
        help="show versions, devices and backends",
        description="Show versions, devices, and which backends can run here.",
    )
    info.add_argument(
        "--warmup",
        action="store_true",
        help="also compile and tune the Triton kernels for each GPU, and show how long that took",
    )
    info.add_argument(
        "--selftest",
        action="store_true",
        help="also run the self-test of all kernels on each GPU; exits with 1 when one is not as it should be",
    )
    info.set_defaults(run=_info)
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    import itertools

    import torch

    from .bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS, Case, run
    from .bench.measure import CacheFlush
    from .bench.tables import case_table

    if arguments.list:
        print("workloads")
        for name, workload in WORKLOADS.items():
            print(f"  {name:<22} {workload.description}{' (for GPUs)' if workload.gpu_only else ''}")
        print("contenders")
        for name, contender in CONTENDERS.items():
            print(f"  {name:<22} {contender.description}")
        for title, names in {
            "groupings": GROUPINGS,
            "optimizers": OPTIMIZERS,
            "recipes": RECIPES,
            "dtypes": DTYPES,
        }.items():
            print(f"{title}\n  {', '.join(names)}")
        return 0

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no usable CUDA device here")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    usual = [name for name in CONTENDERS if name.startswith("torch-") and name != "torch-compiled"]
    names = arguments.contender or ["fusedopt", *usual]
    everyone = "all" in names
    unknown = [name for name in names if name not in CONTENDERS and name != "all"]
    if unknown:
        raise UsageError(f"--contender {unknown[0]}: expected 'all' or one of {', '.join(CONTENDERS)}")
    names = list(CONTENDERS) if everyone else list(dict.fromkeys(names))
    try:
        cases = [
            Case(workload, grouping, optimizer, recipe, dtype, arguments.device, arguments.warm)
            for workload, grouping, optimizer, recipe, dtype in itertools.product(
                arguments.workload or ["vit-tiny"],
                arguments.grouping or ["one"],
                arguments.optimizer or ["adamw"],
                arguments.recipe or ["amp-clip"],
                arguments.dtype or ["fp32"],
            )
        ]
    except ValueError as error:
        raise UsageError(str(error)) from error
    device = torch.device(arguments.device)
    flush = CacheFlush(device)
    for case in cases:
        if WORKLOADS[case.workload].gpu_only and arguments.device == "cpu":
            raise UsageError(f"--workload {case.workload} is for GPUs: it needs --device cuda")
    complete = True
    for case in cases:
        result = run(case, names, arguments.rounds, flush)
        # Nobody asked for these in particular.
        pardoned = [name for name in result.left_out if CONTENDERS[name].unavailable(case)]
        if not arguments.contender:
            for name in pardoned:
                del result.left_out[name]
        print(f"{case_table(result)}\n", flush=True)
        if everyone or not arguments.contender:
            complete &= set(result.left_out) <= set(pardoned)
        else:
            complete &= not result.left_out
    return 0 if complete else 1


def _info(arguments: argparse.Namespace) -> int:
    from .info import info, self_test, warm_up

    print(info())
    if arguments.warmup:
        print(f"\n{warm_up()}")
    if arguments.selftest:
        table, good = self_test()
        print(f"\n{table}")
        return 0 if good else 1
    return 0


def _load_config(arguments: argparse.Namespace) -> Config:
    """The config with the options of the command line."""
    from .engine import Config, Runner, parse_options
    from .engine.config import ConfigError
    from .rules import did_you_mean

    # For custom_imports; `python -m fusedopt` finds modules of the current folder anyway.
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


def _train(arguments: argparse.Namespace) -> int:
    from .builder import enable_amp
    from .engine import Runner
    from .engine.config import naming
    from .engine.validation import check_names

    config = _load_config(arguments)
    if arguments.amp:
        with naming(config, "optim_wrapper"):
            config.optim_wrapper = enable_amp(config.get("optim_wrapper", {}))
    if arguments.work_dir is not None:
        config.work_dir = arguments.work_dir
    if config.get("work_dir") is None:
        config.work_dir = str(Path("work_dirs") / arguments.config.stem)
    if arguments.resume is not None:
        config.resume = True
        config.load_from = None if arguments.resume is _NEWEST else arguments.resume
    if arguments.resume_overrides:
        if not config.get("resume"):
            raise UsageError("--resume-overrides: there is nothing to resume; give --resume too")
        config.resume_overrides = True
    if arguments.launcher is not None:
        config.launcher = arguments.launcher
    if config.get("launcher") == "pytorch" and "RANK" not in os.environ:
        raise UsageError(
            "--launcher pytorch: start the processes with torchrun, as in torchrun --nproc-per-node 2 -m fusedopt "
            f"train {arguments.config} --launcher pytorch"
        )
    check_names(config)
    with naming(config):
        runner = Runner.from_cfg(config)
        if runner.train_loop is None:
            raise ValueError("there is nothing to train: set train_dataloader, train_cfg and optim_wrapper")
    runner.train()
    return 0


def _plot_schedule(arguments: argparse.Namespace) -> int:
    from .engine.config import ConfigError, naming
    from .engine.validation import check_names
    from .schedulers import plot_schedule, simulate_schedule

    require("matplotlib", "plot")
    out = arguments.out if arguments.out.suffix else arguments.out.with_name(f"{arguments.out.name}.png")
    config = _load_config(arguments)
    check_names(config, "optim_wrapper", "param_scheduler")  # the model and the data need not be there
    epoch_length = arguments.epoch_length or _epoch_length(config)
    try:
        with naming(config):
            schedule = simulate_schedule(config, epoch_length=epoch_length)
    except ConfigError as error:
        if epoch_length is None and "epoch_length" in str(error):
            raise UsageError(f"{error}: give --epoch-length") from error
        raise
    figure = plot_schedule(schedule, title=str(arguments.config), log=arguments.log)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as error:
        raise UsageError(f"--out {out}: cannot save: {getattr(error, 'strerror', None) or error}") from error
    print(f"Saved {out}: {schedule.ticks} {schedule.unit}s, schedulers: {len(schedule.spans)}")
    return 0


def _epoch_length(config: Config) -> int | None:
    """Iterations in an epoch of the config's training data; None where the data are not there."""
    from .engine import ConfigError, build_dataloader
    from .engine.config import naming

    if config.get("train_dataloader") is None:
        return None
    try:
        with naming(config):
            return len(build_dataloader(config.train_dataloader, seed=0, shuffle=True))
    except (ConfigError, MissingExtraError):
        return None


def _compare(arguments: argparse.Namespace) -> int:
    import torch

    for module in ("rich", "matplotlib"):
        require(module, "demo")  # now rather than after a minute of training
    from rich.console import Console

    from .demo.compare import compare
    from .demo.report import print_comparison, save_figure, save_json, show_progress

    has_cuda = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_cuda:
        raise UsageError("--device cuda: torch finds no usable CUDA device here")
    device = torch.device("cuda" if has_cuda and arguments.device != "cpu" else "cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    config = _load_config(arguments)
    if arguments.epochs is not None:
        config.merge_from_dict({"train_cfg.max_epochs": arguments.epochs})
    out = arguments.out or Path("work_dirs") / arguments.config.stem
    try:
        out.mkdir(parents=True, exist_ok=True)  # now rather than after the training
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
            print(f"fusedopt: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings as one line, without the line of Python that they are from."""
    show = warnings.showwarning

    def show_line(message: Warning | str, category: type[Warning], *place: Any, **file: Any) -> None:
        if issubclass(category, UserWarning):
            print(f"fusedopt: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, *place, **file)

    warnings.showwarning = show_line
    try:
        yield
    finally:
        warnings.showwarning = show


def _is_mistake(error: Exception) -> bool:
    """Whether ``error`` is the user's to correct, rather than a fault in the program."""
    from .engine import CheckpointError, ConfigError

    return isinstance(error, (CheckpointError, ConfigError, MissingExtraError, UsageError))
