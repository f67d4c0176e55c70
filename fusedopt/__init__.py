"""fusedopt: fused SGD, Adam and AdamW for PyTorch, with unscaling, clipping and weight decay inside the kernel."""

from . import amp
from .backends import StepReport
from .builder import build_optim_wrapper
from .constructors import DefaultOptimWrapperConstructor
from .optimizers import FusedAdam, FusedAdamW, FusedSGD, fuse
from .version import __version__
from .wrappers import AmpOptimWrapper, BaseOptimWrapper, OptimWrapper

__all__ = [
    "AmpOptimWrapper",
    "BaseOptimWrapper",
    "DefaultOptimWrapperConstructor",
    "FusedAdam",
    "FusedAdamW",
    "FusedSGD",
    "OptimWrapper",
    "StepReport",
    "__version__",
    "amp",
    "build_optim_wrapper",
    "fuse",
]
