"""fusedopt's wrapper constructors, which build classes from MMEngine's registries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import mmengine.optim
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS

from ...optimizers import FUSED_TWINS
from ...training import constructors
from ...training.builder import is_wrapper_cfg
from .wrappers import FusedAmpOptimWrapper, FusedOptimWrapper

__all__ = [
    "FusedOptimWrapperConstructor",
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


class FusedOptimWrapperConstructor(mmengine.optim.DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, which builds the fused twins of the wrapper and of the optimizer.

    As ``optim_wrapper.constructor`` it makes a stock config fused by one option on the command line.

    Args:
        optim_wrapper_cfg: an ``OptimWrapper`` or ``AmpOptimWrapper`` of an ``SGD``, ``Adam`` or ``AdamW``, or twins of
            these.
        paramwise_cfg: as in MMEngine.

    Raises:
        ValueError: another wrapper or optimizer, which has no twin.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        optimizer = optim_wrapper_cfg.get("optimizer")
        if not isinstance(optimizer, Mapping):
            raise ValueError(f"{type(self).__name__} builds one wrapper from its config, which has no dict 'optimizer'")
        wrapper = _twin(OPTIM_WRAPPERS, "optim_wrapper.type", optim_wrapper_cfg.get("type", "OptimWrapper"), _WRAPPERS)
        twin = _twin(OPTIMIZERS, "optim_wrapper.optimizer.type", optimizer.get("type"), FUSED_TWINS)
        cfg = {**optim_wrapper_cfg, "type": wrapper, "optimizer": {**optimizer, "type": twin}}
        super().__init__(cfg, paramwise_cfg)


#: The fused twins of MMEngine's wrappers.
_WRAPPERS = {
    mmengine.optim.OptimWrapper: FusedOptimWrapper,
    mmengine.optim.AmpOptimWrapper: FusedAmpOptimWrapper,
}


def _twin(registry: Any, key: str, kind: Any, twins: Mapping[Any, type]) -> type:
    """The twin of a type, which may be one already. Another class of the same name has none."""
    found = registry.get(kind) if isinstance(kind, str) else kind
    if found in twins.values():
        return found
    if found not in twins:
        raise ValueError(
            f"{key}={kind!r} has no fused twin; expected one of {', '.join(each.__name__ for each in twins)}"
        )
    return twins[found]


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
        entries = {key: _resolved(entry) for key, entry in cfg.items() if is_wrapper_cfg(entry)}
        super().__init__({**cfg, **entries}, paramwise_cfg)
