"""Optimizer wrappers: loss scaling, backward, accumulation, clipping and the step behind one ``update_params``."""

from .amp import AmpOptimWrapper
from .base import BaseOptimWrapper
from .dict import OptimWrapperDict
from .scheduling import SkipAwareScheduler
from .wrapper import OptimWrapper

__all__ = [
    "AmpOptimWrapper",
    "BaseOptimWrapper",
    "OptimWrapper",
    "OptimWrapperDict",
    "SkipAwareScheduler",
]
