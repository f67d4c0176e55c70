"""fusedopt: fused SGD, Adam and AdamW for PyTorch, with unscaling, clipping and weight decay inside the kernel."""

from .backends import StepReport
from .optimizers import FusedAdam, FusedAdamW, FusedSGD, fuse

__version__ = "0.1.0"

__all__ = ["FusedAdam", "FusedAdamW", "FusedSGD", "StepReport", "__version__", "fuse"]
