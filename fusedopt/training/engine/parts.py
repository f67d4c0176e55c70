"""Builds the parts of a Runner from their configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ...messages import did_you_mean
from ..registry import EVALUATOR, LOOPS, MODEL_WRAPPERS, MODELS, VISUALIZERS, check_config
from ..unwrapping import holders
from .evaluator import Evaluator
from .loops import EpochBasedTrainLoop, IterBasedTrainLoop, TrainLoop
from .visualizer import Visualizer

if TYPE_CHECKING:
    from .runner import Runner

__all__ = [
    "ENVIRONMENT_KEYS",
    "build_evaluator",
    "build_model",
    "build_train_loop",
    "build_visualizer",
    "check_together",
    "section",
    "set_environment",
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
        if known and key not in known:
            raise ValueError(f"{name} has the unknown key {key!r}; {did_you_mean(key, known)}")
    return dict(value)


def set_environment(settings: Mapping[str, Any]) -> tuple[torch.device, str | None]:
    """Apply ``env_cfg``; return the training device and the start method of data workers."""
    if settings.get("cudnn_benchmark"):
        torch.backends.cudnn.benchmark = True
    start_method = section("env_cfg.mp_cfg", settings.get("mp_cfg")).get("mp_start_method")
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


def build_visualizer(visualizer: Visualizer | Mapping[str, Any] | None, save_dir: Path) -> Visualizer:
    """Build the visualizer of a run, or return the given one."""
    if isinstance(visualizer, Visualizer):
        return visualizer
    settings = {"type": "Visualizer", **section("visualizer", visualizer)}
    backends = settings.get("vis_backends")
    if isinstance(backends, str) or not isinstance(backends, Sequence | None):
        raise TypeError(f"vis_backends must be a list of backends and their configs, got {backends!r}")
    return VISUALIZERS.build(settings, save_dir=str(save_dir))


def build_model(
    model: nn.Module | Mapping[str, Any],
    data_preprocessor: Mapping[str, Any] | None,
    wrapper_cfg: Mapping[str, Any] | None,
    device: torch.device,
    distributed: bool,
) -> nn.Module:
    """Build the model on its device, in a wrapper if there are several processes."""
    if not isinstance(model, nn.Module):
        check_config("model", model)
        extra = {} if data_preprocessor is None else {"data_preprocessor": data_preprocessor}
        model = MODELS.build(model, **extra)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or its config, got {type(model).__name__}")
    model = model.to(device)
    if not distributed or any(map(_is_distributed, holders(model))):
        return model
    settings: dict[str, Any] = {"type": "MMDistributedDataParallel", "broadcast_buffers": False}
    if device.type == "cuda":
        settings["device_ids"] = [device.index]
    return MODEL_WRAPPERS.build({**settings, **(wrapper_cfg or {})}, module=model)


def build_evaluator(mode: str, evaluator: Any) -> Any:
    """Build the evaluator of a validation or test: from metrics, or from a config that has ``metrics``."""
    if hasattr(evaluator, "evaluate") and hasattr(evaluator, "metrics"):
        return evaluator
    if isinstance(evaluator, Mapping) and "metrics" in evaluator:
        return EVALUATOR.build({"type": "Evaluator", **evaluator})
    for metric in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        if not hasattr(metric, "process"):
            check_config(f"{mode}_evaluator", metric)
    return Evaluator(evaluator)


def build_train_loop(runner: Runner, cfg: Any, dataloader: DataLoader) -> TrainLoop:
    """Build the loop that ``train_cfg`` describes."""
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
    return isinstance(model, nn.parallel.DistributedDataParallel)
