"""The random number generators of a process: their seed, and their states."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch

__all__ = ["fix_cublas_workspace", "isolated_random_states", "random_states", "seed_everything", "set_random_states"]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = (":4096:8", ":16:8")  # of torch.use_deterministic_algorithms


def _numpy_random() -> Any:
    """The module ``numpy.random``, or None where numpy, which torch can do without, is not installed."""
    try:
        return importlib.import_module("numpy.random")
    except ModuleNotFoundError:
        return None


def fix_cublas_workspace(cuda_was_in_use: bool) -> None:
    """Give cuBLAS workspaces of a fixed size, without which torch's deterministic algorithms refuse to multiply.

    cuBLAS reads the setting when it starts, so it cannot be given to a process that has used CUDA already.

    Raises:
        ValueError: it is too late, or the environment has a setting with which results vary.
    """
    if torch.version.hip is not None:
        return
    found = os.environ.get(_CUBLAS)
    first, second = _CUBLAS_FIXED
    wanted = f"randomness.deterministic=True on a GPU needs {_CUBLAS}={first} (or {second}) in the environment"
    if found is None and cuda_was_in_use:
        raise ValueError(f"{wanted}, and this process has used CUDA before: set it where the process starts")
    if found is not None and found not in _CUBLAS_FIXED:
        raise ValueError(f"{wanted}, which has {found!r}")
    os.environ.setdefault(_CUBLAS, first)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of all GPUs too.

    Args:
        seed: from 0 to 2**32 - 1.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        numpy_random.seed(seed)


def random_states(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, that of the current GPU too, in plain types.

    Args:
        generator: one more, whose state is kept too.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy_random = _numpy_random()
    if numpy_random is not None:
        name, keys, *rest = numpy_random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    if torch.cuda.is_initialized():  # else nothing was drawn there, and asking would start CUDA
        states["cuda"] = torch.cuda.get_rng_state()
    if generator is not None:
        states["generator"] = generator.get_state()
    return states


def set_random_states(states: Mapping[str, Any], generator: torch.Generator | None = None) -> None:
    """Restore what :func:`random_states` returned; generators that it has no state of stay as they are."""
    version, values, gauss = states["python"]
    random.setstate((version, tuple(values), gauss))
    torch.set_rng_state(states["torch"])
    numpy_random = _numpy_random()
    if numpy_random is not None and "numpy" in states:
        numpy_random.set_state(tuple(states["numpy"]))
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if generator is not None and "generator" in states:
        generator.set_state(states["generator"])


@contextlib.contextmanager
def isolated_random_states(generator: torch.Generator | None = None) -> Iterator[None]:
    """Restore all generators at the end, so that what happens inside does not change what is drawn after it.

    Args:
        generator: as for :func:`random_states`.
    """
    states = random_states(generator)
    try:
        yield
    finally:
        set_random_states(states, generator)
