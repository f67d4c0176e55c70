"""The configs of OpenMMLab's packages in our Runner, with stand-ins for what only the packages have.

Run by itself it prints how many Runners were built: ``python tests/family_runners.py [FAMILY ...]``.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
import re
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from families import FAMILIES, Loaded, config_files, import_families, loads, quiet
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fusedopt.training import registry as registries
from fusedopt.training.averaging import ExponentialMovingAverage
from fusedopt.training.config import Config
from fusedopt.training.engine import BaseMetric, BaseModel, Hook, Runner, ValLoop, Visualizer
from fusedopt.training.registry import Registry

BUILT = "built"


class Layer(nn.Linear):
    def get_layer_depth(self, name: str, prefix: str = "") -> tuple[int, int]:
        return 0, 2


class Model(BaseModel):
    """A layer for each part of the config, and for each part that has an optimizer."""

    optimized: ClassVar[set[str]] = set()

    def __init__(self, data_preprocessor: Any = None, **parts: Any):
        # Some models know the type of theirs.
        typed = not isinstance(data_preprocessor, Mapping) or "type" in data_preprocessor
        super().__init__(data_preprocessor if typed else None)
        parts.pop("type", None)
        named = {name for name, part in parts.items() if isinstance(part, Mapping) and not hasattr(self, name)}
        for name in ["backbone", *sorted(named)]:
            setattr(self, name, Layer(2, 2))
        for name in self.optimized:
            leaf = re.findall(r"\w+", name)[-1]
            setattr(self if leaf == name else self.backbone, leaf, Layer(2, 2))

    get_layer_depth = Layer.get_layer_depth

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        raise NotImplementedError


class Average(ExponentialMovingAverage):
    def __init__(self, model: nn.Module, momentum: float = 0.1, interval: int = 1, **settings: Any):
        super().__init__(model, momentum, interval)


class Data(Dataset[Any]):
    """Samples that nobody loads."""

    metainfo: ClassVar = dict(classes=("first", "second"))

    def __init__(self, **settings: Any):
        pass

    def __len__(self) -> int:
        return 20_000

    def full_init(self) -> None:
        pass

    def get_cat_ids(self, index: int) -> list[int]:
        return [index % 2]


class Indices(Sampler[Any]):
    """A sampler, or a batch sampler."""

    def __init__(self, dataset: Any = None, sampler: Any = None, batch_size: int = 1, **settings: Any):
        self.sampler, self.batch_size, self.dataset = sampler, batch_size, dataset

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def __len__(self) -> int:
        return 100


class Metric(BaseMetric):
    def __init__(self, **settings: Any):
        super().__init__()

    def process(self, data_batch: Any, data_samples: Any) -> None:
        raise NotImplementedError

    def compute_metrics(self, results: Any) -> Any:
        raise NotImplementedError


class Acting(Hook):
    def __init__(self, **settings: Any):
        pass


class Drawing(Visualizer):
    def __init__(self, vis_backends: Any = None, save_dir: Any = "vis_data", name: str = "", **settings: Any):
        super().__init__(vis_backends, save_dir, name)


class Saving:
    def __init__(self, **settings: Any):
        pass

    def close(self) -> None:
        pass


class Evaluating:
    def __init__(self, metrics: Any, **settings: Any):
        self.metrics = [registries.METRICS.build(each) if isinstance(each, Mapping) else each for each in metrics]

    def evaluate(self, size: int) -> Any:
        raise NotImplementedError


class Loop(ValLoop):
    def __init__(self, runner: Any, dataloader: Any, evaluator: Any, **settings: Any):
        self.runner, self.dataloader, self.evaluator = runner, dataloader, evaluator


class Construct:
    """A constructor whose wrapper has the config's optimizer; MMagic's have configs for several, with other names."""

    def __init__(self, optim_wrapper_cfg: Any, paramwise_cfg: Any = None):
        self.optimizer = optim_wrapper_cfg.get("optimizer", dict(type="SGD", lr=0.1))

    def __call__(self, model: nn.Module) -> Any:
        optimizer = registries.OPTIMIZERS.build(self.optimizer, list(model.parameters()))
        return registries.OPTIM_WRAPPERS.build(dict(type="OptimWrapper"), optimizer=optimizer)


class Optimizer(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0, **settings: Any):
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Schedule(registries.PARAM_SCHEDULERS.get("ConstantLR")):  # type: ignore[misc]
    def __init__(self, optimizer: Any, begin: int = 0, end: int = 10**9, by_epoch: bool = True, **settings: Any):
        super().__init__(optimizer, begin=begin, end=end, by_epoch=by_epoch)


def collated(batch: Any, **settings: Any) -> Any:
    raise NotImplementedError


#: Classes of packages that share nothing but the name with one of ours.
OTHERS = {("mmagic", "VisualizationHook")}
STAND_INS: dict[str, Any] = {
    "MODELS": Model,
    "DATASETS": Data,
    "DATA_SAMPLERS": Indices,
    "METRICS": Metric,
    "HOOKS": Acting,
    "VISUALIZERS": Drawing,
    "VISBACKENDS": Saving,
    "EVALUATOR": Evaluating,
    "LOOPS": Loop,
    "OPTIM_WRAPPER_CONSTRUCTORS": Construct,
    "OPTIMIZERS": Optimizer,
    "PARAM_SCHEDULERS": Schedule,
    "FUNCTIONS": collated,
}


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Registries of ours for each package, with stand-ins for all names that are its own and not MMEngine's or ours."""
    import mmengine.model
    import mmengine.registry

    packages = import_families()
    parents = [each for each in vars(registries).values() if isinstance(each, Registry)]
    children = {id(parent): dict(parent.children) for parent in parents}
    try:
        for kind, stand_in in STAND_INS.items():
            parent, theirs = getattr(registries, kind), getattr(mmengine.registry, kind)
            for package in packages:
                child = Registry(kind, parent=parent, scope=package)
                registered = [*theirs.module_dict.items()]
                registered += theirs.children[package].module_dict.items() if package in theirs.children else []
                for name, target in registered:
                    ours = name in parent and (package, name) not in OTHERS
                    if not ours and target.__module__.partition(".")[0] == package:
                        averages = isinstance(target, type) and issubclass(target, mmengine.model.BaseAveragedModel)
                        child.register_module(name, module=Average if averages else stand_in)
        yield
    finally:
        for parent in parents:
            parent.children = children[id(parent)]


@contextlib.contextmanager
def _settings_of_torch() -> Iterator[None]:
    """Puts back what a config may set for the process."""
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch.use_deterministic_algorithms(deterministic)


def build(loaded: Loaded, work_dir: str) -> str:
    """Build the Runner of a config; how that came out."""
    settings = {**loaded.plain, "default_scope": loaded.scope, "work_dir": work_dir, "launcher": "none"}
    if isinstance(settings.get("model"), dict):
        settings["model"] = {**settings["model"], "type": Model}
    parts = settings.get("optim_wrapper") or {}
    Model.optimized = {name for name, part in parts.items() if isinstance(part, Mapping) and "optimizer" in part}
    Model.optimized |= {parts["modules"]} if "modules" in parts else set()
    try:
        with _settings_of_torch():
            Runner.from_cfg(Config(settings))
    except Exception as error:
        reason = f"{type(error.__cause__ or error).__name__}: {str(error)[:300]}"
        theirs = refusal_of_mmengine(loaded, work_dir)
        return f"refused by both: {theirs}" if theirs else f"refused here: {reason}"
    return BUILT


def refusal_of_mmengine(loaded: Loaded, work_dir: str) -> str | None:
    """Why MMEngine's Runner cannot be built either, or None; the model and the data are stand-ins there, too."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import METRICS, DefaultScope
    from mmengine.runner import Runner as MMEngineRunner

    settings = {**loaded.plain, "default_scope": loaded.scope, "work_dir": work_dir, "launcher": "none"}
    try:
        settings["model"]
        known = set(inspect.signature(MMEngineRunner).parameters)
        given = {key: value for key, value in settings.items() if key in known}
        name = uuid.uuid4().hex  # scopes and visualizers are kept by name
        given |= {"model": nn.Linear(2, 2), "experiment_name": name}
        if "visualizer" in given:
            given["visualizer"] = {**given["visualizer"], "name": name}
        runner = MMEngineRunner(**given, cfg=type(loaded.theirs)(settings))
        if "optim_wrapper" in settings:
            with DefaultScope.overwrite_default_scope(loaded.scope):
                model = Model(**{**settings["model"], "data_preprocessor": None})
                build_optim_wrapper(model, type(loaded.theirs)(settings).optim_wrapper)
        for mode in ("train", "val", "test"):
            cfg, metrics = settings.get(f"{mode}_cfg"), settings.get(f"{mode}_evaluator")
            listed = [
                each for each in (metrics if isinstance(metrics, list) else [metrics]) if isinstance(each, Mapping)
            ]
            with METRICS.switch_scope_and_registry(loaded.scope) as registry:
                unknown = [each["type"] for each in listed if "metrics" not in each and not registry.get(each["type"])]
            if unknown:
                raise KeyError(unknown[0])
            if cfg is not None:
                setattr(runner, f"_{mode}_dataloader", DataLoader(Data()))
                setattr(runner, f"_{mode}_evaluator", [])
                getattr(runner, f"build_{mode}_loop")(cfg)
    except ImportError:  # it would, with that package
        return None
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    return None


def runners(family: str) -> dict[str, list[str]]:
    """The names of the configs that MMEngine loads, by how their Runners came out."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    with quiet(), stand_ins(), tempfile.TemporaryDirectory() as work_dir:
        for path, loaded in zip(config_files(family), loads(family), strict=True):
            if not isinstance(loaded, str):
                found[build(loaded, work_dir)].append(path.name)
    return found


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        print(f"{family}: {len(config_files(family))} configs")
        for outcome, names in sorted(runners(family).items(), key=lambda item: -len(item[1])):
            print(f"{len(names):6d}  {outcome}" + (f"  ({', '.join(names[:3])})" if outcome != BUILT else ""))
