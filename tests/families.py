"""The configs of OpenMMLab's packages: whether they load, and their parameter groups and schedules against MMEngine's.

Run by itself it prints how many configs came out how: ``python tests/families.py [FAMILY ...]``; see also
``family_runners.py``.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import io
import logging
import math
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch

import fusedopt
from fusedopt.training.config import Config
from fusedopt.training.registry import OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS
from fusedopt.training.schedulers import build_param_schedulers

#: The package of each family.
FAMILIES = {"MMPretrain": "mmpretrain", "MMSegmentation": "mmseg", "MMDetection": "mmdet", "MMagic": "mmagic"}
FUSED = {"SGD": "FusedSGD", "Adam": "FusedAdam", "AdamW": "FusedAdamW"}
SAME = "the same"
REFUSED = "refused by both"
#: The parts of a package that fill its registries.
_PARTS = ("datasets", "engine", "evaluation", "models", "visualization")
#: What these packages import but building from a config does not need.
_STUBS = (
    "albumentations",
    "av",
    "controlnet_aux",
    "diffusers",
    "face_alignment",
    "facexlib",
    "huggingface_hub",
    "imageio",
    "lpips",
    "mmcv._ext",
    "pandas",
    "resize_right",
    "skimage",
    "torchvision",
    "transformers",
    "xformers",
)


def missing(family: str) -> str | None:
    """Why a family's configs cannot be looked at, or None."""
    absent = [name for name in ("mmengine", "mmcv", FAMILIES[family]) if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed; docs/engine.md says how" if absent else None


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    pass


def _first(self: Any, *args: Any, **kwargs: Any) -> Any:  # as a decorator with arguments
    return args[0] if args else None


class _Name(abc.ABCMeta):
    """A class of nothing but classes."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {"__init__": _nothing, "__call__": _first})

    def __subclasscheck__(cls, other: type) -> bool:
        return isinstance(other, _Name)


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of nothing but names, for those that are missing; no parameter comes from them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(f"{name}.".startswith(f"{stub}.") for stub in _STUBS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        class Stub(types.ModuleType):
            def __getattr__(self, name: str) -> type:
                if name.startswith("__"):
                    raise AttributeError(name)
                return _Name(name, (), {"__init__": _nothing, "__call__": _first})

        module = Stub(spec.name)
        module.__version__ = "0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextlib.contextmanager
def _stubs() -> Iterator[None]:
    """While it holds, what is missing can be imported."""
    finder = _Stubs()
    sys.meta_path.append(finder)  # behind the real ones
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if getattr(module, "__loader__", None) is finder]:
            del sys.modules[name]


@functools.cache
def import_families() -> list[str]:
    """Import all of each installed package, which fills MMEngine's registries; their names."""
    installed = [package for family, package in FAMILIES.items() if missing(family) is None]
    # MMagic 1.2.0 reads a name that NumPy 2 has not.
    with _stubs(), mock.patch.object(numpy, "bool8", numpy.bool_, create=True):
        if "mmpretrain" in installed:
            dependency = importlib.import_module("mmpretrain.utils.dependency")
            dependency.WITH_MULTIMODAL = True  # else it registers less
        for package in installed:
            for part in _PARTS:
                importlib.import_module(f"{package}.{part}")
    return installed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While it holds, packages can build their models without a GPU and without fetching anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_families()
        from mmengine.optim.optimizer import amp_optimizer_wrapper

        linspace = torch.linspace
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        with (
            _stubs(),
            contextlib.redirect_stdout(io.StringIO()),  # hundreds of lines per model
            mock.patch.object(amp_optimizer_wrapper, "is_cuda_available", return_value=True),
            mock.patch.object(amp_optimizer_wrapper, "GradScaler", return_value=torch.amp.GradScaler("cpu")),
            # Some models fetch another one's weights when they are built.
            mock.patch("torch.hub.download_url_to_file", side_effect=OSError("weights are not fetched here")),
            # Models read drop rates from it, which nobody can on the meta device.
            mock.patch("torch.linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"})),
        ):
            try:
                yield
            finally:
                logging.disable(before)


def config_files(family: str) -> list[Path]:
    """The configs in a family's wheel, without those that others inherit and without scripts."""
    spec = importlib.util.find_spec(FAMILIES[family])
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / ".mim" / "configs"
    found = sorted(path for path in root.rglob("*.py") if "_base_" not in path.parts)
    return [path for path in found if "import argparse" not in path.read_text()]


@dataclasses.dataclass
class Loaded:
    """A config file, its config in MMEngine, the same in plain values, and how it loaded here."""

    path: Path
    theirs: Any
    plain: dict[str, Any]
    here: str
    package: str

    @property
    def scope(self) -> str:
        """The package in which MMEngine looks names up."""
        return self.plain.get("default_scope") or self.package


def load(path: Path, package: str) -> Loaded | str:
    """Load a config file, or say why MMEngine cannot."""
    from mmengine.config import Config as MMEngineConfig

    try:
        theirs = MMEngineConfig.fromfile(path)
        values = theirs._cfg_dict.to_dict()
    except Exception as error:
        return f"MMEngine does not load it: {_first_line(error)}"
    text = path.read_text()
    if "read_base()" in text:
        return Loaded(path, theirs, named(values), "MMEngine's read_base", package)
    try:
        here = Config.fromfile(path)
    except Exception as error:
        here = "a base outside the package" if "::" in str(error) else _first_line(error)
        return Loaded(path, theirs, named(values), here, package)
    return Loaded(path, theirs, named(values), SAME if _equal(here, _public(values)) else "other values", package)


def _public(values: dict[str, Any]) -> dict[str, Any]:
    """What MMEngine reads, without what is no setting here: private names, modules and functions, ``_delete_``."""
    no_settings = types.ModuleType | types.FunctionType
    return {
        key: {each: value[each] for each in value if each != "_delete_"} if isinstance(value, dict) else value
        for key, value in values.items()
        if not key.startswith("_") and not isinstance(value, no_settings)
    }


def _equal(mine: Any, expected: Any) -> bool:
    if isinstance(mine, Mapping) and isinstance(expected, Mapping):
        return mine.keys() == expected.keys() and all(_equal(mine[key], expected[key]) for key in mine)
    if isinstance(mine, list | tuple) and isinstance(expected, list | tuple):
        return len(mine) == len(expected) and all(map(_equal, mine, expected))
    return bool(mine == expected) or repr(mine) == repr(expected)


def named(value: Any) -> Any:
    """``value`` with the names of registered classes and functions in their place, as in configs without imports."""
    if isinstance(value, Mapping):
        return {key: named(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(named, value))
    return _names().get(value, value) if inspect.isclass(value) or inspect.isfunction(value) else value


@functools.cache
def _names() -> dict[Any, str]:
    """The name of each class and function in MMEngine's registries: its own without a scope."""
    import mmengine.registry

    found: dict[Any, str] = {}
    roots = [each for each in vars(mmengine.registry).values() if isinstance(each, mmengine.registry.Registry)]
    for root in roots:
        for registry, scope in ((root, ""), *((child, f"{name}.") for name, child in root._children.items())):
            registry.import_from_location()
            for name, target in registry.module_dict.items():
                found.setdefault(target, f"{scope}{name}")
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _wrappers(built: Any) -> dict[str, Any]:
    """The wrappers by name; of a single one, under the empty name."""
    return dict(built.items()) if hasattr(built, "optim_wrappers") else {"": built}


def _described(built: Any, names: dict[int, str]) -> dict[str, Any]:
    """What each group has, its parameters by name; without the name that our groups note too."""
    return {
        name: [
            {"params": [names[id(param)] for param in group["params"]]}
            | {key: value for key, value in group.items() if key not in ("params", "param_name", "foreach", "fused")}
            for group in wrapper.optimizer.param_groups
        ]
        for name, wrapper in _wrappers(built).items()
    }


def _optimizers(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The optimizer of a wrapper, or those of several."""
    parts = [settings, *(each for each in settings.values() if isinstance(each, Mapping))]
    return [part["optimizer"] for part in parts if isinstance(part.get("optimizer"), dict)]


def compare_groups(loaded: Loaded) -> str:
    """Build the groups of a config in MMEngine and here, with its own type and its fused twin; how that came out."""
    import mmengine.optim
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, OPTIMIZERS, DefaultScope

    if loaded.plain.get("optim_wrapper") is None:
        return "no optim_wrapper"
    settings = copy.deepcopy(loaded.plain["optim_wrapper"])
    constructor = settings.get("constructor", "DefaultOptimWrapperConstructor")
    if constructor not in OPTIM_WRAPPER_CONSTRUCTORS:
        return f"its own constructor {constructor}"
    with DefaultScope.overwrite_default_scope(loaded.scope):
        try:
            with torch.device("meta"):
                model = MODELS.build(loaded.theirs.model)
        except Exception as error:
            return f"the model cannot be built here: {_first_line(error)}"
        names = {id(param): name for name, param in model.named_parameters()}
        try:
            theirs = _described(
                mmengine.optim.build_optim_wrapper(model, ConfigDict(**loaded.plain).optim_wrapper), names
            )
        except Exception as error:
            return f"MMEngine refuses it: {_first_line(error)}"
        optimizers = _optimizers(settings)
        kinds = [optimizer["type"] for optimizer in optimizers]
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            for optimizer, kind in zip(optimizers, kinds, strict=True):
                if kind not in fusedopt.OPTIMIZERS:
                    optimizer["type"] = registry.get(kind)  # a package's own
    try:
        if not _equal(_described(fusedopt.build_optim_wrapper(model, settings), names), theirs):
            return "other groups"
        if not set(kinds) <= set(FUSED):
            return SAME
        model.to_empty(device="cpu")  # memory that is never touched: the fused optimizers refuse the meta device
        names = {id(param): name for name, param in model.named_parameters()}
        for optimizer, kind in zip(optimizers, kinds, strict=True):
            optimizer["type"] = FUSED[kind]
        fused = _described(fusedopt.build_optim_wrapper(model, settings), names)
    except Exception as error:
        return f"refused here: {_first_line(error)}"
    for name, groups in fused.items():
        for mine, expected in zip(groups, theirs[name], strict=True):
            if not all(_equal(mine[key], expected[key]) for key in expected if key in mine):
                return "other groups with the fused optimizer"
    return SAME


def schedules_of(loaded: Loaded) -> list[tuple[Any, dict[str, Any]]]:
    """The schedules of a config, each with its ``train_cfg``: one, or one for each optimizer."""
    cfg, train_cfg = loaded.plain.get("param_scheduler"), loaded.plain.get("train_cfg")
    if not cfg or not train_cfg:
        return []
    if isinstance(cfg, Mapping) and "type" not in cfg:
        return [(each, train_cfg) for each in cfg.values() if each]
    return [(cfg, train_cfg)]


def compare_schedules(param_scheduler: Any, train_cfg: dict[str, Any], scope: str | None, longest: int = 20_000) -> str:
    """Drive a wrapper of three groups by the schedulers of both, and compare all values in every iteration.

    Args:
        param_scheduler: the schedulers.
        train_cfg: of the same config.
        scope: the package in which MMEngine looks names up.
        longest: number of iterations after which it ends; an epoch has five.
    """
    from mmengine.optim import OptimWrapper as MMEngineWrapper
    from mmengine.registry import PARAM_SCHEDULERS as THEIRS
    from mmengine.registry import DefaultScope

    epoch_length = 5
    epochs = train_cfg.get("max_epochs")
    iters = train_cfg["max_iters"] if epochs is None else epochs * epoch_length
    wrappers = []
    for wrapper, optimizer in ((MMEngineWrapper, torch.optim.AdamW), (fusedopt.OptimWrapper, fusedopt.FusedAdamW)):
        groups = [dict(params=[torch.zeros(1, requires_grad=True)], lr=lr) for lr in (1e-3, 7e-4, 1e-5)]
        wrappers.append(wrapper(optimizer(groups, lr=1e-3, weight_decay=0.05)))
    configs = param_scheduler if isinstance(param_scheduler, list) else [param_scheduler]
    own = [cfg["type"] for cfg in configs if cfg["type"] not in PARAM_SCHEDULERS]
    if own:
        return f"its own scheduler {own[0]}"
    try:
        with DefaultScope.overwrite_default_scope(scope):
            theirs = [
                THEIRS.build(
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
    try:
        ours = build_param_schedulers(param_scheduler, wrappers[1], epoch_length, epochs, iters)
    except Exception as error:
        return f"refused here: {_first_line(error)}"
    for iteration in range(1, min(iters, longest) + 1):
        for wrapper in wrappers:
            wrapper.step()
        for scheduler in (*theirs, *ours):
            if not scheduler.by_epoch or iteration % epoch_length == 0:
                scheduler.step()
        for mine, expected in zip(wrappers[1].param_groups, wrappers[0].param_groups, strict=True):
            for key in ("lr", "weight_decay", "momentum"):
                if not math.isclose(mine.get(key, 0), expected.get(key, 0), rel_tol=1e-12):
                    return f"another {key}"
    return SAME


@functools.cache
def loads(family: str) -> list[Loaded | str]:
    """All configs of a family, or why MMEngine cannot load them."""
    with quiet():
        return [load(path, FAMILIES[family]) for path in config_files(family)]


def outcomes(family: str) -> dict[str, dict[str, list[str]]]:
    """The names of a family's configs by how they came out: loading, groups, schedules."""
    found: dict[str, dict[str, list[str]]] = {
        kind: collections.defaultdict(list) for kind in ("loaded", "groups", "schedules")
    }
    distinct: dict[str, str] = {}
    with quiet():
        for path, loaded in zip(config_files(family), loads(family), strict=True):
            if isinstance(loaded, str):
                found["loaded"][loaded].append(path.name)
                continue
            found["loaded"][loaded.here].append(path.name)
            for part in schedules_of(loaded):
                key = repr(part)
                if key not in distinct:
                    distinct[key] = compare_schedules(*part, loaded.scope)
                    found["schedules"][distinct[key]].append(path.name)
            found["groups"][compare_groups(loaded)].append(path.name)
    return found


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        print(f"{family}: {len(config_files(family))} configs")
        for kind, results in outcomes(family).items():
            for outcome, names in sorted(results.items(), key=lambda item: -len(item[1])):
                print(
                    f"{len(names):6d}  {kind}: {outcome}" + (f"  ({', '.join(names[:3])})" if outcome != SAME else "")
                )
