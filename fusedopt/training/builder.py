"""build_optim_wrapper: build an optimizer wrapper from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .constructors import DefaultOptimWrapperConstructor
from .registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, check_config
from .unwrapping import unwrap
from .wrappers import AmpOptimWrapper, OptimWrapper

__all__ = ["build_optim_wrapper", "enable_amp", "is_wrapper_cfg"]


def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> OptimWrapper:
    """Build the optimizer of ``model`` and its wrapper, as ``mmengine.optim.build_optim_wrapper``.

    Args:
        model: the model to train; wrappers such as torch.compile's or DistributedDataParallel are removed.
        cfg: ``type`` of the wrapper (``'OptimWrapper'`` by default), ``optimizer``, ``paramwise_cfg``, ``constructor``
            (a name, an import path, a class, or a dict with a ``type``; :class:`DefaultOptimWrapperConstructor` by
            default) and the wrapper's own arguments. Not changed.

    Raises:
        KeyError: no ``optimizer``, or an unknown ``type`` or ``constructor``.
        TypeError: ``cfg`` or a part of it has the wrong type.
        ValueError: an unknown key, or a value out of range.
    """
    check_config("optim_wrapper", cfg)
    settings = dict(cfg)
    # A directive for merging config files; it remains if there was no base to merge with.
    settings.pop("_delete_", None)
    constructor = settings.pop("constructor", DefaultOptimWrapperConstructor)
    paramwise_cfg = settings.pop("paramwise_cfg", None)
    if isinstance(constructor, str) or callable(constructor):
        constructor = {"type": constructor}
    check_config("constructor", constructor)
    construct = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {**constructor, "optim_wrapper_cfg": settings, "paramwise_cfg": paramwise_cfg}
    )
    return construct(unwrap(model) if isinstance(model, nn.Module) else model)


def is_wrapper_cfg(value: Any) -> bool:
    """Whether ``value`` is the config of one wrapper, at the top or as an entry of several optimizers' config."""
    return isinstance(value, Mapping) and "optimizer" in value


def enable_amp(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a wrapper config with mixed precision switched on, as for the ``--amp`` of training scripts.

    ``type='OptimWrapper'``, the default, becomes ``'AmpOptimWrapper'``, with ``loss_scale='dynamic'`` unless given.
    With several optimizers, as with :class:`MultiOptimWrapperConstructor`, every entry is set.

    Args:
        cfg: a config for :func:`build_optim_wrapper`. Not changed.

    Raises:
        KeyError: neither ``cfg`` nor an entry has the key ``optimizer``.
        TypeError: ``cfg`` is not a dict.
        ValueError: a wrapper has any other type.
    """
    check_config("optim_wrapper", cfg)
    if "optimizer" not in cfg:
        entries = {key: value for key, value in cfg.items() if is_wrapper_cfg(value)}
        if not entries:
            has = ", ".join(map(repr, cfg)) or "no keys"
            raise KeyError(f"optim_wrapper needs the key 'optimizer', at the top or in its entries; it has {has}")
        common = {"type": cfg["type"]} if "type" in cfg else {}
        return {**cfg, **{key: enable_amp({**common, **entry}) for key, entry in entries.items()}}
    kind = cfg.get("type", "OptimWrapper")
    if OPTIM_WRAPPERS.resolve(kind) not in (OptimWrapper, AmpOptimWrapper):
        raise ValueError(f"mixed precision can be switched on for an OptimWrapper, not for type {kind!r}")
    return {"loss_scale": "dynamic", **cfg, "type": "AmpOptimWrapper"}
