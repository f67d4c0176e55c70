"""build_optim_wrapper: from a config to an optimizer wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .constructors import DefaultOptimWrapperConstructor
from .registry import OPTIM_WRAPPER_CONSTRUCTORS, check_config
from .wrappers import OptimWrapper

__all__ = ["build_optim_wrapper"]


def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> OptimWrapper:
    """Build the optimizer of ``model`` and its wrapper, as ``mmengine.optim.build_optim_wrapper``.

    Args:
        model: the model to train.
        cfg: ``type`` of the wrapper (``'OptimWrapper'`` by default), ``optimizer``, ``paramwise_cfg``, ``constructor``
            (a name, an import path, a class, or a dict with a ``type``; :class:`DefaultOptimWrapperConstructor` by
            default) and the wrapper's own arguments. Not changed.

    Raises:
        KeyError: no ``optimizer``, or an unknown ``type`` or ``constructor``.
        TypeError: ``cfg`` or a part of it is of the wrong kind.
        ValueError: an unknown key, or a value out of range.
    """
    check_config("optim_wrapper", cfg)
    settings = dict(cfg)
    # A directive to whoever merges config files; it is still there when there was no base to merge with.
    settings.pop("_delete_", None)
    constructor = settings.pop("constructor", DefaultOptimWrapperConstructor)
    paramwise_cfg = settings.pop("paramwise_cfg", None)
    if isinstance(constructor, str) or callable(constructor):
        constructor = {"type": constructor}
    check_config("constructor", constructor)
    construct = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {**constructor, "optim_wrapper_cfg": settings, "paramwise_cfg": paramwise_cfg}
    )
    return construct(model)
