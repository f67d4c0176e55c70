"""A compact training engine: configs, hooks and a Runner, with MMEngine's names."""

from ..config import Config, ConfigDict, ConfigError, parse_options
from .checkpoint import CheckpointError
from .data import DefaultSampler, InfiniteSampler, build_dataloader, pseudo_collate
from .data_sets import ClassBalancedDataset, ConcatDataset, RepeatDataset
from .evaluator import BaseMetric, Evaluator, MultiDatasetsEvaluator
from .hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    EarlyStoppingHook,
    EMAHook,
    EmptyCacheHook,
    Hook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
    Priority,
    ProfilerHook,
    RuntimeInfoHook,
    SegVisualizationHook,
    SyncBuffersHook,
    VisualizationHook,
)
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, TrainLoop, ValLoop
from .message_hub import MessageHub
from .model import BaseDataPreprocessor, BaseModel, MMDistributedDataParallel, MMSeparateDistributedDataParallel
from .runner import Runner
from .visualizer import BaseVisBackend, LocalVisBackend, TensorboardVisBackend, Visualizer

__all__ = [
    "BaseDataPreprocessor",
    "BaseMetric",
    "BaseModel",
    "BaseVisBackend",
    "CheckpointError",
    "CheckpointHook",
    "ClassBalancedDataset",
    "ConcatDataset",
    "Config",
    "ConfigDict",
    "ConfigError",
    "DefaultSampler",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "EmptyCacheHook",
    "EpochBasedTrainLoop",
    "Evaluator",
    "Hook",
    "InfiniteSampler",
    "IterBasedTrainLoop",
    "IterTimerHook",
    "LocalVisBackend",
    "LoggerHook",
    "MMDistributedDataParallel",
    "MMSeparateDistributedDataParallel",
    "MessageHub",
    "MultiDatasetsEvaluator",
    "ParamSchedulerHook",
    "Priority",
    "ProfilerHook",
    "RepeatDataset",
    "Runner",
    "RuntimeInfoHook",
    "SegVisualizationHook",
    "SyncBuffersHook",
    "TensorboardVisBackend",
    "TestLoop",
    "TrainLoop",
    "ValLoop",
    "VisualizationHook",
    "Visualizer",
    "build_dataloader",
    "parse_options",
    "pseudo_collate",
]
