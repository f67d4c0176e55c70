"""What the kernels take of a rule, from the file of its name; the formulas are those of fusedopt/rules.

A rule's file has two functions:

``constants(group, step, mask)`` serves many parameters at once. It returns the variant of each, and a tuple of up to
ten numbers in float64: all that the update needs. ``hyper`` of :mod:`..memory` reads a hyperparameter by its slot in
csrc/rules.

``update(c, variant, p, g, first, second, third, has_state, has_third)`` takes these constants, in the compute dtype,
and a block of elements: parameter, gradient and three columns of state. It returns the parameter and the three columns;
those that the rule does not have are returned as they came.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, NamedTuple

__all__ = ["RuleKernels", "has_kernels", "kernels_of"]


class RuleKernels(NamedTuple):
    """The two functions of a rule."""

    constants: Any
    update: Any


def has_kernels(rule: str) -> bool:
    """Whether the rule of this name has a file here."""
    return importlib.util.find_spec(f".{rule}", __name__) is not None


@functools.cache
def kernels_of(rule: str) -> RuleKernels:
    """The functions of the rule of this name.

    Raises:
        ModuleNotFoundError: it has no file here.
    """
    module = importlib.import_module(f".{rule}", __name__)
    return RuleKernels(module.constants, module.update)
