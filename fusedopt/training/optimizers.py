"""Registers torch's optimizers and the fused ones by name."""

from __future__ import annotations

import torch

from ..optimizers import FUSED_OPTIMIZERS
from .registry import OPTIMIZERS

__all__: list[str] = []

for _name, _class in (*vars(torch.optim).items(), *FUSED_OPTIMIZERS.items()):
    if isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer) and _class is not torch.optim.Optimizer:
        OPTIMIZERS.register_module(name=_name, module=_class)
OPTIMIZERS.register_lazily("ZeroRedundancyOptimizer", "fusedopt.training.zero.ZeroRedundancyOptimizer")
