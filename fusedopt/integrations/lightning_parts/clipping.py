"""What Lightning's Trainer and Fabric both ask of a fused optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...amp import GradScaler
from ...optimizers import FusedOptimizer
from ...optimizers.next_step import clip_next_step
from ...rules import NormClip, ValueClip
from ..scalers import scale_of_gradients

__all__ = [
    "as_stock",
    "clip_in_the_step",
    "comes_from",
    "fused_optimizer",
    "refuse_two_clippings",
    "serves_scaler",
    "serves_strategy",
]

_SERVED = "SingleDeviceStrategy", "DDPStrategy", "DataParallelStrategy", "ModelParallelStrategy"


def fused_optimizer(optimizer: Any) -> FusedOptimizer | None:
    """The fused optimizer in Lightning's wrapper, or without one; None for any other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return optimizer if isinstance(optimizer, FusedOptimizer) else None


def comes_from(packages: Sequence[str], owner: Any, *names: str) -> bool:
    """Whether all these methods of an object are those of some packages."""
    return all(getattr(type(owner), name).__module__.partition(".")[0] in packages for name in names)


def serves_strategy(packages: Sequence[str], kind: type) -> bool:
    """Whether a fused optimizer has, or knows how to find, the norm of all gradients under a strategy of this class.

    The class that decides is the first one among its bases that is a package's own.
    """
    bases = kind.__mro__
    return next((base.__name__ for base in bases if base.__module__.partition(".")[0] in packages), None) in _SERVED


def serves_scaler(scaler: Any) -> bool:
    """Whether a scaler leaves unscaling to a fused step."""
    return scaler is None or isinstance(scaler, GradScaler)


def clip_in_the_step(optimizer: FusedOptimizer, clip: NormClip | ValueClip, scaler: Any) -> Tensor | None:
    """:func:`fusedopt.optimizers.next_step.clip_next_step`, with the scale that the gradients have."""
    return clip_next_step(optimizer, clip, scale_of_gradients(scaler, optimizer))


def refuse_two_clippings(optimizer: FusedOptimizer) -> None:
    """Raise ValueError if the optimizer has ``clip_grad`` of its own."""
    if optimizer.clip_grad is not None:
        raise ValueError(
            f"Lightning clips, and {type(optimizer).__name__} has clip_grad={optimizer.clip_grad} of its own; "
            "expected one of both"
        )


@contextmanager
def as_stock(optimizer: FusedOptimizer) -> Iterator[None]:
    """Within it Lightning unscales and clips the gradients of a fused optimizer as those of a stock one."""
    shared = optimizer._shared
    before, shared.takes_scale = shared.takes_scale, False
    try:
        yield
    finally:
        shared.takes_scale = before
