"""fusedopt inside MMEngine: optimizers and wrappers by name in its registries.

``custom_imports = dict(imports=['fusedopt.integrations.mmengine'])`` in a config makes ``FusedSGD``, ``FusedAdam``,
``FusedAdamW``, ``FusedOptimWrapper`` and ``FusedAmpOptimWrapper`` known to MMEngine. One line in the log says which
path a training takes. :mod:`fusedopt.integrations.mmengine.replace` also puts the wrappers in the stock ones' place.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS

from ...optimizers import FusedAdam, FusedAdamW, FusedSGD
from .path import announce_stock_path
from .wrappers import FusedAmpOptimWrapper, FusedOptimWrapper

__all__ = ["FusedAdam", "FusedAdamW", "FusedAmpOptimWrapper", "FusedOptimWrapper", "FusedSGD"]

_classes: dict[Any, tuple[type, ...]] = {
    OPTIMIZERS: (FusedSGD, FusedAdam, FusedAdamW),
    OPTIM_WRAPPERS: (FusedOptimWrapper, FusedAmpOptimWrapper),
}
for _registry, _members in _classes.items():
    for _class in _members:
        _registry.register_module(module=_class, force=True)

announce_stock_path()
