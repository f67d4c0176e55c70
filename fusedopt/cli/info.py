"""``fusedopt info``: versions, devices and backends of this installation."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterable
from typing import Any

import torch

from ..backends import BACKENDS, VARIABLE, Backend, TritonBackend, selftest, triton_warm_up
from ..backends.native import compiled_module
from ..messages import aligned
from ..rules import RULES
from ..version import __version__
from .arguments import common, examples
from .recipes import recipes

__all__ = ["add", "info", "run", "self_test", "warm_up"]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _devices() -> list[torch.device]:
    gpus = [(kind, index) for kind in ("cuda", "xpu") for index in range(getattr(torch, kind).device_count())]
    return [torch.device("cpu"), *(torch.device(*gpu) for gpu in gpus)]


def info() -> str:
    """Versions, devices, the compiled module, and whether each backend can run on each device, or why not."""
    module, reason = compiled_module()
    rows = [
        ("fusedopt", __version__),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("processor", f"{_processor()}, {os.cpu_count()} logical, {torch.get_num_threads()} torch threads"),
    ]
    for device in _devices()[1:]:
        rows.append((str(device), getattr(torch, device.type).get_device_name(device)))
    if module is None:
        rows.append(("compiled module", f"absent: {reason}"))
    else:
        build = module.build_info()
        cuda = f"CUDA {build['cuda']} ({build['cuda_archs']})" if build["cuda"] else "no CUDA"
        rows.append(("compiled module", f"built for torch {build['torch']} with {build['compiler']}, {cuda}"))
        rows.append(("CPU kernels", f"{module.cpu_isa()} in use (here: {', '.join(module.cpu_isas())})"))
        rows.append(("CUDA runtime", module.cuda_problem() or "usable"))
        rows.append(("rules", ", ".join(RULES)))
    for device in _devices():
        for name, backend in BACKENDS.items():
            unavailable = backend.unavailable(device)
            rows.append((f"backend {name} on {device}", "available" if unavailable is None else unavailable))
    if os.environ.get(VARIABLE):
        rows.append((VARIABLE, f"{os.environ[VARIABLE]}: used instead of 'auto'"))
    if os.environ.get(selftest.VARIABLE):
        rows.append((selftest.VARIABLE, f"the self-test is {'on' if selftest.switched_on() else 'off'}"))
    return aligned(rows)


def self_test(
    devices: Iterable[torch.device] | None = None, backends: Iterable[type[Backend]] | None = None
) -> tuple[str, bool]:
    """Run the self-test; return its results as a table, and whether all of them passed.

    Args:
        devices: devices to test; all GPUs by default.
        backends: backends to test; by default all that must pass the self-test on the device before use.
    """
    gpus = _devices()[1:] if devices is None else list(devices)
    if not gpus:
        return "self-test: there is no GPU here, and CPU backends need no self-test", True
    rows, good = [], True
    for device in gpus:
        tried = [backend for backend in BACKENDS.values() if backend.must_prove_itself(device)]
        for backend in tried if backends is None else backends:
            if (reason := backend.unavailable(device)) is not None:
                rows.append((f"{backend.name} on {device}", f"not tried: {reason}"))
                continue
            for each in RULES.values():
                if (reason := backend.unavailable_for(each)) is not None:
                    rows.append((f"{backend.name} on {device}: {each.name}", f"not tried: {reason}"))
            for rule, dtype, mode, problem in selftest.table(backend, device):
                good = good and problem is None
                rows.append((f"{backend.name} on {device}: {rule}, {dtype}, {mode}", problem or "ok"))
    return aligned(rows), good


def warm_up() -> str:
    """Make the first steps of the Triton backend on each GPU; return their times, which are compilation and tuning.

    Later processes find both in Triton's cache on disk and report only the remaining time.
    """
    rows = []
    for device in _devices()[1:]:
        if (reason := TritonBackend.unavailable(device)) is not None:
            rows.append((f"warm-up on {device}", f"not done: {reason}"))
            continue
        for found in triton_warm_up.warm_up(device):
            what = f"warm-up of {found.rule}, {str(found.dtype).removeprefix('torch.')} on {device}"
            block, warps = found.tuning
            rows.append((what, f"{found.seconds:.1f} s, {block} elements and {warps} warps per program"))
    return aligned(rows or [("warm-up", "no GPU, so there is nothing to compile")])


def add(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "info",
        parents=[common()],
        help="show versions, devices and backends",
        description="Show versions, devices, and which backends can run here.",
        epilog=examples("fusedopt info", "fusedopt info --selftest"),
    )
    parser.add_argument(
        "--warmup",
        action="store_true",
        help="also compile and tune the Triton kernels for each GPU, and show how long that took",
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="also run the self-test of all kernels on each GPU; exits with 1 if one fails",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    print(info())
    print(f"\n{recipes()}")
    if arguments.warmup:
        print(f"\n{warm_up()}")
    if arguments.selftest:
        table, good = self_test()
        print(f"\n{table}")
        return 0 if good else 1
    return 0
