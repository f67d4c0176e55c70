"""Registries: names to classes, and configs to objects."""

from __future__ import annotations

import copy

import pytest
import torch

import fusedopt
from fusedopt.registry import (
    DATASETS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    Registry,
    accepted_arguments,
    check_config,
)


@pytest.fixture
def registry() -> Registry:
    return Registry("tool")


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2))]


def test_registers_as_decorator_and_by_call(registry):
    @registry.register_module()
    class Hammer:
        pass

    @registry.register_module(name=["saw", "Saw"])
    def make_saw():
        return "saw"

    class Drill:
        pass

    assert registry.register_module(module=Drill) is Drill
    assert registry.register_module("drill", module=Drill) is Drill
    assert registry.get("Hammer") is Hammer
    assert registry.get("saw") is registry.get("Saw") is make_saw
    assert registry.get("Drill") is registry.get("drill") is Drill
    assert len(registry) == 5 == len(list(registry))
    assert "Hammer" in registry and "hammer" not in registry


def test_a_taken_name_needs_force_and_leaves_the_registry_as_it_was(registry):
    registry.register_module(module=int)
    with pytest.raises(KeyError, match=r"'int' is already in the tool registry as builtins\.int"):
        registry.register_module(name=["float", "int"], module=float)
    assert "float" not in registry
    registry.register_module(name="int", force=True, module=float)
    assert registry.get("int") is float


def test_refuses_what_cannot_be_registered(registry):
    with pytest.raises(TypeError, match=r"name must be a string.*parentheses"):

        @registry.register_module
        class Hammer:
            pass

    with pytest.raises(TypeError, match="holds classes and functions, got 3"):
        registry.register_module(name="three", module=3)


def test_get_falls_back_to_an_import_path(registry):
    assert registry.get("torch.optim.AdamW") is torch.optim.AdamW
    assert registry.get("fusedopt.FusedAdamW") is fusedopt.FusedAdamW
    for missing in ("Hammer", "no_such_package.Hammer", "torch.optim.Hammer", "torch.optim.AdamW.x.y", "a..b", ""):
        assert registry.get(missing) is None


def test_get_does_not_hide_a_module_that_fails_to_import(registry, tmp_path, monkeypatch):
    (tmp_path / "broken_tools.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        registry.get("broken_tools.Hammer")


@pytest.mark.parametrize("kind", ["SGD", "torch.optim.SGD", torch.optim.SGD])
def test_build_takes_a_name_a_path_or_a_class(kind):
    cfg = dict(type=kind, lr=0.3)
    before = copy.deepcopy(cfg)
    optimizer = OPTIMIZERS.build(cfg, parameters(), lr=0.1, momentum=0.9)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 0.3, "the config wins over the caller's default"
    assert optimizer.defaults["momentum"] == 0.9
    assert cfg == before


def test_build_errors_say_what_is_wrong(registry):
    with pytest.raises(KeyError, match=r"'AdmaW' is not in the optimizer registry.*did you mean 'AdamW'\?"):
        OPTIMIZERS.build(dict(type="AdmaW"))
    with pytest.raises(KeyError, match=r"not in the tool registry.*nothing is registered"):
        registry.build(dict(type="Hammer"))
    with pytest.raises(KeyError, match="optimizer config needs the key 'type'"):
        OPTIMIZERS.build(dict(lr=0.1))
    with pytest.raises(TypeError, match="optimizer config must be a dict, got str: 'SGD'"):
        OPTIMIZERS.build("SGD")
    with pytest.raises(TypeError, match="must be a registered name, an import path or a class, got 3"):
        OPTIMIZERS.build(dict(type=3))
    with pytest.raises(TypeError, match=r"torch\.optim\.sgd\.SGD: .*'momentun'; did you mean 'momentum'\?"):
        OPTIMIZERS.build(dict(type="SGD", momentun=0.1), parameters())
    with pytest.raises(TypeError, match=r"fusedopt\.optimizers\.adamw\.FusedAdamW: .*'params'"):
        OPTIMIZERS.build(dict(type="FusedAdamW"))


def test_check_config_tells_a_trailing_comma_apart():
    check_config("optimizer", dict(type="SGD"))
    with pytest.raises(TypeError, match=r"optimizer is a tuple that holds one dict.*trailing comma.*remove the"):
        check_config("optimizer", (dict(type="SGD"),))
    with pytest.raises(TypeError, match="optimizer must be a dict, got tuple"):
        check_config("optimizer", (1, 2))


def test_accepted_arguments_follow_kwargs_to_the_base_class():
    class Base:
        def __init__(self, a, *, b=1):
            pass

    class Child(Base):
        def __init__(self, c, **kwargs):
            super().__init__(**kwargs)

    class Grandchild(Child):
        pass

    class Open:
        def __init__(self, a, **kwargs):
            pass

    assert accepted_arguments(Grandchild) == {"a", "b", "c"}
    assert accepted_arguments(Open) is None
    assert accepted_arguments(lambda x, y=1: x) == {"x", "y"}


def test_optimizers_holds_all_of_torch_and_ours():
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            assert OPTIMIZERS.get(name) is cls
    for name in ("FusedSGD", "FusedAdam", "FusedAdamW"):
        assert OPTIMIZERS.get(name) is getattr(fusedopt, name)
    assert {"SGD", "AdamW", "LBFGS"} < set(OPTIMIZERS)
    assert "Optimizer" not in OPTIMIZERS


def test_wrappers_and_constructors_are_registered():
    assert OPTIM_WRAPPERS.get("OptimWrapper") is fusedopt.OptimWrapper
    assert OPTIM_WRAPPERS.get("AmpOptimWrapper") is fusedopt.AmpOptimWrapper
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get("DefaultOptimWrapperConstructor")
    assert constructor is fusedopt.DefaultOptimWrapperConstructor
    assert len(MODELS) >= 0 and len(DATASETS) >= 0


def test_repr_lists_what_is_registered(registry):
    registry.register_module(module=int)
    assert repr(registry) == "Registry(name='tool', 1 registered)\n  int: builtins.int"
