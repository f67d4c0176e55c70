"""Optimizer wrapper constructors: from a model and a config to parameter groups, optimizer and wrapper."""

from .default import DefaultOptimWrapperConstructor

__all__ = ["DefaultOptimWrapperConstructor"]
