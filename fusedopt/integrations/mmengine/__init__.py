"""fusedopt inside MMEngine: optimizers and wrappers by name in its registries.

``custom_imports = dict(imports=['fusedopt.integrations.mmengine'])`` in a config makes ``FusedSGD``, ``FusedAdam``,
``FusedAdamW``, ``FusedOptimWrapper`` and ``FusedAmpOptimWrapper`` known to MMEngine, and constructors that it has not
itself: ``MultiOptimWrapperConstructor`` and those of layer-wise decay. One line in the log says which path a training
takes. :mod:`fusedopt.integrations.mmengine.replace` also puts the wrappers in the stock ones' place.
"""

from __future__ import annotations

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

from ...optimizers import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from ...registry import OPTIMIZERS as OUR_OPTIMIZERS
from ..mmengine_log import announce_stock_path
from . import constructors
from .wrappers import FusedAmpOptimWrapper, FusedOptimWrapper

__all__ = ["FusedAdam", "FusedAdamW", "FusedAmpOptimWrapper", "FusedOptimWrapper", "FusedSGD"]

for _name, _optimizer in OUR_OPTIMIZERS.module_dict.items():
    if isinstance(_optimizer, type) and issubclass(_optimizer, FusedOptimizer):
        OPTIMIZERS.register_module(name=_name, module=_optimizer, force=True)
for _wrapper in (FusedOptimWrapper, FusedAmpOptimWrapper):
    OPTIM_WRAPPERS.register_module(module=_wrapper, force=True)
for _name in constructors.__all__:
    if _name not in OPTIM_WRAPPER_CONSTRUCTORS.module_dict:
        OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=getattr(constructors, _name))

announce_stock_path()
