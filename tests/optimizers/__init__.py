"""What the tests know of each rule: a file of the rule's name, which is written from its paper and not from the code.

A file has

- ``OPTIONS``: every setting that takes a path of its own, by names that begin with that of the rule or the optimizer.
- ``SHORT``: the names of those that stand for the rule in tests that do not take all of them.
- ``MATTERS``: settings in which each hyperparameter matters, and other values, one at a time: at least one for each
  hyperparameter, and for each number of a tuple. All are sums of a few powers of two, which each dtype holds exactly.
- ``formula(group, p, g, state, t)``: step number ``t`` in float64, of parameter, gradient and state.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusedopt.optimizers import FusedOptimizer
from fusedopt.rules import RULES


@dataclasses.dataclass
class Value:
    """An exact result and the magnitude of the terms it was added up from."""

    exact: np.ndarray
    magnitude: np.ndarray


class Tested(NamedTuple):
    """What the file of a rule has."""

    options: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]]
    short: tuple[str, ...]
    matters: tuple[dict[str, Any], list[tuple[str, Any]]]
    formula: Callable[..., dict[str, Value]]


def _tested(rule: str) -> Tested:
    file = importlib.import_module(f"{__name__}.{rule}")
    return Tested(file.OPTIONS, file.SHORT, file.MATTERS, file.formula)


#: By rule.
TESTED = {rule: _tested(rule) for rule in RULES}
