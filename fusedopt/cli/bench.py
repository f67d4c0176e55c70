"""``fusedopt bench``."""

from __future__ import annotations

import argparse
from typing import Any

from .arguments import UsageError, common, examples, whole_number

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "bench",
        parents=[common()],
        help="time the optimizer step against torch's optimizers",
        description="Time one optimizer step, with loss scaling, clipping and accumulation, on the parameter shapes of "
        "a model. Every contender's result is checked first; then all take turns, round by round. All combinations of "
        "repeated options are run.",
        epilog=examples(
            "fusedopt bench",
            "fusedopt bench --list",
            "fusedopt bench --workload vit-tiny --grouping one --grouping each --optimizer sgd",
            "fusedopt bench --contender fusedopt --contender torch-fused --rounds 50 --threads 1",
        ),
    )
    parser.add_argument(
        "--list", action="store_true", help="list the workloads, recipes, contenders and so on, and exit"
    )
    for option, default, text in (
        ("workload", "vit-tiny", "model whose parameter shapes are used"),
        ("grouping", "one", "how parameters are grouped"),
        ("optimizer", "adamw", "optimizer"),
        ("recipe", "amp-clip", "what happens in a step"),
        ("dtype", "fp32", "dtype of the parameters or gradients"),
    ):
        parser.add_argument(
            f"--{option}", metavar="NAME", action="append", help=f"{text}; may be repeated (default: {default})"
        )
    parser.add_argument(
        "--contender",
        metavar="NAME",
        action="append",
        help="contender; may be repeated; 'all': all that can run here (default: fusedopt and torch's, not compiled)",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=whole_number(2), default=25, help="paired rounds (default: 25, minimum: 2)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", metavar="N", type=whole_number(), help="CPU threads (default: torch's choice)")
    parser.add_argument("--warm", action="store_true", help="do not flush the caches between rounds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    import itertools

    import torch

    from ..bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS, Case
    from ..bench import run as run_case
    from ..bench.measure import CacheFlush
    from ..bench.tables import case_table

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
        result = run_case(case, names, arguments.rounds, flush)
        # The user did not ask for these by name.
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
