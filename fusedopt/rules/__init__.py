"""Update rules: the maths of each optimizer, its settings and its state, with no kernels and no I/O."""

from .adam import Adam, AdamHyperparameters
from .clipping import CLIP_EPS, NormClip, ValueClip, clip_coefficient, norm_of, parse_clip_grad, total_of
from .counts import HiddenCounts, count_problem, new_count
from .precision import CARRIED, PLAIN, Average, Precision, counted_key, keys_of
from .rule import Hyperparameters, Rule, StateColumn, compute_dtype
from .sgd import SGD, SGDHyperparameters
from .state import state_problem

#: Every rule by name.
RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD(), Adam())}

__all__ = [
    "CARRIED",
    "CLIP_EPS",
    "PLAIN",
    "RULES",
    "SGD",
    "Adam",
    "AdamHyperparameters",
    "Average",
    "HiddenCounts",
    "Hyperparameters",
    "NormClip",
    "Precision",
    "Rule",
    "SGDHyperparameters",
    "StateColumn",
    "ValueClip",
    "clip_coefficient",
    "compute_dtype",
    "count_problem",
    "counted_key",
    "keys_of",
    "new_count",
    "norm_of",
    "parse_clip_grad",
    "state_problem",
    "total_of",
]
