"""Fused optimizers with the interface of ``torch.optim``."""

from .adam import FusedAdam
from .adamw import FusedAdamW
from .base import FusedOptimizer
from .fuse import FUSED_TWINS, fuse
from .sgd import FusedSGD

# What fusedopt exports, too.
__all__ = ["FusedAdam", "FusedAdamW", "FusedOptimizer", "FusedSGD", "fuse"]

#: Every optimizer by name.
FUSED_OPTIMIZERS: dict[str, type[FusedOptimizer]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, FusedOptimizer) and value is not FusedOptimizer
}
FUSED_TWINS.update((cls.stock, cls) for cls in FUSED_OPTIMIZERS.values() if cls.stock is not None)
