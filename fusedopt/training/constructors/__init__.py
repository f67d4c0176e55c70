"""Optimizer wrapper constructors: they build parameter groups, optimizer and wrapper from a model and a config."""

from .default import DefaultOptimWrapperConstructor
from .layer_decay import LearningRateDecayOptimizerConstructor, LearningRateDecayOptimWrapperConstructor
from .multi import MultiOptimWrapperConstructor

__all__ = [
    "DefaultOptimWrapperConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
    "MultiOptimWrapperConstructor",
]
