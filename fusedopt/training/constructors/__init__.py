"""Optimizer wrapper constructors: from a model and a config to parameter groups, optimizer and wrapper."""

from .default import DefaultOptimWrapperConstructor
from .layer_decay import LearningRateDecayOptimizerConstructor, LearningRateDecayOptimWrapperConstructor
from .multi import MultiOptimWrapperConstructor

__all__ = [
    "DefaultOptimWrapperConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
    "MultiOptimWrapperConstructor",
]
