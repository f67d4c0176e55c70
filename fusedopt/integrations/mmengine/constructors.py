"""fusedopt's wrapper constructors, which build classes from MMEngine's registries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mmengine.optim
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS

from ...training import constructors

__all__ = [
    "LayerDecayOptimizerConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
    "MultiOptimWrapperConstructor",
]


def _resolved(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapper config whose names are replaced by MMEngine's classes; a name that it does not know stays."""

    def found(registry: Any, cfg: Mapping[str, Any]) -> dict[str, Any]:
        kind = cfg.get("type")
        return {**cfg, "type": registry.get(kind) or kind} if isinstance(kind, str) else {**cfg}

    optimizer = cfg.get("optimizer")
    own = {"optimizer": found(OPTIMIZERS, optimizer)} if isinstance(optimizer, Mapping) else {}
    return {**found(OPTIM_WRAPPERS, cfg), **own}


class _Resolved:
    """A mixin, placed before one of fusedopt's constructors: makes it build MMEngine's wrappers."""

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        super().__init__(_resolved({"type": "OptimWrapper", **optim_wrapper_cfg}), paramwise_cfg)  # type: ignore[call-arg]


class LearningRateDecayOptimWrapperConstructor(_Resolved, constructors.LearningRateDecayOptimWrapperConstructor):
    """As in fusedopt, with MMEngine's wrappers."""


class LearningRateDecayOptimizerConstructor(_Resolved, constructors.LearningRateDecayOptimizerConstructor):
    """As in fusedopt, with MMEngine's wrappers."""


class LayerDecayOptimizerConstructor(_Resolved, constructors.LayerDecayOptimizerConstructor):
    """As in fusedopt, with MMEngine's wrappers."""


class MultiOptimWrapperConstructor(constructors.MultiOptimWrapperConstructor):
    """As in fusedopt, with MMEngine's wrappers in MMEngine's ``OptimWrapperDict``."""

    wrapper_dict: ClassVar[Callable[..., Any]] = mmengine.optim.OptimWrapperDict

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        cfg = _resolved({"type": "OptimWrapper", **optim_wrapper_cfg})
        entries = {key: _resolved(entry) for key, entry in cfg.items() if _is_entry(entry)}
        super().__init__({**cfg, **entries}, paramwise_cfg)


def _is_entry(value: Any) -> bool:
    return isinstance(value, Mapping) and "optimizer" in value
