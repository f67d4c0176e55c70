"""Optimizer wrapper constructors: they build parameter groups, optimizer and wrapper from a model and a config."""

from .default import DefaultOptimWrapperConstructor
from .layer_decay import (
    LayerDecayOptimizerConstructor,
    LearningRateDecayOptimizerConstructor,
    LearningRateDecayOptimWrapperConstructor,
)
from .multi import MultiOptimWrapperConstructor

__all__ = [
    "DefaultOptimWrapperConstructor",
    "LayerDecayOptimizerConstructor",
    "LearningRateDecayOptimWrapperConstructor",
    "LearningRateDecayOptimizerConstructor",
    "MultiOptimWrapperConstructor",
]
