"""Update rules: the maths of each optimizer, its settings and its state, with no kernels and no I/O."""

from .adam import Adam, AdamHyperparameters
from .checks import (
    SUPPORTED_DTYPES,
    check_gradient,
    check_no_model,
    check_number,
    check_parameter,
    check_state_kinds,
    did_you_mean,
    group_names,
    parameter_name,
    parse_dtype,
)
from .clipping import CLIP_EPS, NormClip, ValueClip, clip_coefficient, global_norm, parse_clip_grad
from .counts import HiddenCounts, count_problem, new_count
from .plain import plain, plain_groups, plain_settings
from .rule import Hyperparameters, Rule, StateColumn, compute_dtype
from .sgd import SGD, SGDHyperparameters
from .sharding import refuse_norm_of_shards, refuse_scaling_of_shards, sharded_parameter
from .state import state_problem

#: Every rule by name.
RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD(), Adam())}

__all__ = [
    "CLIP_EPS",
    "RULES",
    "SGD",
    "SUPPORTED_DTYPES",
    "Adam",
    "AdamHyperparameters",
    "HiddenCounts",
    "Hyperparameters",
    "NormClip",
    "Rule",
    "SGDHyperparameters",
    "StateColumn",
    "ValueClip",
    "check_gradient",
    "check_no_model",
    "check_number",
    "check_parameter",
    "check_state_kinds",
    "clip_coefficient",
    "compute_dtype",
    "count_problem",
    "did_you_mean",
    "global_norm",
    "group_names",
    "new_count",
    "parameter_name",
    "parse_clip_grad",
    "parse_dtype",
    "plain",
    "plain_groups",
    "plain_settings",
    "refuse_norm_of_shards",
    "refuse_scaling_of_shards",
    "sharded_parameter",
    "state_problem",
]
