"""Registries: names to classes, and configs to objects."""

from __future__ import annotations

import copy
import importlib
import subprocess
import sys
import warnings

import pytest
import torch

import fusedopt
from fusedopt.training.registry import (
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


@pytest.mark.parametrize("theirs_first", [True, False])
def test_a_replaceable_entry_gives_its_name_to_whoever_registers_it(registry, theirs_first):
    def provide():
        registry.register_module(name="Hook", module=int, replaceable=True)

    if not theirs_first:
        provide()
        assert registry.get("Hook") is int
    registry.register_module(name="Hook", module=float)
    if theirs_first:
        provide()
    assert registry.get("Hook") is float
    with pytest.raises(KeyError, match="'Hook' is already in"):
        registry.register_module(name="Hook", module=str)


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


def test_a_hint_is_given_once(registry):
    """Python 3.14 has one of its own."""

    def tool(weight: float = 1.0) -> None:
        raise TypeError("tool() got an unexpected keyword argument 'wieght'. Did you mean 'weight'?")

    with pytest.raises(TypeError, match=r"tool: .*got an .* 'wieght'; did you mean 'weight'\?$"):
        registry.build(dict(type=tool, wieght=2.0))


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
    assert repr(registry) == "Registry(name='tool', scope='test_registry', 1 registered)\n  int: builtins.int"


class TestTree:
    """Registries of several packages: names go up to the parents, scopes down to the children."""

    @pytest.fixture
    def tree(self):
        root = Registry("tool", scope="root")
        left = Registry("tool", parent=root, scope="left")
        right = Registry("tool", parent=root, scope="right")
        leaf = Registry("tool", parent=left, scope="leaf")
        root.register_module(name="Hammer", module=int)
        left.register_module(name="Saw", module=float)
        right.register_module(name="Saw", module=str)
        leaf.register_module(name="Drill", module=list)
        return root, left, right, leaf

    def test_a_name_is_looked_for_in_the_parents(self, tree):
        root, left, right, leaf = tree
        assert leaf.get("Drill") is list and leaf.get("Saw") is float and leaf.get("Hammer") is int
        assert right.get("Saw") is str
        assert root.get("Saw") is None and left.get("Drill") is None
        assert "Hammer" in leaf and "Drill" not in root

    def test_a_scope_is_looked_for_in_the_whole_tree(self, tree):
        root, left, right, leaf = tree
        assert root.get("left.Saw") is left.get("left.Saw") is right.get("left.Saw") is leaf.get("left.Saw") is float
        assert root.get("leaf.Drill") is right.get("leaf.Drill") is list
        assert root.get("right.Saw") is str
        assert left.get("right.Hammer") is int, "from the child of that scope a name goes up too"
        assert root.get("left.Hammer") is int
        assert left.get("left.Hammer") is None, "but its own scope means this registry alone"
        assert root.get("middle.Saw") is None

    def test_its_parts(self, tree):
        root, left, right, leaf = tree
        assert root.children == {"left": left, "right": right} and left.parent is root and leaf.root is root
        assert left.module_dict == {"Saw": float}
        assert (
            len(left) == 1 and repr(left) == "Registry(name='tool', scope='left', 1 registered)\n  Saw: builtins.float"
        )

    def test_the_scope_is_the_package_by_default(self):
        assert Registry("tool").scope == "test_registry"
        assert OPTIMIZERS.scope == MODELS.scope == "fusedopt"

    def test_wrong_arguments(self, tree):
        root, *_ = tree
        with pytest.raises(ValueError, match="the tool registry has a child of scope 'left' already"):
            Registry("tool", parent=root, scope="left")
        with pytest.raises(TypeError, match="parent must be a Registry, got str"):
            Registry("tool", parent="root")
        with pytest.raises(TypeError, match=r"scope .* without dots, got 'a\.b'"):
            Registry("tool", scope="a.b")
        with pytest.raises(TypeError, match="locations must be a list of module names, got 'tools'"):
            Registry("tool", locations="tools")
        with pytest.raises(TypeError, match="looked up by a string, got 3"):
            root.get(3)
        with pytest.raises(TypeError, match="force must be True or False, got 1"):
            root.register_module(force=1)

    def test_the_closest_name_may_be_a_parents(self, tree):
        *_, leaf = tree
        with pytest.raises(KeyError, match=r"'Hamer' is not in the tool registry.*did you mean 'Hammer'\?"):
            leaf.build(dict(type="Hamer"))

    def test_scope_switches_for_the_build_and_what_is_built_within(self, tree):
        root, left, right, _ = tree

        @left.register_module()
        @right.register_module()
        def chest(inner):
            return [root.build(inner)]

        assert root.build(dict(type="chest", inner=dict(type="Saw"), _scope_="left")) == [0.0]
        assert root.build(dict(type="chest", inner=dict(type="Saw"), _scope_="right")) == [""]
        assert root.build(dict(type="left.chest", inner=dict(type="Hammer"))) == [0]
        nested = dict(type="chest", inner=dict(type="Saw", _scope_="right"), _scope_="left")
        assert root.build(nested) == [""]
        with pytest.raises(KeyError, match="'Saw' is not in"):
            root.build(dict(type="Saw"))

    def test_switch_scope_and_registry(self, tree):
        root, _, right, leaf = tree
        with root.switch_scope_and_registry(None) as registry:
            assert registry is root
        with root.switch_scope_and_registry("leaf") as registry:
            assert registry is leaf
            with right.switch_scope_and_registry(None) as inherited:
                assert inherited is leaf
            with root.switch_scope_and_registry("right") as inner:
                assert inner is right
        with right.switch_scope_and_registry(None) as registry:
            assert registry is right
        with pytest.warns(UserWarning, match="no tool registry has the scope 'middle'; 'root' is used"):
            assert root.build(dict(type="Hammer", _scope_="middle")) == 0
        with pytest.warns(UserWarning, match="'middle'") as caught, root.switch_scope_and_registry("middle"):
            pass
        assert [warning.filename for warning in caught] == [__file__]

    def test_a_build_function_is_called_with_the_registry_and_inherited(self):
        calls = []

        def build(cfg, *args, registry, **kwargs):
            calls.append((cfg, args, registry, kwargs))

        root = Registry("tool", build_func=build)
        leaf = Registry("tool", parent=root, scope="leaf")
        leaf.build(dict(type="Saw"), 1, sharp=True)
        assert calls == [(dict(type="Saw"), (1,), leaf, dict(sharp=True))]

    def test_default_args_as_in_mmengine(self, registry):
        registry.register_module(name="Saw", module=dict)
        defaults = dict(type="Saw", teeth=3, sharp=True)
        assert registry.build(dict(sharp=False), default_args=defaults) == dict(teeth=3, sharp=False)
        assert defaults == dict(type="Saw", teeth=3, sharp=True)
        with pytest.raises(TypeError, match="default_args must be a dict, got list"):
            registry.build(dict(type="Saw"), default_args=[1])


class TestImports:
    """Modules that are imported when a name is asked for."""

    def test_locations_are_imported_before_a_name_counts_as_unknown(self, tmp_path, monkeypatch):
        (tmp_path / "tool_box.py").write_text("registry.register_module(module=type('Wrench', (), {}))\n")
        monkeypatch.syspath_prepend(tmp_path)
        root = Registry("tool", locations=["tool_box"])
        monkeypatch.setattr("builtins.registry", root, raising=False)
        leaf = Registry("tool", parent=root, scope="leaf")
        assert len(root) == 0, "not before"
        assert leaf.get("Wrench").__name__ == "Wrench"
        assert len(root) == 1 and "Hammer" not in leaf

    def test_a_location_that_is_not_there_is_an_error(self):
        registry = Registry("tool", locations=["no_such_tools"])
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="no_such_tools"):
                registry.get("Wrench")

    def test_a_package_of_ones_own_is_imported_for_its_scope(self, tmp_path, monkeypatch):
        package = tmp_path / "my_package"
        (package / "engine").mkdir(parents=True)
        (package / "__init__.py").write_text("")
        # As in mmpretrain: a registry of the package's own, and modules that fill it.
        (package / "registry.py").write_text(
            "from fusedopt.training.registry import OPTIMIZERS as PARENT, Registry\n"
            "OPTIMIZERS = Registry('optimizer', parent=PARENT, locations=['my_package.engine'])\n"
        )
        (package / "engine" / "__init__.py").write_text("from .my_optimizer import MyOptimizer\n")
        (package / "engine" / "my_optimizer.py").write_text(
            "from my_package.registry import OPTIMIZERS\n"
            "from torch.optim import SGD\n\n"
            "@OPTIMIZERS.register_module()\n"
            "class MyOptimizer(SGD):\n    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(OPTIMIZERS, "children", {})
        optimizer = OPTIMIZERS.build(dict(type="my_package.MyOptimizer", lr=0.1), parameters())
        assert type(optimizer).__name__ == "MyOptimizer"
        scoped = OPTIMIZERS.build(dict(type="MyOptimizer", lr=0.1, _scope_="my_package"), parameters())
        assert type(scoped) is type(optimizer)
        assert "MyOptimizer" not in OPTIMIZERS

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A package that has an SGD of its own, and whose registry imports it when it is needed."""
        folder = tmp_path / "my_pk"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "registry.py").write_text(
            "from fusedopt.training.registry import OPTIMIZERS as PARENT, Registry\n"
            "OPTIMIZERS = Registry('optimizer', parent=PARENT, locations=['my_pk.engine'])\n"
        )
        (folder / "engine.py").write_text(
            "import torch\n"
            "from my_pk.registry import OPTIMIZERS\n\n"
            "@OPTIMIZERS.register_module()\n"
            "class SGD(torch.optim.SGD):\n    pass\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(OPTIMIZERS, "children", {})
        yield folder
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_pk"]:
            del sys.modules[name]

    @pytest.mark.parametrize("before", [None, "Adam", "no_such_name", "my_pk.Adam"])
    def test_a_packages_own_class_wins_whatever_was_asked_before(self, package, before):
        child = importlib.import_module("my_pk.registry").OPTIMIZERS
        if before is not None:
            child.get(before)
        mine = child.get("SGD")
        assert mine.__module__ == "my_pk.engine"
        assert child.get("my_pk.SGD") is OPTIMIZERS.get("my_pk.SGD") is mine
        assert child.get("Adam") is OPTIMIZERS.get("my_pk.Adam") is torch.optim.Adam
        assert OPTIMIZERS.get("SGD") is torch.optim.SGD
        assert type(OPTIMIZERS.build(dict(type="SGD", lr=0.1, _scope_="my_pk"), parameters())) is mine

    def test_a_scope_goes_before_the_import_path(self, package):
        (package / "__init__.py").write_text("SGD = 'not the one that is registered'\n")
        assert OPTIMIZERS.get("my_pk.SGD").__module__ == "my_pk.engine"

    @pytest.mark.parametrize("key", ["SGD", "Adam", "my_pk.SGD", "my_pk.Adam", "torch.optim.RMSprop"])
    def test_locations_as_in_mmengine(self, tmp_path, monkeypatch, key):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = pytest.importorskip("mmengine.registry", reason="mmengine is not installed").Registry
        (tmp_path / "engine_of_both.py").write_text(
            "import torch, builtins\nbuiltins.child.register_module(name='SGD', module=torch.optim.ASGD)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        found = []
        for cls in (Registry, theirs):
            root = cls("optimizer", scope="root")
            root.register_module(name="SGD", module=torch.optim.SGD)
            root.register_module(name="Adam", module=torch.optim.Adam)
            child = cls("optimizer", parent=root, scope="my_pk", locations=["engine_of_both"])
            monkeypatch.setattr("builtins.child", child, raising=False)
            monkeypatch.delitem(sys.modules, "engine_of_both", raising=False)
            try:
                found.append(child.get(key))
            except RuntimeError:  # MMEngine's for what there is not
                found.append(None)
        ours, stock = found
        # With its own scope a registry is asked alone.
        assert ours is stock is {"SGD": torch.optim.ASGD, "my_pk.SGD": torch.optim.ASGD}.get(key, ours)
        assert (ours is None) == (key == "my_pk.Adam")

    def test_a_lazy_entry_is_imported_when_it_is_asked_for(self, registry, tmp_path, monkeypatch):
        (tmp_path / "slow_tools.py").write_text("class Mill:\n    pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        registry.register_lazily("Mill", "slow_tools.Mill")
        assert list(registry) == ["Mill"] and len(registry) == 1 and "slow_tools.Mill" in repr(registry)
        assert registry.get("Mil") is None and "slow_tools" not in sys.modules
        with pytest.raises(KeyError, match=r"'Mill' is already in the tool registry as slow_tools\.Mill"):
            registry.register_module(name="Mill", module=int)
        assert registry.get("Mill").__module__ == "slow_tools"
        registry.register_module(name="Mill", module=int, force=True)
        assert registry.get("Mill") is int and len(registry) == 1

    def test_a_misspelt_name_imports_no_sharded_optimizer(self):
        code = (
            "import sys\n"
            "sys.modules['torch.distributed.optim'] = None\n"  # as where torch is built without it
            "import fusedopt\n"
            "try:\n    fusedopt.OPTIMIZERS.build(dict(type='AdmW'))\n"
            "except KeyError as error:\n    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "did you mean" in done.stdout

    def test_a_registry_module_that_fails_to_import_is_not_hidden(self, tmp_path, monkeypatch):
        (tmp_path / "broken_package").mkdir()
        (tmp_path / "broken_package" / "registry.py").write_text("import no_such_package\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            MODELS.get("broken_package.Net")


class TestOptimizersWithoutParams:
    """An optimizer is called with the parameters first; a signature with no place for them is an error that says so."""

    @pytest.fixture(autouse=True)
    def restore(self, monkeypatch):
        monkeypatch.setattr(OPTIMIZERS, "_modules", dict(OPTIMIZERS._modules))

    def test_a_class_that_takes_its_settings_only(self):
        Optimizer = torch.optim.Optimizer

        @OPTIMIZERS.register_module()
        class MyOptimizer(Optimizer):
            def __init__(self, a, b, c):
                pass

            def step(self, closure=None):
                pass

        a_value, b_value, c_value = 0.1, 2, 3
        optim_wrapper = dict(optimizer=dict(type="MyOptimizer", a=a_value, b=b_value, c=c_value))
        with pytest.raises(
            TypeError, match=r"MyOptimizer has no place for the parameters: .* \(a, b, c\).*params, \.\."
        ):
            fusedopt.build_optim_wrapper(torch.nn.Linear(1, 1), optim_wrapper)

    @pytest.mark.parametrize(
        "make",
        [lambda: None, lambda *, lr: None, lambda lr, params: None, lambda lr=0.1: None],
        ids=["nothing", "keywords only", "params second", "a setting first"],
    )
    def test_other_signatures(self, make):
        OPTIMIZERS.register_module(name="Odd", module=make)
        with pytest.raises(TypeError, match="has no place for the parameters"):
            OPTIMIZERS.build(dict(type="Odd"), parameters())

    def test_the_first_argument_may_have_any_name(self):
        OPTIMIZERS.register_module(name="Other", module=lambda model_params, lr: (model_params, lr))
        assert OPTIMIZERS.build(dict(type="Other", lr=3), [1, 2]) == ([1, 2], 3)

    def test_params_may_stand_in_the_config(self):
        optimizer = OPTIMIZERS.build(dict(type="SGD", params=parameters(), lr=0.1))
        assert len(optimizer.param_groups[0]["params"]) == 1
