"""Measures the optimizer step: workloads x recipes x contenders, checked, then timed in turns.

``python -m fusedopt bench`` runs single cases; ``benchmarks/`` in the source tree runs the whole suite.
"""

from __future__ import annotations

from .cases import DTYPES, OPTIMIZERS, RECIPES, Case
from .contenders import CONTENDERS, Contender
from .run import Result, run
from .workloads import GROUPINGS, WORKLOADS

__all__ = [
    "CONTENDERS",
    "DTYPES",
    "GROUPINGS",
    "OPTIMIZERS",
    "RECIPES",
    "WORKLOADS",
    "Case",
    "Contender",
    "Result",
    "run",
]
