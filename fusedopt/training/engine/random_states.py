"""The random number generators of a process: seed and states."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_random_states",
    "fix_cublas_workspace",
    "isolated_random_states",
    "random_states",
    "seed_everything",
    "set_random_states",
]

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = (":4096:8", ":16:8")  # the values that torch.use_deterministic_algorithms accepts


def _numpy_random() -> Any:
    """The module ``numpy.random``, or None if numpy, which torch does not need, is not installed."""
    try:
        return importlib.import_module("numpy.random")
    except ModuleNotFoundError:
        return None


def fix_cublas_workspace(cuda_was_in_use: bool) -> None:
    """Give cuBLAS workspaces of a fixed size, which torch's deterministic algorithms require for matrix products.

    cuBLAS reads the setting when it starts, so it has no effect in a process that has used CUDA already.

    Raises:
        ValueError: the process has used CUDA already, or the environment has a nondeterministic setting.
    """
    if torch.version.hip is not None:
        return
    found = os.environ.get(_CUBLAS)
    first, second = _CUBLAS_FIXED
    wanted = f"randomness.deterministic=True on a GPU needs {_CUBLAS}={first} (or {second}) in the environment"
    if found is None and cuda_was_in_use:
        raise ValueError(f"{wanted}, but this process has already used CUDA: set it before the process starts")
    if found is not None and found not in _CUBLAS_FIXED:
        raise ValueError(f"{wanted}, which has {found!r}")
    os.environ.setdefault(_CUBLAS, first)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, including those of all GPUs.

    Args:
        seed: from 0 to 2**32 - 1.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    numpy_random = _numpy_random()
    if numpy_random is not None:
        numpy_random.seed(seed)


def random_states(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators, including the current GPU's, in plain types.

    Args:
        generator: another generator whose state is included.
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy_random = _numpy_random()
    if numpy_random is not None:
        name, keys, *rest = numpy_random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    if torch.cuda.is_initialized():  # otherwise nothing was drawn there, and asking would start CUDA
        states["cuda"] = torch.cuda.get_rng_state()
    if generator is not None:
        states["generator"] = generator.get_state()
    return states


def set_random_states(states: Mapping[str, Any], generator: torch.Generator | None = None) -> None:
    """Restore states from :func:`random_states`; generators without a state there stay as they are."""
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


def check_random_states(states: Mapping[str, Any]) -> None:
    """Try states from :func:`random_states` on other generators; whatever these raise shows that they are not."""
    version, values, gauss = states["python"]
    random.Random().setstate((version, tuple(values), gauss))
    for key in ("torch", "generator"):
        if key in states or key == "torch":
            torch.Generator().set_state(states[key])
    numpy_random = _numpy_random()
    if numpy_random is not None and "numpy" in states:
        numpy_random.RandomState().set_state(tuple(states["numpy"]))
    if not isinstance(states.get("cuda"), (Tensor, type(None))):
        raise TypeError("the state of the GPU's generator is no tensor")


@contextlib.contextmanager
def isolated_random_states(generator: torch.Generator | None = None) -> Iterator[None]:
    """Restore all generators at the end, so that code inside does not change later random numbers.

    Args:
        generator: as for :func:`random_states`.
    """
    states = random_states(generator)
    try:
        yield
    finally:
        set_random_states(states, generator)
