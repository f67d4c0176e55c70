"""Hooks: what happens in a run besides the iterations themselves."""

from .checkpoint import CheckpointHook
from .early_stopping import EarlyStoppingHook
from .ema import EMAHook
from .empty_cache import EmptyCacheHook
from .hook import Hook, Priority, get_priority
from .iter_timer import IterTimerHook
from .logger import LoggerHook
from .param_scheduler import ParamSchedulerHook
from .profiler import ProfilerHook
from .runtime_info import RuntimeInfoHook
from .sampler_seed import DistSamplerSeedHook
from .sync_buffers import SyncBuffersHook
from .visualization import SegVisualizationHook, VisualizationHook

__all__ = [
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "EmptyCacheHook",
    "Hook",
    "IterTimerHook",
    "LoggerHook",
    "ParamSchedulerHook",
    "Priority",
    "ProfilerHook",
    "RuntimeInfoHook",
    "SegVisualizationHook",
    "SyncBuffersHook",
    "VisualizationHook",
    "get_priority",
]
