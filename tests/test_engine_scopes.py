"""``default_scope`` and ``_scope_``: a package's own registries in every section of a config."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from engine_cases import HitRate, PointNet, Points, Recorder, config, recorded, train
from torch.optim import SGD

from fusedopt import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from fusedopt.training import registry as registries
from fusedopt.training.averaging import ExponentialMovingAverage
from fusedopt.training.constructors import DefaultOptimWrapperConstructor
from fusedopt.training.engine import (
    DefaultSampler,
    EMAHook,
    EpochBasedTrainLoop,
    Hook,
    LocalVisBackend,
    Runner,
    ValLoop,
    Visualizer,
)
from fusedopt.training.engine.validation import check_names
from fusedopt.training.registry import MODELS, Registry
from fusedopt.training.schedulers import LinearLR
from fusedopt.training.schedulers.simulate import simulate_schedule
from fusedopt.training.wrappers import OptimWrapper

PARENTS = [registry for registry in vars(registries).values() if isinstance(registry, Registry)]


@pytest.fixture(autouse=True)
def no_children(monkeypatch):
    for parent in PARENTS:
        monkeypatch.setattr(parent, "children", dict(parent.children))


def put(scope: str, parent: Registry, base: type, name: str = "Mine") -> type:
    """A subclass of ``base``, registered as ``name`` in the registry of ``scope``."""
    found = parent.children.get(scope)
    own = Registry(parent.name, parent=parent, scope=scope) if found is None else found
    return own.register_module(name=name, module=type(f"{name}Of{scope.capitalize()}", (base,), {}))


def optimizer_of(runner: Runner) -> str:
    return type(runner.optim_wrapper.optimizer).__name__


MINE = dict(optimizer=dict(type="Mine", lr=0.1))


def test_an_unscoped_name_is_looked_up_in_the_default_scope_first(tmp_path):
    put("pk", OPTIMIZERS, SGD)
    runner = train(config(tmp_path, default_scope="pk", optim_wrapper=MINE))
    assert optimizer_of(runner) == "MineOfPk"
    with pytest.raises(KeyError, match="'Mine' is not in the optimizer registry"):
        Runner.from_cfg(config(tmp_path, optim_wrapper=MINE))


def test_a_name_of_ours_is_the_packages_own_if_it_has_one(tmp_path):
    put("pk", OPTIMIZERS, SGD, "SGD")
    cfg = config(tmp_path, optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)))
    assert optimizer_of(Runner.from_cfg({**cfg, "default_scope": "pk"})) == "SGDOfPk"
    assert type(Runner.from_cfg(cfg).optim_wrapper.optimizer) is SGD
    cfg["optim_wrapper"]["optimizer"]["type"] = "fusedopt.SGD"
    assert type(Runner.from_cfg({**cfg, "default_scope": "pk"}).optim_wrapper.optimizer) is SGD


def test_every_section(tmp_path):
    put("pk", registries.MODELS, PointNet)
    put("pk", registries.DATASETS, Points)
    put("pk", registries.DATA_SAMPLERS, DefaultSampler)
    put("pk", registries.METRICS, HitRate)
    put("pk", registries.HOOKS, Recorder)
    put("pk", registries.HOOKS, EMAHook, "MineEMA")
    put("pk", registries.MODELS, ExponentialMovingAverage, "MineAverage")
    put("pk", registries.VISUALIZERS, Visualizer)
    put("pk", registries.VISBACKENDS, LocalVisBackend)
    put("pk", registries.LOOPS, EpochBasedTrainLoop)
    put("pk", registries.LOOPS, ValLoop, "MineVal")
    put("pk", registries.PARAM_SCHEDULERS, LinearLR)
    put("pk", OPTIMIZERS, SGD)
    put("pk", OPTIM_WRAPPERS, OptimWrapper)
    put("pk", OPTIM_WRAPPER_CONSTRUCTORS, DefaultOptimWrapperConstructor)
    stacked = []

    def collate(samples):
        stacked.append(len(samples))
        return torch.utils.data.default_collate(samples)

    Registry("function", parent=registries.FUNCTIONS, scope="pk").register_module(name="mine", module=collate)
    data = dict(
        dataset=dict(type="Mine", size=16), sampler=dict(type="Mine"), batch_size=8, collate_fn=dict(type="mine")
    )
    cfg = config(
        tmp_path,
        default_scope="pk",
        model=dict(type="Mine"),
        train_dataloader=data,
        val_dataloader=data,
        train_cfg=dict(type="Mine", max_epochs=2),
        val_cfg=dict(type="MineVal"),
        val_evaluator=[dict(type="Mine")],
        optim_wrapper=dict(type="Mine", constructor="Mine", optimizer=dict(type="Mine", lr=0.1)),
        param_scheduler=dict(type="Mine", end=2),
        custom_hooks=[dict(type="Mine"), dict(type="MineEMA", ema_type="MineAverage")],
        visualizer=dict(type="Mine", vis_backends=[dict(type="Mine")]),
    )
    check_names(cfg)
    runner = Runner.from_cfg(cfg)
    runner.train()
    built = [
        runner.model,
        runner.train_dataloader.dataset,
        runner.train_dataloader.sampler,
        runner.val_loop.evaluator.metrics[0],
        runner.visualizer,
        runner.train_loop,
        runner.optim_wrapper,
        runner.optim_wrapper.optimizer,
        runner.param_schedulers[0],
        runner.hooks[-1],
    ]
    assert {type(each).__name__ for each in built} == {"MineOfPk"}
    assert type(runner.val_loop).__name__ == "MineValOfPk"
    averages = [hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook)]
    assert [type(average).__name__ for average in averages] == ["MineAverageOfPk"]
    assert stacked


def test_scope_inside_wins_over_the_default(tmp_path):
    put("pk", OPTIMIZERS, SGD)
    put("other", OPTIMIZERS, SGD)
    inner = dict(optimizer=dict(type="Mine", lr=0.1, _scope_="other"))
    cfg = config(tmp_path, default_scope="pk", optim_wrapper=inner)
    check_names(cfg)
    assert optimizer_of(Runner.from_cfg(cfg)) == "MineOfOther"
    # The scope of a wrapper's config is not its optimizer's, as in MMEngine.
    put("other", OPTIM_WRAPPERS, OptimWrapper)
    outer = dict(type="Mine", _scope_="other", optimizer=dict(type="Mine", lr=0.1))
    runner = Runner.from_cfg({**cfg, "optim_wrapper": outer})
    assert type(runner.optim_wrapper).__name__ == "MineOfOther"
    assert optimizer_of(runner) == "MineOfPk"


def test_a_scope_below_a_packages_registry(tmp_path):
    put("pk", OPTIMIZERS, SGD, "Base")
    below = Registry("optimizer", parent=OPTIMIZERS.children["pk"], scope="below")
    below.register_module(name="Mine", module=type("MineOfBelow", (SGD,), {}))
    for name in ("Mine", "Base", "below.Mine", "pk.Base"):
        cfg = config(tmp_path, default_scope="below", optim_wrapper=dict(optimizer=dict(type=name, lr=0.1)))
        assert name.rpartition(".")[2] in optimizer_of(Runner.from_cfg(cfg))


def test_what_is_built_in_a_run_is_looked_up_there_too(tmp_path):
    put("pk", registries.MODELS, torch.nn.Identity, "Part")

    class Builds(Hook):
        built = ""

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.built = type(MODELS.build(dict(type="Part"))).__name__

    hook = Builds()
    train(config(tmp_path, default_scope="pk"), hook)
    assert hook.built == "PartOfPk"
    assert "Part" not in MODELS


def test_a_hook_and_a_loader_that_are_added_later(tmp_path):
    put("pk", registries.HOOKS, Recorder)
    put("pk", registries.DATASETS, Points)
    runner = Runner.from_cfg(config(tmp_path, default_scope="pk"))
    runner.register_hook(dict(type="Mine"))
    assert type(recorded(runner)).__name__ == "MineOfPk"
    loader = runner.build_dataloader(dict(dataset=dict(type="Mine", size=3)))
    assert type(loader.dataset).__name__ == "MineOfPk"


def test_two_runners_do_not_disturb_each_other(tmp_path):
    seen = []

    class Sees(Hook):
        def before_train_epoch(self, runner):
            seen.append(type(MODELS.build(dict(type="Part"))).__name__)

    runners = []
    for scope in ("one", "two"):
        put(scope, OPTIMIZERS, SGD)
        put(scope, registries.MODELS, torch.nn.Identity, "Part")
        cfg = config(tmp_path / scope, default_scope=scope, optim_wrapper=MINE, custom_hooks=[Sees()])
        runners.append(
            Runner.from_cfg({**cfg, "train_cfg": dict(by_epoch=True, max_epochs=1), "param_scheduler": None})
        )
    with pytest.raises(KeyError):
        OPTIMIZERS.build(dict(type="Mine"), [torch.ones(1)])
    assert [optimizer_of(runner) for runner in runners] == ["MineOfOne", "MineOfTwo"]
    for runner in runners:
        runner.train()
    assert seen == ["PartOfOne", "PartOfTwo"]


def test_a_constructor_or_run_that_fails_leaves_no_scope(tmp_path):
    put("pk", registries.MODELS, torch.nn.Identity, "Part")

    class Fails(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            raise OSError("no space left")

    with pytest.raises(KeyError):
        Runner.from_cfg(config(tmp_path, default_scope="pk", optim_wrapper=MINE))
    with pytest.raises(OSError, match="no space"):
        train(config(tmp_path, default_scope="pk"), Fails())
    with pytest.raises(KeyError, match="Part"):
        MODELS.build(dict(type="Part"))


def test_the_registry_of_an_imported_package(tmp_path, monkeypatch):
    """As in OpenMMLab's "add your own optimizer": ``registry.py``, modules that fill it, and ``default_scope``."""
    folder = tmp_path / "pk_on_disk"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "registry.py").write_text(
        "from fusedopt.training.registry import OPTIMIZERS as PARENT, Registry\n"
        "OPTIMIZERS = Registry('optimizer', parent=PARENT, locations=['pk_on_disk.optimizers'])\n"
    )
    (folder / "optimizers.py").write_text(
        "from pk_on_disk.registry import OPTIMIZERS\nfrom torch.optim import SGD\n\n"
        "@OPTIMIZERS.register_module()\nclass Mine(SGD):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config(tmp_path / "work", default_scope="pk_on_disk", optim_wrapper=MINE)
    try:
        check_names(cfg)
        assert type(Runner.from_cfg(cfg).optim_wrapper.optimizer).__module__ == "pk_on_disk.optimizers"
    finally:
        for name in [name for name in sys.modules if name.startswith("pk_on_disk")]:
            del sys.modules[name]


def test_a_scope_that_no_registry_has_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="default_scope='nowhere': no registry has this scope; names are looked up"):
        runner = Runner.from_cfg(config(tmp_path, default_scope="nowhere"))
    runner.train()
    with pytest.raises(TypeError, match="default_scope must be a string or None, got 3"):
        Runner.from_cfg(config(tmp_path, default_scope=3))


def test_mmengines_own_scope_is_ours(tmp_path):
    cfg = config(tmp_path, default_scope="mmengine")
    cfg["optim_wrapper"]["optimizer"] = dict(type="mmengine.SGD", lr=0.1)
    cfg["param_scheduler"] = dict(type="LinearLR", _scope_="mmengine")
    check_names(cfg)
    train(cfg)


def test_a_schedule_is_simulated_in_the_default_scope(tmp_path):
    put("pk", registries.PARAM_SCHEDULERS, LinearLR)
    cfg = config(tmp_path, default_scope="pk", param_scheduler=dict(type="Mine", end=2))
    assert [span.scheduler for span in simulate_schedule(cfg, epoch_length=5).spans] == ["MineOfPk"]


@pytest.mark.parametrize("scope", [None, "pk", "below", "mmengine", "nowhere"])
@pytest.mark.parametrize("inner", [None, "pk", "other", "below"])
@pytest.mark.parametrize("name", ["Top", "Mine", "Deep", "pk.Mine", "other.Mine", "below.Deep"])
def test_what_is_found_as_in_mmengine(scope, inner, name):
    """The same tree here and there: a package with a subpackage, and another package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = pytest.importorskip("mmengine.registry", reason="mmengine is not installed")

        def tree(kind, root_scope):
            root = kind("tool", scope=root_scope)
            registries = {scope: kind("tool", parent=root, scope=scope) for scope in ("pk", "other")}
            registries["below"] = kind("tool", parent=registries["pk"], scope="below")
            for where, key in ((root, "Top"), (registries["pk"], "Mine"), (registries["below"], "Deep")):
                where.register_module(name=key, module=lambda key=key: key)
            registries["other"].register_module(name="Mine", module=lambda: "Other")
            return root

        cfg = dict(type=name) if inner is None else dict(type=name, _scope_=inner)
        ours, theirs = tree(Registry, "fusedopt"), tree(stock.Registry, "mmengine")
        found = []
        for root, scoped in (
            (ours, registries.scope_by_default(scope)),
            (theirs, stock.DefaultScope.overwrite_default_scope(scope)),
        ):
            with scoped:
                try:
                    found.append(root.build(dict(cfg)))
                except (KeyError, RuntimeError):
                    found.append(None)
    # A scope is found anywhere in the tree here; MMEngine looks below the registry and directly below the root.
    if found[1] is None and name == "below.Deep":
        assert found[0] == "Deep"
    else:
        assert found[0] == found[1]
