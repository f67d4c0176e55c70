"""Registries: the names that a config's ``type`` may have, and building objects from configs.

:mod:`fusedopt.training` lists the modules that fill them.
"""

from .building import accepted_arguments, build_optimizer, build_scheduler, check_config
from .registry import MMENGINE_SCOPE, Registry, is_known_scope, scope_by_default

__all__ = [
    "DATASETS",
    "DATA_SAMPLERS",
    "EVALUATOR",
    "FUNCTIONS",
    "HOOKS",
    "LOOPS",
    "METRICS",
    "MMENGINE_SCOPE",
    "MODELS",
    "MODEL_WRAPPERS",
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "PARAM_SCHEDULERS",
    "VISBACKENDS",
    "VISUALIZERS",
    "Registry",
    "accepted_arguments",
    "check_config",
    "is_known_scope",
    "scope_by_default",
]

OPTIMIZERS = Registry("optimizer", build_func=build_optimizer)
OPTIM_WRAPPERS = Registry("optimizer wrapper")
OPTIM_WRAPPER_CONSTRUCTORS = Registry("optimizer wrapper constructor")
PARAM_SCHEDULERS = Registry("parameter scheduler", build_func=build_scheduler)
HOOKS = Registry("hook")
MODELS = Registry("model")
MODEL_WRAPPERS = Registry("model wrapper")
DATASETS = Registry("dataset")
DATA_SAMPLERS = Registry("data sampler")
#: Functions that a config names, such as ``collate_fn``.
FUNCTIONS = Registry("function")
METRICS = Registry("metric")
EVALUATOR = Registry("evaluator")
LOOPS = Registry("loop")
VISUALIZERS = Registry("visualizer")
VISBACKENDS = Registry("visualization backend")
