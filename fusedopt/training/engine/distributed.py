"""Several processes: starting them, their ranks, and communication between them."""

from __future__ import annotations

import atexit
import datetime
import os
import time
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ...messages import did_you_mean

__all__ = ["LAUNCHERS", "broadcast", "gather", "is_main_process", "launch", "rank", "world_size"]

LAUNCHERS = ("none", "pytorch")

T = TypeVar("T")


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The rank of this process; 0 in a single process."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _running() else 1


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def launch(launcher: str, backend: str | None = None, **settings: Any) -> None:
    """Join the process group of a run.

    Args:
        launcher: ``'none'`` for a single process, ``'pytorch'`` under ``torchrun``.
        backend: ``torch.distributed`` backend; by default gloo on CPUs and NCCL on GPUs. Without a GPU gloo replaces
            ``'nccl'``.
        settings: other arguments of ``torch.distributed.init_process_group``; ``timeout`` may be a number of seconds.

    Raises:
        ValueError: an unknown launcher.
        RuntimeError: ``'pytorch'`` without torchrun's environment variables.
    """
    if launcher not in LAUNCHERS:
        raise ValueError(f"Invalid launcher: {launcher!r}; {did_you_mean(launcher, LAUNCHERS)}")
    if launcher == "none" or _running():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"launcher='pytorch' finds no {', '.join(missing)} in the environment; start the training with torchrun"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    elif backend == "nccl":
        backend = "gloo"
    if isinstance(settings.get("timeout"), (int, float)):
        settings["timeout"] = datetime.timedelta(seconds=settings["timeout"])
    dist.init_process_group(backend, **settings)
    atexit.register(_leave)


def _leave() -> None:
    """Leave the process group before the interpreter ends.

    Gloo's threads let go of the tensors of a collective after it has returned, and need Python's lock for that; a
    process group that DistributedDataParallel holds too keeps its threads. Where the interpreter ends in between, the
    process aborts with "terminate called without an active exception" (pytorch/pytorch#190489), so that they get the
    lock for a moment first.
    """
    if _running():
        dist.destroy_process_group()
        time.sleep(0.05)


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in the main process; ``[]`` in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_main_process() else []
    dist.gather_object(value, values or None)
    return values


def broadcast(value: T) -> T:
    """The value of the main process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
