"""Config files: what they inherit, how options change them, how they are written, and what their errors say."""

from __future__ import annotations

import copy
import json
import math
import pickle
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedopt import OptimWrapper, build_optim_wrapper
from fusedopt.messages import MissingExtraError
from fusedopt.training.config import Config, ConfigDict, ConfigError, naming, parse_options
from fusedopt.training.engine import CheckpointError
from fusedopt.training.registry import OPTIMIZERS


@pytest.fixture
def write(tmp_path: Path):
    """Writes files, given as name=source with the suffix after two underscores; returns the path of the last."""

    def write(**files: str) -> Path:
        for name, source in files.items():
            stem, _, suffix = name.partition("__")
            path = tmp_path / f"{stem}.{suffix or 'py'}"
            path.write_text(source)
        return path

    return write


class TestConfigDict:
    def test_items_are_attributes_at_every_depth(self):
        cfg = Config({"model": {"layers": [{"size": 3}, ({"size": 4},)]}})
        assert cfg.model.layers[0].size == 3 and cfg.model.layers[1][0].size == 4
        cfg.model.depth = {"of": {"it": 1}}
        assert cfg["model"]["depth"].of.it == 1
        del cfg.model.depth.of
        assert cfg.model.depth == {}
        with pytest.raises(AttributeError, match="no 'of' here"):
            del cfg.model.depth.of

    @pytest.mark.parametrize(
        ("items", "message"),
        [({"optimizer": 1, "type": 2}, "no 'optimiser' here; did you mean 'optimizer'"), ({}, "no 'optimiser' here$")],
    )
    def test_a_missing_attribute_names_the_closest(self, items, message):
        with pytest.raises(AttributeError, match=message):
            ConfigDict(items).optimiser  # noqa: B018
        assert not hasattr(ConfigDict(items), "__array__")

    def test_methods_are_not_overwritten(self):
        cfg = Config({"items": 1, "filename": "mine"})
        with pytest.raises(AttributeError, match=r"'items' belongs to Config; an item is set with \['items'\]"):
            cfg.items = 2
        assert cfg["items"] == 1 and next(iter(cfg.items())) == ("items", 1)
        assert cfg.filename is None and cfg["filename"] == "mine"

    def test_what_was_put_in_stays_as_it_is(self):
        given = {"optimizer": {"betas": [0.9, 0.99]}}
        cfg = Config(given)
        cfg.optimizer.betas[0] = 0.5
        cfg.merge_from_dict({"optimizer.lr": 1})
        cfg.more = given
        cfg.more.optimizer.lr = 2
        assert given == {"optimizer": {"betas": [0.9, 0.99]}}

    def test_update_goes_into_dicts(self):
        cfg = ConfigDict(a={"b": 1, "c": 2})
        cfg.update({"a": {"b": {"d": 3}}}, e=[{"f": 1}])
        assert cfg == {"a": {"b": {"d": 3}, "c": 2}, "e": [{"f": 1}]}
        assert cfg.e[0].f == 1
        cfg |= {"a": {"g": {}}}
        assert cfg.a == {"g": {}} and isinstance(cfg.a.g, ConfigDict)
        assert cfg.setdefault("h", {"i": 1}).i == 1 and cfg.setdefault("h", 2) == {"i": 1}

    @pytest.mark.parametrize(
        "duplicate", [copy.copy, copy.deepcopy, Config.copy, lambda c: pickle.loads(pickle.dumps(c))]
    )
    def test_copies_are_equal_and_independent(self, duplicate):
        cfg = Config({"a": {"b": [1, {"c": (2,)}]}}, filename="a.py")
        other = duplicate(cfg)
        assert type(other) is Config and other == cfg and other.filename == "a.py"
        other.a.b[1].c = 3
        assert cfg.a.b[1].c == (2,)

    def test_to_dict_is_plain(self):
        plain = Config({"a": [{"b": ({"c": 1},)}]}).to_dict()
        assert plain == {"a": [{"b": ({"c": 1},)}]}
        assert [type(plain), type(plain["a"][0]), type(plain["a"][0]["b"][0])] == [dict] * 3

    def test_dicts_of_other_types_stay_what_they_are(self):
        cfg = Config({"counts": defaultdict(int), "ordered": OrderedDict(a=1)})
        assert type(cfg.counts) is defaultdict and type(cfg.ordered) is ConfigDict

    def test_builders_take_its_parts(self):
        cfg = Config({"optim_wrapper": {"optimizer": {"type": "FusedSGD", "lr": 0.1}, "paramwise_cfg": {}}})
        before = copy.deepcopy(cfg)
        wrapper = build_optim_wrapper(torch.nn.Linear(2, 2), cfg.optim_wrapper)
        assert type(wrapper) is OptimWrapper
        assert OPTIMIZERS.build(cfg.optim_wrapper.optimizer, [torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.1
        assert cfg == before

    def test_takes_dicts_only(self):
        with pytest.raises(TypeError, match="config must be a dict, got list"):
            Config([("a", 1)])  # type: ignore[arg-type]


class TestPythonFile:
    def test_names_of_its_own_are_left_out(self, write):
        path = write(
            config="import math\nfrom collections import OrderedDict\nfrom copy import deepcopy\n"
            "def half(x):\n    return x / base\nbase = 2\n_depth = 4\nclass Own:\n    pass\n"
            "model = dict(depth=half(_depth), pi=math.pi, call=half)\n"
        )
        cfg = Config.fromfile(path)
        assert set(cfg) == {"base", "model"}
        assert cfg.model.depth == 2 and cfg.model.pi == math.pi and cfg.model.call(6) == 3
        assert cfg.filename == str(path)

    def test_bases_are_merged_in_depth(self, write, tmp_path):
        (tmp_path / "_base_").mkdir()
        (tmp_path / "_base_" / "model.py").write_text(
            "_base_ = '../root.py'\nmodel = dict(head=dict(size=1, kind='a'))\n"
        )
        write(
            root="model = dict(depth=3, head=dict(size=9, act='relu'))\n",
            schedule="param_scheduler = [dict(type='LinearLR')]\n",
        )
        path = write(
            config="_base_ = ['_base_/model.py', './schedule.py']\nmodel = dict(head=dict(size=2))\nseed = 1\n"
        )
        assert Config.fromfile(path) == {
            "model": {"depth": 3, "head": {"size": 2, "act": "relu", "kind": "a"}},
            "param_scheduler": [{"type": "LinearLR"}],
            "seed": 1,
        }

    def test_delete_replaces_what_is_inherited_and_leaves_no_trace(self, write):
        write(base="a = dict(x=1, y=dict(p=1, q=2))\nb = 3\n")
        path = write(
            config="_base_ = 'base.py'\na = dict(y=dict(_delete_=True, r=dict(_delete_=True, s=1)))\n"
            "b = dict(_delete_=True, t=1)\nc = dict(_delete_=True, u=[dict(_delete_=True, v=1)])\n"
            "d = dict(_delete_=False, w=1)\n"
        )
        assert Config.fromfile(path) == {
            "a": {"x": 1, "y": {"r": {"s": 1}}},
            "b": {"t": 1},
            "c": {"u": [{"v": 1}]},
            "d": {"w": 1},
        }

    def test_reads_and_changes_what_it_inherits(self, write):
        write(base="model = dict(head=dict(size=4), depth=2)\nlr = 0.5\n_private = 1\n")
        path = write(
            config="_base_ = 'base.py'\nlr = {{_base_.lr}} / 2\nhead = '{{ _base_.model.head }}'\n"
            "width = _base_.model.head.size * 2\n_base_.model.depth = 7\n"
        )
        cfg = Config.fromfile(path)
        assert cfg == {"model": {"head": {"size": 4}, "depth": 7}, "lr": 0.25, "head": {"size": 4}, "width": 8}
        cfg.head.size = 5
        assert cfg.model.head.size == 4

    def test_knows_the_name_of_the_file(self, write, tmp_path):
        source = "w = 'out/{{ fileBasenameNoExtension }}'\nd = '{{fileDirname}}'\n"
        source += "b = ['{{ fileBasename }}', '{{fileExtname}}']"
        assert Config.fromfile(write(some=source)) == {"w": "out/some", "d": str(tmp_path), "b": ["some.py", ".py"]}

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            pytest.param("a = 1\nb = dict(\n", r"config\.py:2: syntax error: '\(' was never closed", id="syntax"),
            pytest.param("a = '\0'", r"config\.py:1: syntax error: .*null byte", id="null_byte"),
            pytest.param("\nreturn 1", r"config\.py:2: syntax error: 'return' outside function$", id="compile"),
            pytest.param("x = 1\nimport sys\nsys.exit(3)", r"config\.py:3: SystemExit: 3$", id="exit"),
            pytest.param("x = 1\ny = z\n", r"config\.py:2: NameError: name 'z' is not defined", id="runtime"),
            pytest.param("def f():\n    return 1 / 0\n\nf()\n", r"config\.py:2: ZeroDivisionError", id="in_function"),
            pytest.param(
                "_base_ = 'base.py'\n\nx = _base_.modle", r"config\.py:3: .*did you mean 'model'", id="base_key"
            ),
            pytest.param(
                "_base_ = 'base.py'\nx = 'a{{_base_.model}}'", r"config\.py:2: .*a whole value", id="in_string"
            ),
            pytest.param("_base_ = 'gone.py'", r"config\.py: _base_: cannot read .*gone\.py: No such", id="no_base"),
            pytest.param("_base_ = '.'", r"config\.py: _base_: cannot read .*: Is a directory", id="folder_as_base"),
            pytest.param("_base_ = 'a.toml'", r"a\.toml: unknown suffix '\.toml'; expected \.py, \.json", id="suffix"),
            pytest.param("_base_ = 3", r"config\.py: _base_: expected a file name or a list .* got 3", id="base_type"),
            pytest.param(
                "x = 1\n_base_ = ['a' + b]", r"config\.py:2: _base_ must be a literal string or list", id="base_code"
            ),
            pytest.param(
                "if True:\n    _base_ = 'base.py'", r"config\.py: _base_: must be set on its own line", id="in_block"
            ),
            pytest.param(
                "_base_ = ['base.py', 'other.py']", r"config\.py: model: Duplicate key: .*other\.py", id="twice"
            ),
            pytest.param("_base_ = 'config.py'", r"inherits from itself: .*config\.py -> .*config\.py$", id="itself"),
            pytest.param("_base_ = 'broken.py'", r"broken\.py:1: syntax error", id="broken_base"),
            pytest.param(
                "_base_ = 'base.py'\nmodel = dict(depth=dict(of=1))",
                r"config\.py: model\.depth: a dict cannot be merged into 2, which is not a dict; `_delete_=True`",
                id="merge",
            ),
        ],
    )
    def test_errors_name_the_file_and_the_place(self, write, source, message):
        write(base="model = dict(depth=2)\n", other="model = 1\n", broken="(\n", a__toml="")
        path = write(config=source)
        with pytest.raises(ConfigError, match=message) as caught:
            Config.fromfile(path)
        assert "\n" not in str(caught.value)

    def test_text_may_be_about_what_is_inherited(self, write):
        assert Config.fromfile(write(config='"""What _base_ . x is."""\nx = "_base_ .y"\n')) == {"x": "_base_ .y"}

    def test_a_byte_order_mark_is_no_part_of_it(self, tmp_path):
        for name, text in (("a.py", "x = 1\n"), ("a.json", '{"x": 1}')):
            (tmp_path / name).write_text(text, encoding="utf-8-sig")
            assert Config.fromfile(tmp_path / name) == {"x": 1}

    def test_a_cycle_names_the_chain(self, write, tmp_path):
        write(b="_base_ = ['c.py']", c="_base_ = 'sub/../a.py'")
        (tmp_path / "sub").mkdir()
        with pytest.raises(ConfigError, match=r"a\.py: _base_: .*itself: .*a\.py -> .*b\.py -> .*c\.py -> .*a\.py$"):
            Config.fromfile(write(a="_base_ = 'b.py'"))

    def test_a_missing_or_unreadable_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"nowhere\.py: cannot read the config file: No such file"):
            Config.fromfile(tmp_path / "nowhere.py")
        (tmp_path / "image.py").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match=r"image\.py: cannot read the config file: not UTF-8 text"):
            Config.fromfile(tmp_path / "image.py")


class TestJsonAndYaml:
    def test_the_same_config_in_three_languages(self, write):
        pytest.importorskip("yaml")
        write(
            base__json='{"model": {"depth": 2, "head": {"size": 1, "act": "relu"}}, "lr": 0.1}',
            base__yaml="model: {depth: 2, head: {size: 1, act: relu}}\nlr: 0.1\n",
            base__py="model = dict(depth=2, head=dict(size=1, act='relu'))\nlr = 0.1\n",
        )
        paths = (
            write(
                c__json='{"_base_": ["./base.json"], "model": {"head": {"_delete_": true, "size": 3}}, '
                '"rates": [{{ _base_.lr }}, "{{_base_.model.depth}}"], "name": "{{ fileBasename }}"}'
            ),
            write(
                c__yaml="_base_: base.yaml\nmodel:\n  head: {_delete_: true, size: 3}\n"
                "rates: [{{ _base_.lr }}, '{{_base_.model.depth}}']\nname: '{{ fileBasename }}'\n"
            ),
            write(
                c__py="_base_ = 'base.py'\nmodel = dict(head=dict(_delete_=True, size=3))\n"
                "rates = [{{_base_.lr}}, {{_base_.model.depth}}]\nname = '{{ fileBasename }}'\n"
            ),
        )
        expected = {"model": {"depth": 2, "head": {"size": 3}}, "lr": 0.1, "rates": [0.1, 2]}
        for path in paths:
            assert Config.fromfile(path) == {**expected, "name": path.name}

    @pytest.mark.parametrize(
        ("name", "source", "message"),
        [
            ("c__json", '{"a": 1,\n"b": }', r"c\.json:2: syntax error: Expecting value"),
            ("c__json", "[1]", r"c\.json: a config is a mapping of keys to values, got list"),
            ("c__json", '{"_base_": "base.py"}', r"c\.json: _base_: a \.json file runs no code, so .*base\.py"),
            ("c__json", '{"_base_": "base.json", "x": {{_base_.no}}}', r"c\.json: .*_base_\.no.*: .* have no 'no'"),
            ("c__json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", r"c\.json: the file is nested too deeply"),
            ("c__json", '{"a": ' + '{"a": ' * 400 + "1" + "}" * 401, r"c\.json: the file is nested too deeply"),
            *(
                (
                    f"c__{suffix}",
                    source,
                    rf"c\.{suffix}: \{{\{{_base_\.x\}}\}}: must be a whole value, not part of a string",
                )
                for suffix, source in (
                    ("json", '{"_base_": "base.json", "a": "run {{ _base_.x }}"}'),
                    ("yaml", "_base_: base.json\na: run {{ _base_.x }}"),
                    ("yaml", "_base_: base.json\na: ['run {{_base_.x}}']"),
                    ("yaml", '_base_: base.json\na: "{{_base_.x}} run"'),
                )
            ),
            ("c__yaml", "a: 1\nb: [", r"c\.yaml:\d: syntax error: "),
            ("c__yaml", "a: !!python/object/apply:os.getcwd []", r"c\.yaml:1: syntax error: could not determine"),
            ("c__yaml", "", r"c\.yaml: a config is a mapping of keys to values, got NoneType"),
        ],
    )
    def test_errors_name_the_file_and_the_place(self, write, name, source, message):
        pytest.importorskip("yaml")
        write(base="raise SystemExit\n", base__json='{"x": 1}')
        with pytest.raises(ConfigError, match=message) as caught:
            Config.fromfile(write(**{name: source}))
        assert "\n" not in str(caught.value)

    def test_yaml_is_an_extra(self, write, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(MissingExtraError, match=r"PyYAML is not installed.*fusedopt\[engine\]"):
            Config.fromfile(write(c__yaml="a: 1"))


class TestCustomImports:
    @pytest.fixture
    def module(self, tmp_path, monkeypatch):
        (tmp_path / "own_optimizers.py").write_text("loaded = True\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield "own_optimizers"
        sys.modules.pop("own_optimizers", None)

    @pytest.mark.parametrize("form", ["['{}']", "'{}'"])
    def test_modules_are_imported(self, write, module, form):
        path = write(config=f"custom_imports = dict(imports={form.format(module)}, allow_failed_imports=False)")
        Config.fromfile(path, import_custom_modules=False)
        assert module not in sys.modules
        Config.fromfile(path)
        assert module in sys.modules

    def test_one_that_may_fail_is_a_warning(self, write, module):
        path = write(config=f"custom_imports = dict(imports=['no_such', '{module}'], allow_failed_imports=True)")
        with pytest.warns(UserWarning, match="custom_imports: 'no_such' is skipped: No module named") as caught:
            Config.fromfile(path)
        assert caught[0].filename == __file__ and module in sys.modules

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ("dict(imports=['no_such'])", "cannot import 'no_such': No module named 'no_such' .*PYTHONPATH"),
            ("['os']", "custom_imports must be a dict, got list"),
            ("dict(import_='os')", "unknown key 'import_'; did you mean 'imports'"),
            ("dict(imports=[3])", r"imports must be a list of module names, got \[3\]"),
            ("dict(imports=[''])", "imports must be a list of absolute module names; '' is not one"),
            ("dict(imports=['.x'])", "imports must be a list of absolute module names; '.x' is not one"),
        ],
    )
    def test_errors(self, write, value, message):
        with pytest.raises(ConfigError, match=rf"config\.py: custom_imports: {message}"):
            Config.fromfile(write(config=f"custom_imports = {value}"))


class TestMergeFromDict:
    def make(self) -> Config:
        return Config(
            {
                "model": {"depth": 2, "head": {"size": 1}},
                "param_scheduler": [{"type": "LinearLR", "end": 5}, {"type": "CosineAnnealingLR"}],
                "betas": (0.9, 0.99),
                "sizes": [1, [2, 3]],
            }
        )

    @pytest.mark.parametrize(
        ("options", "key", "expected"),
        [
            ({"model.depth": 3}, "model", {"depth": 3, "head": {"size": 1}}),
            ({"model.head.size": 3, "model.head.act": "a"}, "model", {"depth": 2, "head": {"size": 3, "act": "a"}}),
            ({"model": {"head": {"act": "a"}}}, "model", {"depth": 2, "head": {"size": 1, "act": "a"}}),
            ({"model": {"_delete_": True, "type": "A"}}, "model", {"type": "A"}),
            ({"model.head": {"_delete_": True, "act": "a"}}, "model", {"depth": 2, "head": {"act": "a"}}),
            (
                {"model.head.act": 1, "model.head": {"drop": 2}},
                "model",
                {"depth": 2, "head": {"size": 1, "act": 1, "drop": 2}},
            ),
            ({"model.head": 3}, "model", {"depth": 2, "head": 3}),
            ({"new.a.b": 1}, "new", {"a": {"b": 1}}),
            (
                {"param_scheduler.0.end": 7},
                "param_scheduler",
                [{"type": "LinearLR", "end": 7}, {"type": "CosineAnnealingLR"}],
            ),
            (
                {"param_scheduler": {"1": {"_delete_": True, "type": "StepLR"}}},
                "param_scheduler",
                [{"type": "LinearLR", "end": 5}, {"type": "StepLR"}],
            ),
            ({"param_scheduler": []}, "param_scheduler", []),
            ({"betas.0": 0.5}, "betas", (0.5, 0.99)),
            ({"sizes.1.0": 7, "sizes.0": {"a": 1, "_delete_": True}}, "sizes", [{"a": 1}, [7, 3]]),
        ],
    )
    def test_changes(self, options, key, expected):
        cfg, given = self.make(), copy.deepcopy(options)
        cfg.merge_from_dict(options)
        assert cfg[key] == expected
        assert {other: cfg[other] for other in self.make() if other != key} == {
            other: value for other, value in self.make().items() if other != key
        }
        assert options == given

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model.depth.of": 1}, r"^c\.py: model\.depth: a dict cannot be merged into 2, .*`_delete_=True`"),
            ({"seed": 1, "betas.2": 1}, r"^c\.py: betas\.2: expected an index below 2, the length of the list"),
            ({"param_scheduler.x": 1}, r"^c\.py: param_scheduler\.x: expected an index below 2"),
            ({"a": 1, "a.b": 2}, r"^c\.py: a\.b: 'a' is given as 1 at the same time"),
        ],
    )
    def test_errors_name_the_key_and_change_nothing(self, options, message):
        cfg = Config(self.make(), filename="c.py")
        with pytest.raises(ConfigError, match=message):
            cfg.merge_from_dict(options)
        assert cfg == self.make()

    def test_list_indices_can_be_refused(self):
        with pytest.raises(ConfigError, match=r"^betas: a dict cannot be merged into \(0\.9, 0\.99\)"):
            self.make().merge_from_dict({"betas.0": 1}, allow_list_keys=False)


class TestOptions:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("3", 3),
            ("-1e-3", -0.001),
            ("inf", math.inf),
            ("true", True),
            ("False", False),
            ("None", None),
            ("none", "none"),
            ("AdamW", "AdamW"),
            ("", ""),
            ("it's, here", ["it's", "here"]),
            ("'3'", "3"),
            ('"a, b"', "a, b"),
            ("[a,'b, c',\"]\"]", ["a", "b, c", "]"]),
            ("1,2.5,x", [1, 2.5, "x"]),
            ("[1, 2]", [1, 2]),
            ("(0.9,0.99)", (0.9, 0.99)),
            ("(1,)", (1,)),
            ("[]", []),
            ("()", ()),
            ("[(1,2),[a,[]],None]", [(1, 2), ["a", []], None]),
            ("(1,2),(3,4)", [(1, 2), (3, 4)]),
            ("a=b", "a=b"),
            ("f(x)", "f(x)"),
            ("(a)b", "(a)b"),
        ],
    )
    def test_values(self, text, expected):
        (value,) = parse_options([f"a.b={text}"]).values()
        assert value == expected and type(value) is type(expected)

    def test_keys_and_the_last_of_two(self):
        assert parse_options(["a.0.b=1", "c=2", "c=3"]) == {"a.0.b": 1, "c": 3}

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("lr", "--cfg-options lr: expected KEY=VALUE"),
            ("=3", "--cfg-options =3: expected KEY=VALUE"),
            ("a=[1,(2]", r"--cfg-options a=\[1,\(2\]: unexpected '\]'"),
            ("a=[1", r"--cfg-options a=\[1: expected '\]' at the end"),
            ("a=1,'b", "--cfg-options a=1,'b: expected \"'\" at the end"),
        ],
    )
    def test_errors(self, option, message):
        with pytest.raises(ConfigError, match=message):
            parse_options([option])


class TestDump:
    CONFIG: ClassVar[dict[str, Any]] = {
        "model": {"type": "A", "class": 3, "sizes": (1,), "empty": [{}, (), []], "deep": {"list": [[1, 2], None]}},
        "text": 'it\'s "quoted"\n{{ two lines }} ü',
        "rates": [1e-5, -0.0, 1e300, 3],
        "long": [{"name": f"number {i}", "value": {"index": i}} for i in range(9)],
        "keys": {"cls_token": {"lr_mult": 0.1}, "layers.0": True},
    }

    @pytest.mark.parametrize("suffix", [".py", ".json", ".yaml", ".yml"])
    def test_loads_back_equal(self, tmp_path, suffix):
        if suffix.startswith(".y"):
            pytest.importorskip("yaml")
        path = tmp_path / f"config{suffix}"
        text = Config(self.CONFIG).dump(path)
        assert path.read_text(encoding="utf-8") == text
        expected = self.CONFIG if suffix == ".py" else json.loads(json.dumps(self.CONFIG))
        assert Config.fromfile(path).to_dict() == expected
        assert max(map(len, text.splitlines())) <= 120

    def test_without_a_file_it_is_python(self, write):
        text = Config({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}}, "x": {"a b": 1}}).dump()
        assert text == "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\nx = {'a b': 1}\n"

    def test_the_text_for_people_has_everything(self):
        text = Config({"a": [lambda x: x], "_b": torch.float16}).pretty_text
        assert text.startswith("a = ['<function TestDump") and text.endswith("_b = 'torch.float16'\n")

    def test_values_that_are_no_literals(self, write, tmp_path):
        path = tmp_path / "config.py"
        Config({"a": math.inf, "b": -math.inf, "c": math.nan, "d": [torch.optim.AdamW], "e": Path("x/y")}).dump(path)
        loaded = Config.fromfile(path)
        assert (loaded.a, loaded.b, math.isnan(loaded.c)) == (math.inf, -math.inf, True)
        assert loaded.d == ["torch.optim.adamw.AdamW"] and OPTIMIZERS.get(loaded.d[0]) is torch.optim.AdamW
        assert loaded.e == "x/y"

    @pytest.mark.parametrize(
        ("config", "suffix", "message"),
        [
            ({"a": [{"f": lambda x: x}]}, ".py", r"^c\.py: a\.0\.f: <function .*> cannot be written to a file"),
            ({"a": torch.zeros(1)}, ".json", r"^c\.py: a: tensor\(\[0\.\]\) cannot be written"),
            ({"a": {(1, 2): 3}}, ".py", r"^c\.py: a: the key \(1, 2\) cannot be written there"),
            ({"a": {1: 3}}, ".json", r"^c\.py: a: the key 1 cannot be written there; expected a string"),
            ({"a b": 1}, ".py", r"^c\.py: a b: a Python config file cannot set this name"),
            ({"_a": 1}, ".py", r"^c\.py: _a: a Python config file cannot set this name"),
            ({"class": 1}, ".py", r"^c\.py: class: a Python config file cannot set this name"),
            ({}, ".toml", r"unknown suffix '\.toml'; expected \.py, \.json, \.yaml or \.yml"),
        ],
    )
    def test_what_cannot_be_written_is_named_and_nothing_is(self, tmp_path, config, suffix, message):
        path = tmp_path / f"config{suffix}"
        path.write_text("before")
        with pytest.raises(ConfigError, match=message):
            Config(config, filename="c.py").dump(path)
        assert path.read_text() == "before"


class TestNaming:
    @pytest.mark.parametrize(
        "kind", [KeyError, IndexError, TypeError, ValueError, ImportError, OSError, RuntimeError, OverflowError]
    )
    @pytest.mark.parametrize("message", ["no\n such", "model: no such"])
    def test_errors_of_building_become_one_line(self, kind, message):
        with pytest.raises(ConfigError, match=r"^c\.py: model: no such$"), naming(Config(filename="c.py"), "model"):
            raise kind(message)

    def test_an_error_without_a_message_is_told_by_its_kind(self):
        with pytest.raises(ConfigError, match=r"^model: NotImplementedError$"), naming({}, "model"):
            raise NotImplementedError

    @pytest.mark.parametrize("kind", [MissingExtraError, ConfigError, CheckpointError, AttributeError])
    def test_others_pass(self, kind):
        with pytest.raises(kind, match=r"^this$"), naming({}, "model"):
            raise kind("this")


leaves = st.one_of(st.integers(-9, 9), st.booleans(), st.none(), st.sampled_from(["x", "1", ""]), st.floats(-2, 2))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(lambda d: {**d, "_delete_": True}),
    ),
    max_leaves=8,
)
settings = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), values, min_size=1, max_size=4)


def without_directives(value: Any) -> Any:
    """MMEngine leaves a ``_delete_`` where nothing was inherited; the config without it."""
    if isinstance(value, dict):
        return {key: without_directives(item) for key, item in value.items() if key != "_delete_"}
    return type(value)(map(without_directives, value)) if isinstance(value, (list, tuple)) else value


def outcome(function: Any) -> Any:
    """The result, or ``'error'``."""
    try:
        return without_directives(function().to_dict())
    except (ConfigError, TypeError, KeyError, AttributeError):
        return "error"


class TestAsMMEngine:
    """The same files and options as MMEngine, the same configs."""

    @pytest.fixture(autouse=True)
    def mmengine(self):
        return pytest.importorskip("mmengine.config", reason="mmengine is not installed")

    @given(base=settings, child=settings)
    def test_inheritance(self, tmp_path_factory, base, child):
        from mmengine.config import Config as Theirs

        folder = tmp_path_factory.mktemp("configs")
        (folder / "base.py").write_text("".join(f"{key} = {value!r}\n" for key, value in base.items()))
        path = folder / "child.py"
        path.write_text("_base_ = './base.py'\n" + "".join(f"{key} = {value!r}\n" for key, value in child.items()))
        assert outcome(lambda: Config.fromfile(path)) == outcome(lambda: Theirs.fromfile(path))

    @given(
        config=settings,
        options=st.dictionaries(
            st.lists(st.sampled_from(["a", "b", "c", "0", "1"]), min_size=1, max_size=3).map(".".join),
            leaves,
            max_size=1,
        ),
    )
    def test_options(self, config, options):
        from mmengine.config import Config as Theirs

        def merged(kind: Any) -> Any:
            cfg = kind(copy.deepcopy(config))
            cfg.merge_from_dict(copy.deepcopy(options))
            return cfg

        theirs = outcome(lambda: merged(Theirs))
        # MMEngine changes dicts in lists only, neither plain items nor those of tuples.
        if theirs != "error":
            assert outcome(lambda: merged(Config)) == theirs

    @given(
        st.recursive(
            st.sampled_from(["1", "-2.5", "1e-3", "true", "False", "None", "null", "a", "1_0", "nan_", "x.y"]),
            lambda inner: st.builds(
                lambda items, brackets: brackets[0] + ",".join(items) + brackets[1],
                st.lists(inner, max_size=3),
                st.sampled_from(["[]", "()"]),
            ),
            max_leaves=6,
        )
    )
    def test_option_values(self, text):
        from mmengine.config import DictAction

        assert parse_options([f"key={text}"]) == {"key": DictAction._parse_iterable(text)}

    @given(st.lists(st.sampled_from(["1", "[a,b]", "b", "()"]), min_size=2, max_size=4))
    def test_option_lists_without_brackets(self, items):
        from mmengine.config import DictAction

        text = ",".join(items)
        # MMEngine takes (1),(2) and [1],[2] for one bracket and does not come to an end.
        if text[0] not in "[(" or text[-1] not in "])":
            assert parse_options([f"key={text}"])["key"] == DictAction._parse_iterable(text)

    def test_duplicate_keys_are_refused_by_both(self, write):
        from mmengine.config import Config as Theirs

        write(one="a = 1\n", two="a = 1\n")
        path = write(config="_base_ = ['one.py', 'two.py']\n")
        for kind, error in ((Theirs, KeyError), (Config, ConfigError)):
            with pytest.raises(error, match="Duplicate key"):
                kind.fromfile(path)


class TestMMEnginesSmallerParts:
    def test_fromstring(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Config({"a": {"b": 1}}).dump("base.json")
        assert Config.fromstring("_base_ = 'base.json'\na = dict(c=2)", ".py") == {"a": {"b": 1, "c": 2}}
        assert Config.fromstring('{"a": [1]}', ".json") == {"a": [1]}
        with pytest.raises(ConfigError, match=r"config\.toml: unknown suffix '\.toml'"):
            Config.fromstring("a = 1", ".toml")
        with pytest.raises(ConfigError, match=r"config\.py:2: syntax error"):
            Config.fromstring("a = 1\nb =", ".py")

    def test_text_and_diff(self, tmp_path):
        (tmp_path / "a.py").write_text("lr = 0.1  # ü\n", encoding="utf-8")
        config = Config.fromfile(tmp_path / "a.py")
        assert config.text == "lr = 0.1  # ü\n" and Config({"lr": 0.1}).text == ""
        assert Config.diff(config, str(tmp_path / "a.py")) == ""
        assert Config.diff(config, Config({"lr": 0.2})).splitlines()[-2:] == ["-lr = 0.1", "+lr = 0.2"]

    def test_a_base_in_an_installed_package(self, tmp_path, monkeypatch):
        folder = tmp_path / "pretend_openmmlab" / ".mim" / "configs" / "net"
        folder.mkdir(parents=True)
        (tmp_path / "pretend_openmmlab" / "__init__.py").write_text("raise SystemError('imported')")
        (folder / "net.py").write_text(
            "model = dict(type='Net', head=dict(type='Head'))\nhooks = [dict(type='A')]\nx = 1\n"
        )
        (tmp_path / "child.py").write_text("_base_ = ['pretend_openmmlab::net/net.py']\nmodel = dict(depth=2)\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert Config.fromfile(tmp_path / "child.py") == {
            "model": {"_scope_": "pretend_openmmlab", "type": "Net", "head": {"type": "Head"}, "depth": 2},
            "hooks": [{"_scope_": "pretend_openmmlab", "type": "A"}],
            "x": 1,
        }
        for base, message in (
            ("not_installed::a.py", "there is no installed package 'not_installed'"),
            ("os.path::a.py", "there is no installed package 'os.path'"),
            ("pretend_openmmlab::net/no.py", "cannot read .*net/no.py: No such file"),
        ):
            (tmp_path / "child.py").write_text(f"_base_ = {base!r}\n")
            with pytest.raises(ConfigError, match=message):
                Config.fromfile(tmp_path / "child.py")

    def test_what_a_config_imports_is_not_part_of_it(self, tmp_path):
        (tmp_path / "a.py").write_text("from __future__ import annotations\nfrom typing import Any, Optional\nx = 1\n")
        assert Config.fromfile(tmp_path / "a.py") == {"x": 1}
