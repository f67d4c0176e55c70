"""A Runner whose construction fails leaves its arguments and the process as they were."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn

from ...undo import unchanged_on_error
from .evaluator import Evaluator
from .fully_sharded import unsharded_on_error
from .random_states import random_states, set_random_states

__all__ = ["leaves_no_trace_on_error"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def leaves_no_trace_on_error(init: _Function) -> _Function:
    """A constructor that restores its arguments and the settings of the process if it fails.

    It restores the objects in the arguments, also in lists and dicts; the states of the random generators; and torch's
    choice of algorithms. A process group that was created stays.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def construct(*args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the constructor's own message is better
            given = {}
        objects = [each for name in given if name not in ("self", "cfg") for each in _objects(given[name])]
        modules = [each for each in objects if isinstance(each, nn.Module)]
        with _settings_unchanged_on_error(), unsharded_on_error(*modules), unchanged_on_error(*objects):
            init(*args, **kwargs)

    return construct  # type: ignore[return-value]


def _objects(value: Any) -> list[Any]:
    """The objects in an argument that have state."""
    if isinstance(value, Mapping):
        return [each for item in value.values() for each in _objects(item)]
    if isinstance(value, (list, tuple)):
        return [each for item in value for each in _objects(item)]
    if isinstance(value, (type, ModuleType)) or not hasattr(value, "__dict__"):
        return []
    return [value, *value.metrics] if isinstance(value, Evaluator) else [value]


@contextlib.contextmanager
def _settings_unchanged_on_error() -> Iterator[None]:
    random, cudnn = random_states(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    except BaseException:
        set_random_states(random)
        torch.backends.cudnn.benchmark = cudnn
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        raise
