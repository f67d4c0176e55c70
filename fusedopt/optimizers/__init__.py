"""Fused optimizers with the interface of ``torch.optim``."""

from .adam import FusedAdam
from .adamw import FusedAdamW
from .base import FusedOptimizer
from .fuse import FUSED_TWINS, fuse
from .sgd import FusedSGD

__all__ = ["FUSED_TWINS", "FusedAdam", "FusedAdamW", "FusedOptimizer", "FusedSGD", "fuse"]
