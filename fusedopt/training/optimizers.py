"""Registers torch's optimizers and the fused ones by name."""

from __future__ import annotations

import torch

from .. import optimizers
from .registry import OPTIMIZERS

__all__: list[str] = []

#: Bases that are not for direct use.
_ABSTRACT = ("Optimizer", "FusedOptimizer")

for _package in (torch.optim, optimizers):
    for _name, _class in vars(_package).items():
        if isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer) and _name not in _ABSTRACT:
            OPTIMIZERS.register_module(name=_name, module=_class)
OPTIMIZERS.register_lazily("ZeroRedundancyOptimizer", "fusedopt.training.zero.ZeroRedundancyOptimizer")
