"""Builds the parts of a Runner from their configs."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...messages import check_flag, check_whole_number, did_you_mean
from ..builder import build_optim_wrapper
from ..registry import EVALUATOR, LOOPS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS, VISUALIZERS, check_config
from ..schedulers import _ParamScheduler
from ..unwrapping import holders, unwrap
from ..wrappers import OptimWrapper, OptimWrapperDict, SkipAwareScheduler
from .evaluator import Evaluator
from .fully_sharded import (
    check_fully_shard,
    fully_shard,
    is_fsdp1,
    is_fully_shard,
    is_fully_sharded,
    refuse_fsdp1,
    refuse_other_shards,
)
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, TrainLoop, ValLoop
from .model import MMSeparateDistributedDataParallel
from .visualizer import Visualizer

if TYPE_CHECKING:
    from .runner import Runner

__all__ = [
    "ENVIRONMENT_KEYS",
    "build_evaluation_loop",
    "build_evaluator",
    "build_model",
    "build_runner_wrapper",
    "build_train_loop",
    "build_visualizer",
    "check_together",
    "is_described",
    "scale_lr",
    "section",
    "set_environment",
    "wrap_model",
]

ENVIRONMENT_KEYS = ("cudnn_benchmark", "device", "dist_cfg", "mp_cfg", "resource_limit")


def check_together(**settings: Any) -> bool:
    """Whether all of ``settings`` are given; ValueError if only some are."""
    missing = [name for name, value in settings.items() if value is None]
    if missing and len(missing) < len(settings):
        raise ValueError(f"{', '.join(settings)} belong together, but {', '.join(missing)} is missing")
    return not missing


def section(name: str, value: Mapping[str, Any] | None, known: Sequence[str] = ()) -> dict[str, Any]:
    """A copy of the dict ``value``, or an empty dict for None; ``known``, if given, are the allowed keys."""
    if value is None:
        return {}
    check_config(name, value)
    for key in value:
        if known and key not in (*known, "_scope_"):
            raise ValueError(f"{name} has the unknown key {key!r}; {did_you_mean(key, known)}")
    return {key: item for key, item in value.items() if not known or key != "_scope_"}


def set_environment(settings: Mapping[str, Any]) -> tuple[torch.device, str | None]:
    """Apply ``env_cfg``; return the training device and the start method of data workers.

    As in MMEngine, ``resource_limit`` raises the number of files that the process may open, and never lowers it.
    """
    if check_flag("env_cfg.cudnn_benchmark", settings.get("cudnn_benchmark") or False):
        torch.backends.cudnn.benchmark = True
    workers = section("env_cfg.mp_cfg", settings.get("mp_cfg"), ("mp_start_method", "opencv_num_threads"))
    methods = multiprocessing.get_all_start_methods()
    start_method = workers.get("mp_start_method")
    if start_method is None and "fork" in methods:  # MMEngine's default, and Python's before 3.14
        start_method = "fork"
    if start_method not in (None, *methods):
        expected = did_you_mean(str(start_method), methods)
        raise ValueError(f"Invalid env_cfg.mp_cfg.mp_start_method: {start_method!r}; {expected}")
    if "opencv_num_threads" in workers:
        with contextlib.suppress(ImportError):
            importlib.import_module("cv2").setNumThreads(workers["opencv_num_threads"])
    if "resource_limit" in settings:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = check_whole_number("env_cfg.resource_limit", settings["resource_limit"], 1)
        if hard != resource.RLIM_INFINITY:
            files = min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, files), hard))
    default = "cpu"
    if torch.cuda.is_available():
        default = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(settings.get("device") or default)
    except RuntimeError as error:
        raise ValueError(f"Invalid env_cfg.device: {settings['device']!r}; {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"Invalid env_cfg.device: {settings['device']!r}; torch finds no usable CUDA device here")
    return device, start_method


def scale_lr(auto_scale_lr: Mapping[str, Any], optim_wrapper: OptimWrapper, schedulers: Any, batch_size: Any) -> float:
    """Multiply every learning rate by ``batch_size / base_batch_size``; return the factor.

    Args:
        auto_scale_lr: has ``base_batch_size``, the batch size for which the learning rates are meant.
        optim_wrapper: the wrapper.
        schedulers: the configs of schedulers.
        batch_size: number of samples of an iteration in all processes; None if the loader does not say.

    Raises:
        ValueError: a number is missing, or a scheduler is built already and keeps the learning rates of before.
    """
    base = auto_scale_lr.get("base_batch_size")
    if base is None or batch_size is None:
        missing = "auto_scale_lr.base_batch_size" if base is None else "train_dataloader.batch_size"
        raise ValueError(f"auto_scale_lr.enable=True needs {missing}, which is not set")
    if any(isinstance(each, _ParamScheduler | SkipAwareScheduler) for each in _leaves(schedulers)):
        raise ValueError("auto_scale_lr.enable=True needs the configs of schedulers, got a scheduler that is built")
    ratio = batch_size / check_whole_number("auto_scale_lr.base_batch_size", base, 1)
    several = isinstance(optim_wrapper, OptimWrapperDict)
    for wrapper in optim_wrapper.values() if several else [optim_wrapper]:  # type: ignore[attr-defined]
        for group in wrapper.param_groups:
            group["lr"] = group["lr"] * ratio
    return ratio


def _leaves(schedulers: Any) -> Iterator[Any]:
    if isinstance(schedulers, Mapping | list | tuple):
        for each in schedulers.values() if isinstance(schedulers, Mapping) else schedulers:
            yield from _leaves(each)
    else:
        yield schedulers


def build_visualizer(visualizer: Visualizer | Mapping[str, Any] | None, save_dir: Path) -> Visualizer:
    """Build the visualizer of a run, or return the given one."""
    if isinstance(visualizer, Visualizer):
        return visualizer
    settings = {"type": "Visualizer", **section("visualizer", visualizer)}
    backends = settings.get("vis_backends")
    if isinstance(backends, str) or not isinstance(backends, Sequence | None):
        raise TypeError(f"vis_backends must be a list of backends and their configs, got {backends!r}")
    return VISUALIZERS.build(settings, save_dir=str(save_dir))


def build_model(model: nn.Module | Mapping[str, Any], data_preprocessor: Mapping[str, Any] | None) -> nn.Module:
    """Build the model, or return the given one."""
    if not isinstance(model, nn.Module):
        check_config("model", model)
        extra = {} if data_preprocessor is None else {"data_preprocessor": data_preprocessor}
        model = MODELS.build(model, **extra)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or its config, got {type(model).__name__}")
    return model


def wrap_model(
    model: nn.Module,
    cfg: Mapping[str, Any] | None,
    device: torch.device,
    distributed: bool,
    find_unused_parameters: bool = False,
    sync_bn: str | None = None,
) -> nn.Module:
    """Move the model to its device and, if there are several processes, wrap it.

    Args:
        model: the model.
        cfg: the config of its wrapper.
        device: the device.
        distributed: whether there are several processes.
        find_unused_parameters: default of this argument of the wrapper.
        sync_bn: ``'torch'`` to replace BatchNorm layers.
    """
    if sync_bn not in (None, "torch"):
        raise ValueError(f"Invalid sync_bn: {sync_bn!r}; expected 'torch' or None (mmcv's layer is not supported)")
    cfg = cfg or {}
    kind = MODEL_WRAPPERS.get(cfg["type"]) if isinstance(cfg.get("type"), str) else cfg.get("type")
    if is_fully_shard(kind):
        check_fully_shard(model, cfg)
    model = model.to(device)
    if distributed and any(map(is_fsdp1, (kind, *map(type, holders(model))))):
        refuse_fsdp1()
    refuse_other_shards(unwrap(model))
    if not distributed or any(map(_is_distributed, holders(model))):
        return model
    if sync_bn is not None:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if is_fully_shard(kind):
        return MODEL_WRAPPERS.build({**cfg, "type": fully_shard}, module=model)
    settings: dict[str, Any] = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
    if find_unused_parameters:
        settings["find_unused_parameters"] = True
    if device.type == "cuda":
        settings["device_ids"] = [device.index]
    return MODEL_WRAPPERS.build({**settings, **cfg}, module=model)


def build_evaluator(name: str, evaluator: Any) -> Any:
    """Build the evaluator of a validation or test: from metrics, or from a config that has ``metrics``."""
    if hasattr(evaluator, "evaluate") and hasattr(evaluator, "metrics"):
        return evaluator
    if isinstance(evaluator, Mapping) and "metrics" in evaluator:
        return EVALUATOR.build({"type": "Evaluator", **evaluator})
    for metric in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        if not hasattr(metric, "process"):
            check_config(name, metric)
    return Evaluator(evaluator)


def is_described(optim_wrapper: Any) -> bool:
    """Whether the optimizer wrapper of a run is described by configs alone, without objects."""
    if isinstance(optim_wrapper, OptimWrapper):
        return False
    parts = optim_wrapper.values() if isinstance(optim_wrapper, Mapping) else ()
    return not any(isinstance(each, OptimWrapper | torch.optim.Optimizer) for each in parts)


def build_runner_wrapper(model: nn.Module, cfg: Any) -> OptimWrapper:
    """The optimizer wrapper of a run.

    Args:
        model: the model.
        cfg: a wrapper; a config, whose ``optimizer`` may be an optimizer; or a dict of wrappers by name.
    """
    if isinstance(cfg, OptimWrapper):
        wrapper = cfg
    elif isinstance(cfg, Mapping) and isinstance(cfg.get("optimizer"), torch.optim.Optimizer):
        wrapper = OPTIM_WRAPPERS.build({"type": "OptimWrapper", **cfg})
    elif isinstance(cfg, Mapping) and cfg and all(isinstance(each, OptimWrapper) for each in cfg.values()):
        wrapper = OptimWrapperDict(**cfg)
    else:
        return build_optim_wrapper(model, cfg)
    _check_it_trains(wrapper, model)
    return wrapper


def _check_it_trains(wrapper: OptimWrapper, model: nn.Module) -> None:
    """Raise ValueError if an optimizer that was given as an object has the parameters of before the sharding."""
    own = set(model.parameters())
    optimizers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    params = [param for each in optimizers for group in each.optimizer.param_groups for param in group["params"]]
    if is_fully_sharded(model) and not own.issuperset(params):
        raise ValueError(
            "the optimizer has parameters that the model no longer has: fully_shard has replaced them, so the "
            "optimizer would train nothing; give the optimizer's config instead of an object"
        )


def build_evaluation_loop(runner: Runner, cfg: Any, mode: str, dataloader: DataLoader, evaluator: Any) -> Any:
    """Build the loop that ``val_cfg`` or ``test_cfg`` describes, or return the given one, now of this runner."""
    default = ValLoop if mode == "val" else TestLoop
    if isinstance(cfg, ValLoop | TestLoop):
        cfg.runner = runner
        return cfg
    check_config(f"{mode}_cfg", cfg)
    return LOOPS.build({"type": default, **cfg}, runner=runner, dataloader=dataloader, evaluator=evaluator)


def build_train_loop(runner: Runner, cfg: Any, dataloader: DataLoader) -> TrainLoop:
    """Build the loop that ``train_cfg`` describes, or return the given one, now of this runner."""
    if isinstance(cfg, TrainLoop):
        cfg.runner = runner
        return cfg
    check_config("train_cfg", cfg)
    settings = dict(cfg)
    if "type" not in settings:
        if not isinstance(settings.get("by_epoch"), bool):
            raise ValueError(f"train_cfg needs by_epoch=True or False, or a type; got {dict(cfg)!r}")
        settings["type"] = EpochBasedTrainLoop if settings.pop("by_epoch") else IterBasedTrainLoop
    elif "by_epoch" in settings:
        raise ValueError("train_cfg has both type and by_epoch; use only one of them")
    loop = LOOPS.build(settings, runner=runner, dataloader=dataloader)
    if not isinstance(loop, TrainLoop):
        raise TypeError(f"the loop of train_cfg must be a TrainLoop, got {type(loop).__name__}")
    if not hasattr(runner.bare_model, "train_step"):
        raise TypeError(f"{type(runner.bare_model).__name__} has no train_step; derive it from BaseModel")
    return loop


def _is_distributed(model: nn.Module) -> bool:
    kinds = nn.parallel.DistributedDataParallel | MMSeparateDistributedDataParallel
    return isinstance(model, kinds) or is_fully_sharded(model)
