"""Importing this replaces MMEngine's ``OptimWrapper`` and ``AmpOptimWrapper`` by fusedopt's wrappers.

``custom_imports = dict(imports=['fusedopt.integrations.mmengine.replace'])`` is for configs and scripts that name the
stock wrappers, as the ``--amp`` of MMPretrain's training script does. Any optimizer works with them.
"""

from mmengine.registry import OPTIM_WRAPPERS

from . import FusedAmpOptimWrapper, FusedOptimWrapper, register

for _name, _wrapper in (("OptimWrapper", FusedOptimWrapper), ("AmpOptimWrapper", FusedAmpOptimWrapper)):
    register(OPTIM_WRAPPERS, _name, _wrapper, _wrapper.__name__, also="mmengine.")
