"""MMPretrain's own configs: parameter groups and schedules, built here and by MMEngine, compared.

Run by itself it prints how many configs came out how: ``python tests/mmpretrain_zoo.py``.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fusedopt
from fusedopt.training.schedulers import build_param_schedulers

NEEDED = ("mmengine", "mmcv", "mmpretrain")
FUSED = {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdamW"}
SAME = "the same groups"
SAME_VALUES = "the same values"
REFUSED = "refused by both"


def missing() -> str | None:
    """Why this cannot run, or None."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} not installed; docs/wrappers.md says how"


class _StubTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """torchvision of nothing but names: MMPretrain imports it for data, which no model is built from."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("torchvision") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        class Stub(types.ModuleType):
            def __getattr__(self, name: str) -> type:
                if name.startswith("__"):
                    raise AttributeError(name)
                return type(name, (), {})

        module = Stub(spec.name)
        module.__version__ = "0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def zoo() -> Iterator[list[Path]]:
    """The config files, while MMPretrain can build their models and MMEngine's AMP wrapper asks for no GPU."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _StubTorchvision())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmpretrain
        import mmpretrain.engine
        import mmpretrain.models
        from mmengine.optim.optimizer import amp_optimizer_wrapper, default_constructor
        from mmengine.registry import DefaultScope

        linspace = torch.linspace
        with (
            DefaultScope.overwrite_default_scope("mmpretrain"),
            mock.patch.object(amp_optimizer_wrapper, "is_cuda_available", return_value=True),
            mock.patch.object(amp_optimizer_wrapper, "GradScaler", return_value=torch.amp.GradScaler("cpu")),
            # Some models fetch another one's weights when they are built.
            mock.patch("torch.hub.download_url_to_file", side_effect=OSError("weights are not fetched here")),
            mock.patch.object(default_constructor, "print_log"),  # hundreds of lines per model
            # Models read drop rates from it, which nobody can on the meta device.
            mock.patch("torch.linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"})),
        ):
            root = Path(mmpretrain.__file__).parent / ".mim" / "configs"
            yield sorted(path for path in root.rglob("*.py") if "_base_" not in path.parts)


def _groups(wrapper: Any, names: dict[int, str]) -> list[dict[str, Any]]:
    """What each group has, its parameters by name; without the name that our groups note too."""
    return [
        {"params": [names[id(param)] for param in group["params"]]}
        | {key: value for key, value in group.items() if key not in ("params", "param_name", "foreach", "fused")}
        for group in wrapper.optimizer.param_groups
    ]


def _described(wrapper: Any, names: dict[int, str]) -> tuple[Any, ...]:
    return _groups(wrapper, names), wrapper.get_lr(), wrapper.get_momentum()


def compare(path: Path) -> str:
    """Build the groups of a config in MMEngine and here, with its own type and its fused twin; how that came out."""
    import mmengine.optim
    from mmengine.config import Config
    from mmpretrain.registry import MODELS

    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        return f"the config does not load: {type(error).__name__}"
    if "optim_wrapper" not in cfg:
        return "no optim_wrapper"
    settings = cfg.optim_wrapper.to_dict()
    kind = settings["optimizer"]["type"]
    wrapper = settings.get("type", "OptimWrapper")
    if kind not in FUSED or wrapper not in fusedopt.OPTIM_WRAPPERS.module_dict:
        return f"it has {kind} in {wrapper}"
    try:
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
    except Exception as error:
        return f"the model cannot be built here: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
    names = {id(param): name for name, param in model.named_parameters()}
    theirs = _described(mmengine.optim.build_optim_wrapper(model, Config(dict(w=cfg.optim_wrapper.to_dict())).w), names)
    ours = _described(fusedopt.build_optim_wrapper(model, settings), names)
    if ours != theirs:
        return "other groups"
    model.to_empty(device="cpu")  # memory that is never touched: the fused optimizers refuse the meta device
    names = {id(param): name for name, param in model.named_parameters()}
    settings["optimizer"]["type"] = FUSED[kind]
    fused_groups, rates, momenta = _described(fusedopt.build_optim_wrapper(model, settings), names)
    for mine, expected in zip(fused_groups, theirs[0], strict=True):
        if {key: mine[key] for key in expected if key in mine} != {k: v for k, v in expected.items() if k in mine}:
            return "other groups with the fused optimizer"
    return SAME if (rates, momenta) == theirs[1:] else "other rates with the fused optimizer"


def outcomes() -> dict[str, list[str]]:
    """How the configs came out, with their names."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    with zoo() as paths:
        for path in paths:
            found[compare(path)].append(path.name)
    return found


def schedules() -> dict[str, list[str]]:
    """How the distinct schedules of all configs came out, each with the names of its configs."""
    from mmengine.config import Config

    distinct: dict[str, list[str]] = collections.defaultdict(list)
    parts: dict[str, tuple[Any, dict[str, Any]]] = {}
    with zoo() as paths:
        for path in paths:
            with contextlib.suppress(Exception):  # counted by :func:`outcomes`
                cfg = Config.fromfile(path)
                if "param_scheduler" in cfg and cfg.get("train_cfg"):
                    part = cfg._cfg_dict.to_dict()["param_scheduler"], cfg._cfg_dict.to_dict()["train_cfg"]
                    distinct[repr(part)].append(path.name)
                    parts[repr(part)] = part
        found: dict[str, list[str]] = collections.defaultdict(list)
        for key, names in distinct.items():
            found[compare_schedules(*parts[key])].append(", ".join(names))
    return found


def compare_schedules(param_scheduler: Any, train_cfg: dict[str, Any], epoch_length: int = 5) -> str:
    """Drive a wrapper of three groups by the schedulers of both, and compare all values in every iteration."""
    from mmengine.optim import OptimWrapper as MMEngineWrapper
    from mmengine.registry import PARAM_SCHEDULERS

    epochs = train_cfg.get("max_epochs")
    iters = train_cfg["max_iters"] if epochs is None else epochs * epoch_length
    iters = min(iters, 20_000)
    wrappers = []
    for wrapper, optimizer in ((MMEngineWrapper, torch.optim.AdamW), (fusedopt.OptimWrapper, fusedopt.FusedAdamW)):
        groups = [dict(params=[torch.zeros(1, requires_grad=True)], lr=lr) for lr in (1e-3, 7e-4, 1e-5)]
        wrappers.append(wrapper(optimizer(groups, lr=1e-3, weight_decay=0.05)))
    configs = param_scheduler if isinstance(param_scheduler, list) else [param_scheduler]
    try:
        theirs = [
            PARAM_SCHEDULERS.build(
                {"end": epochs if cfg.get("by_epoch", True) else iters, **cfg},
                default_args=dict(optimizer=wrappers[0], epoch_length=epoch_length),
            )
            for cfg in configs
        ]
    except ValueError:
        with contextlib.suppress(ValueError):
            build_param_schedulers(param_scheduler, wrappers[1], epoch_length, epochs, iters)
            return "refused by MMEngine only"
        return REFUSED
    ours = build_param_schedulers(param_scheduler, wrappers[1], epoch_length, epochs, iters)
    for iteration in range(1, iters + 1):
        for wrapper in wrappers:
            wrapper.step()
        for scheduler in (*theirs, *ours):
            if not scheduler.by_epoch or iteration % epoch_length == 0:
                scheduler.step()
        for mine, expected in zip(wrappers[1].param_groups, wrappers[0].param_groups, strict=True):
            for key in ("lr", "weight_decay", "momentum"):
                if not math.isclose(mine.get(key, 0), expected.get(key, 0), rel_tol=1e-12):
                    return f"another {key}"
    return SAME_VALUES


if __name__ == "__main__":
    for outcome, names in schedules().items():
        print(f"{len(names):4d}  schedules: {outcome}" + (f"  ({names[:4]})" if outcome != SAME_VALUES else ""))
    for outcome, names in sorted(outcomes().items(), key=lambda item: -len(item[1])):
        print(f"{len(names):4d}  {outcome}" + (f"  ({', '.join(names[:4])})" if outcome != SAME else ""))
