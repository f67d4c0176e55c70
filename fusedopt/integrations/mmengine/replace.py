"""Importing this puts fusedopt's wrappers under the names ``OptimWrapper`` and ``AmpOptimWrapper`` of MMEngine.

``custom_imports = dict(imports=['fusedopt.integrations.mmengine.replace'])`` is for configs and scripts that name the
stock wrappers, as the ``--amp`` of MMPretrain's training script does. Any optimizer works with them.
"""

from mmengine.registry import OPTIM_WRAPPERS

from . import FusedAmpOptimWrapper, FusedOptimWrapper

OPTIM_WRAPPERS.register_module(name="OptimWrapper", module=FusedOptimWrapper, force=True)
OPTIM_WRAPPERS.register_module(name="AmpOptimWrapper", module=FusedAmpOptimWrapper, force=True)
