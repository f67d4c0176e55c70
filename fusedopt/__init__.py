"""fusedopt: fused SGD, Adam and AdamW for PyTorch, with unscaling, clipping and weight decay inside the kernel."""

import sys
from typing import TYPE_CHECKING, Any

from . import amp, optimizers
from .backends import StepReport
from .optimizers import *  # noqa: F403  what it has in __all__, and so have we
from .training.builder import build_optim_wrapper, enable_amp
from .training.constructors import (
    DefaultOptimWrapperConstructor,
    LearningRateDecayOptimizerConstructor,
    LearningRateDecayOptimWrapperConstructor,
    MultiOptimWrapperConstructor,
)
from .training.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, Registry
from .training.wrappers import (
    AmpOptimWrapper,
    BaseOptimWrapper,
    OptimWrapper,
    OptimWrapperDict,
    SkipAwareScheduler,
)
from .version import __version__

if TYPE_CHECKING:
    from .training.zero import ZeroRedundancyOptimizer

__all__ = [
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "AmpOptimWrapper",
    "BaseOptimWrapper",
    "DefaultOptimWrapperConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
    "MultiOptimWrapperConstructor",
    "OptimWrapper",
    "OptimWrapperDict",
    "Registry",
    "SkipAwareScheduler",
    "StepReport",
    "ZeroRedundancyOptimizer",
    "__version__",
    "amp",
    "build_optim_wrapper",
    "enable_amp",
]
__all__ += optimizers.__all__

if "mmengine" in sys.modules:  # which imports us for a dotted type; its log is to say which path is active
    from .integrations.mmengine_log import announce_stock_path

    announce_stock_path()


def __getattr__(name: str) -> Any:
    if name == "ZeroRedundancyOptimizer":  # takes seconds to import, and few use it
        from .training.zero import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer
    raise AttributeError(f"module 'fusedopt' has no attribute {name!r}")
