"""fusedopt inside MMEngine: optimizers and wrappers by name in its registries.

``custom_imports = dict(imports=['fusedopt.integrations.mmengine'])`` in a config registers ``FusedSGD``, ``FusedAdam``,
``FusedAdamW``, ``FusedOptimWrapper`` and ``FusedAmpOptimWrapper`` in MMEngine, and the constructors that it lacks:
``MultiOptimWrapperConstructor``, those for layer-wise decay, and ``FusedOptimWrapperConstructor``, which makes a stock
config fused by one option. One line in the log says which path a run takes.
:mod:`fusedopt.integrations.mmengine.replace` also replaces the stock wrappers.
"""

from __future__ import annotations

from typing import Any

from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS

from ...messages import warn_caller
from ...optimizers import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from ...training.registry import OPTIMIZERS as OUR_OPTIMIZERS
from ..mmengine_log import announce_stock_path
from . import constructors
from .constructors import FusedOptimWrapperConstructor
from .wrappers import FusedAmpOptimWrapper, FusedOptimWrapper

__all__ = [
    "FusedAdam",
    "FusedAdamW",
    "FusedAmpOptimWrapper",
    "FusedOptimWrapper",
    "FusedOptimWrapperConstructor",
    "FusedSGD",
]


def register(registry: Any, name: str, module: type, path: str, also: str = "fusedopt.") -> None:
    """Register ``module`` in an MMEngine registry, unless the name is taken by a class that must not be replaced.

    Args:
        registry: the MMEngine registry.
        name: the name in configs.
        module: the class.
        path: the ``type`` that always works in configs, for the warning.
        also: classes may be replaced if their module's name begins with this, or with ``fusedopt.``.
    """
    there = registry.module_dict.get(name)
    owner = getattr(there, "__module__", "")
    if there is None or owner.startswith(("fusedopt.", also)):
        registry.register_module(name=name, module=module, force=True)
        return
    warn_caller(
        f"{name!r} in MMEngine's {registry.name} registry is {owner}.{getattr(there, '__qualname__', there)}, and "
        f"is kept; fusedopt's own is type={path!r}"
    )


for _name, _optimizer in OUR_OPTIMIZERS.module_dict.items():
    if isinstance(_optimizer, type) and issubclass(_optimizer, FusedOptimizer):
        register(OPTIMIZERS, _name, _optimizer, f"{_optimizer.__module__.partition('.')[0]}.{_name}")
for _wrapper in (FusedOptimWrapper, FusedAmpOptimWrapper):
    register(OPTIM_WRAPPERS, _wrapper.__name__, _wrapper, f"{__name__}.{_wrapper.__name__}")
for _name in constructors.__all__:
    register(OPTIM_WRAPPER_CONSTRUCTORS, _name, getattr(constructors, _name), f"{constructors.__name__}.{_name}")

announce_stock_path()
