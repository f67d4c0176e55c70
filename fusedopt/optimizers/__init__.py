"""Fused optimizers with the interface of ``torch.optim``."""

from .adam import FusedAdam
from .adamw import FusedAdamW
from .base import FusedOptimizer
from .clip_group import ClipGroup
from .fuse import FUSED_TWINS, fuse
from .sgd import FusedSGD
from .unfuse import unfuse

# What fusedopt exports, too.
__all__ = ["ClipGroup", "FusedAdam", "FusedAdamW", "FusedOptimizer", "FusedSGD", "fuse", "unfuse"]

#: Every optimizer by name. The base has no rule; after a reload, it may be another than that of these classes.
FUSED_OPTIMIZERS: dict[str, type[FusedOptimizer]] = {
    name: value for name, value in list(globals().items()) if isinstance(value, type) and hasattr(value, "rule")
}
FUSED_TWINS.update((cls.stock, cls) for cls in FUSED_OPTIMIZERS.values() if cls.stock is not None)
