"""The training layer: MMEngine's interface for any torch optimizer.

Registries, optimizer wrappers and their constructors, schedulers, averaged models, configs and the Runner.
"""

from . import optimizers as _optimizers  # noqa: F401  registers them
from .registry import (
    DATA_SAMPLERS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    MODEL_WRAPPERS,
    MODELS,
    PARAM_SCHEDULERS,
    VISBACKENDS,
    VISUALIZERS,
)

# Imported when a name is first looked up: most users of an optimizer wrapper need none of them.
PARAM_SCHEDULERS.add_locations("fusedopt.training.schedulers")
for _name in ("StochasticWeightAverage", "ExponentialMovingAverage", "MomentumAnnealingEMA"):
    MODELS.register_lazily(_name, f"fusedopt.training.averaging.{_name}")
for _registry in (DATA_SAMPLERS, EVALUATOR, FUNCTIONS, HOOKS, LOOPS, MODEL_WRAPPERS, VISBACKENDS, VISUALIZERS):
    _registry.add_locations("fusedopt.training.engine")
