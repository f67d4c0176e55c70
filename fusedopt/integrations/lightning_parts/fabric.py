"""``fuse`` and ``unfuse`` for Fabric, without the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...optimizers import FusedOptimizer
from ...rules import NormClip, ValueClip
from ..replaced import is_replaced, replace_methods, restore_methods
from .clipping import (
    as_stock,
    clip_in_the_step,
    comes_from,
    fused_optimizer,
    refuse_two_clippings,
    serves_scaler,
    serves_strategy,
)

__all__ = ["fuse_fabric", "unfuse_fabric"]


def fuse_fabric(packages: tuple[str, ...], kind: type, fabric: Any) -> None:
    """``fuse(fabric)`` for a class Fabric, which comes from some packages."""
    _check(kind, fabric)
    strategy = fabric.strategy
    if not serves_strategy(packages, type(strategy)):
        raise ValueError(
            f"fuse() does not serve {type(strategy).__name__}; expected SingleDeviceStrategy, DDPStrategy, "
            "DataParallelStrategy or ModelParallelStrategy"
        )
    if is_replaced(strategy):
        return
    by_norm, by_value = strategy.clip_gradients_norm, strategy.clip_gradients_value

    def clipped(optimizer: Any, clip: Callable[[], NormClip | ValueClip], stock: Callable[[], Any]) -> Any:
        fused = fused_optimizer(optimizer)
        if fused is None:
            return stock()
        scaler = getattr(strategy.precision, "scaler", None)
        if _is_known(packages, strategy, scaler):
            return clip_in_the_step(fused, clip(), scaler)
        return _clipped_by_fabric(fused, stock)

    def clip_gradients_norm(
        module: Any,
        optimizer: Any,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        return clipped(
            optimizer,
            lambda: NormClip(max_norm, norm_type, error_if_nonfinite),
            lambda: by_norm(
                module, optimizer, max_norm=max_norm, norm_type=norm_type, error_if_nonfinite=error_if_nonfinite
            ),
        )

    def clip_gradients_value(module: Any, optimizer: Any, clip_val: float) -> None:
        clipped(optimizer, lambda: ValueClip(clip_val), lambda: by_value(module, optimizer, clip_val=clip_val))

    methods: dict[str, Callable[..., Any]]
    methods = {"clip_gradients_norm": clip_gradients_norm, "clip_gradients_value": clip_gradients_value}
    replace_methods(strategy, methods, getattr(strategy.precision, "scaler", None))


def unfuse_fabric(kind: type, fabric: Any) -> None:
    """``unfuse(fabric)`` of a package."""
    _check(kind, fabric)
    restore_methods(fabric.strategy)


def _check(kind: type, fabric: Any) -> None:
    if not isinstance(fabric, kind):
        names = [f"{each.__module__.partition('.')[0]}.{each.__qualname__}" for each in (kind, type(fabric))]
        raise TypeError(f"expected a {names[0]}; got {names[1]}")


def _is_known(packages: tuple[str, ...], strategy: Any, scaler: Any) -> bool:
    """Whether nothing but the packages decides how gradients are unscaled and clipped."""
    return (
        serves_scaler(scaler)
        and comes_from(packages, strategy, "clip_gradients_norm", "clip_gradients_value")
        and comes_from(packages, strategy.precision, "main_params", "unscale_gradients", "optimizer_step")
    )


def _clipped_by_fabric(optimizer: FusedOptimizer, stock: Callable[[], Any]) -> Any:
    refuse_two_clippings(optimizer)
    with as_stock(optimizer):
        return stock()
