"""What ``Config.dump`` writes loads back equal; what could not is refused by its key, and nothing is written."""

from __future__ import annotations

import contextlib
import enum
import importlib.util
import math
import os
import re
from collections import OrderedDict, defaultdict, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fusedopt.training.config import Config, ConfigError

SUFFIXES = (".py", ".json", ".yaml")


has_yaml = pytest.mark.skipif(not importlib.util.find_spec("yaml"), reason="PyYAML is not installed")
FORMS = (".py", ".json", pytest.param(".yaml", marks=has_yaml))


@pytest.fixture(params=FORMS)
def suffix(request) -> str:
    return request.param


class Color(str, enum.Enum):
    RED = "red"

    def __str__(self) -> str:
        return "Color.RED"


class Level(enum.IntEnum):
    HIGH = 3


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Rate(float, enum.Enum):
    SLOW = 0.1


class Plain(enum.Enum):
    X = 1


class Loud(str):
    def __str__(self) -> str:
        return self.upper()


Pair = namedtuple("Pair", "a b")


def same(one: Any, other: Any) -> bool:
    """Equal with the types of all scalars, NaN to NaN, and with a list for a tuple."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {repr(key): key for key in other}
        return len(one) == len(other) and all(
            repr(key) in keys and same(item, other[keys[repr(key)]]) for key, item in one.items()
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and repr(one) == repr(other)


texts = st.one_of(
    st.text(max_size=6),
    st.text(st.characters(categories=["Cs", "Cc", "Zl", "Zp", "Cf", "L"]), max_size=4),
    st.sampled_from(["items", "if", "dict", "float", "_base_", "_delete_", "a.b", "ü", "ﬁ", "__debug__"]),
    st.sampled_from(["on", "null", "1", "1.0", "1e5", "2024-01-01"]),
    st.sampled_from(["<<", "=", "~", "true", "{{fileDirname}}", "{{_base_.x}}", "{{x}}", "'", '"', "\\", "&a", "*a"]),
    st.sampled_from(["", "a\nb", "\0", "\x85", "\u2028", "\udcff", "\ud83d\ude00", "\ufeff", "\r\n", "a: b #c", "- x"]),
)
scalars = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 1e22, 5e-324, 10**400, -(10**4200), {1}, b"x"]),
)
keys = st.one_of(texts, st.integers(-3, 3), st.booleans(), st.none(), st.floats())
names = st.sampled_from([*"abcd", "größe", "match", "items", "dict", "_base_", "_delete_", "a b", "on", "\x85"])
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(texts, inner, max_size=3),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)


class TestWhatIsWrittenLoadsBackEqual:
    @pytest.mark.parametrize("form", FORMS)
    @settings(max_examples=200)
    @given(config=st.dictionaries(names, trees, max_size=3))
    @example(config={"a": "x\x85y", "b": {"\x85": 1}})
    @example(config={"dict": 1, "a": {"x": 1}})
    @example(config={"a": {"_delete_": True, "x": 1}})
    @example(config={"a": {1: 1, "1": 2}})
    @example(config={"a": {"ﬁ": 1, "__debug__": 2}})
    def test_or_is_refused_before_anything_is_written(self, form, config, tmp_path_factory):
        path = tmp_path_factory.mktemp("dump") / f"config{form}"
        text = None
        with contextlib.suppress(ConfigError):
            text = Config(config).dump(path)
        if text is None:
            assert not path.exists()
            return
        assert path.read_bytes() == text.encode("utf-8")
        loaded = Config.fromfile(path)
        assert same(config, loaded)
        if form == ".py":
            assert repr(loaded.to_dict()) == repr(config)  # tuples too

    def test_most_values_are_not_refused(self, suffix, tmp_path):
        config = {
            "items": ["on", "null", "1", "1.0", "1e5", "2024-01-01", "<<", "=", "~", "a: b", "{{ x }}", "", "ü 😀"],
            "control": ["a\nb\n", "\0", "\x85", "\u2028", "\udcff", "\ufeffx", "\r\n", "\t x "],
            "numbers": [math.inf, -math.inf, math.nan, -0.0, 1e22, 5e-324, 10**4200, -1, True, None],
            "empty": [[], {}, ""],
            "a": {
                "if": 1,
                "a.b": 2,
                "": 3,
                "ü": 4,
                "ﬁ": 5,
                "on": 6,
                "1": 7,
                "<<": 8,
                "=": 9,
                "items": 10,
                "_base_": 11,
            },
            "shared": [deep := {"x": [1]}, deep],
        }
        Config(config).dump(tmp_path / f"a{suffix}")
        assert same(config, Config.fromfile(tmp_path / f"a{suffix}"))

    def test_keys_that_are_no_strings(self, tmp_path):
        pytest.importorskip("yaml", reason="PyYAML is not installed")
        config = {"a": {Level.HIGH: "w", 1: "x", 1.5: "y", False: "z", -math.inf: [1]}}
        expected = {"a": {3: "w", 1: "x", 1.5: "y", False: "z", -math.inf: [1]}}
        for suffix in (".py", ".yaml"):
            Config(config).dump(tmp_path / f"a{suffix}")
            assert same(expected, Config.fromfile(tmp_path / f"a{suffix}"))

    @pytest.mark.parametrize(
        ("value", "written"),
        [
            (Color.RED, "red"),
            (Loud("x"), "x"),
            (Level.HIGH, 3),
            (Flag.A | Flag.B, 3),
            (Rate.SLOW, 0.1),
            (Fraction(1, 2), 0.5),
            (Path("x/y"), "x/y"),
            (Pair(1, Color.RED), (1, "red")),
            (OrderedDict(a=Level.HIGH), {"a": 3}),
            (defaultdict(int, a=1), {"a": 1}),
            ({Color.RED: Color.RED}, {"red": "red"}),
        ],
    )
    def test_subclasses_are_written_by_value(self, suffix, value, written, tmp_path):
        Config({"a": [value]}).dump(tmp_path / f"a{suffix}")
        assert same({"a": [written]}, Config.fromfile(tmp_path / f"a{suffix}"))
        assert Config({"a": [value]}).pretty_text == Config({"a": [written]}).pretty_text

    def test_numbers_of_numpy(self, suffix, tmp_path):
        np = pytest.importorskip("numpy", reason="NumPy is not installed")
        values = [
            np.float64(0.1),
            np.float32(0.1),
            np.int64(3),
            np.bool_(True),
            np.str_("x"),
            np.array(2),
            np.float32("nan"),
        ]
        Config({"a": values}).dump(tmp_path / f"a{suffix}")
        expected = [0.1, float(np.float32(0.1)), 3, True, "x", 2, math.nan]
        assert same({"a": expected}, Config.fromfile(tmp_path / f"a{suffix}"))


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("config", "suffixes", "message"),
        [
            ({"a": [{"b": {1}}]}, SUFFIXES, r"^c\.py: a\.0\.b: \{1\} cannot be written to a file$"),
            ({"a": {"b": b"x"}}, SUFFIXES, r"^c\.py: a\.b: b'x' cannot be written to a file$"),
            ({"a": Plain.X}, SUFFIXES, r"^c\.py: a: <Plain.X: 1> cannot be written to a file$"),
            ({"a": Decimal("0.1")}, SUFFIXES, r"^c\.py: a: Decimal\('0\.1'\) cannot be written to a file$"),
            ({"a": Fraction(10**400)}, SUFFIXES, r"^c\.py: a: Fraction\(1000*, 1\) cannot be written to a file$"),
            ({"a": torch.tensor(1.0)}, SUFFIXES, r"^c\.py: a: tensor\(1\.\) cannot be written to a file$"),
            ({"a": {"b": [10**5000]}}, SUFFIXES, r"^c\.py: a\.b\.0: Exceeds the limit"),
            ({"a": {"b": {10**5000: 1}}}, [".json"], r"^c\.py: a\.b: Exceeds the limit"),
            ({"a": {"b": "{{ fileDirname }}/x"}}, SUFFIXES, r"^c\.py: a\.b: '.*' holds a placeholder, which would be"),
            ({"a": {"{{_base_.x}}": 1}}, SUFFIXES, r"^c\.py: a: '.*' holds a placeholder, which would be replaced"),
            ({"a": {"b": [{"_delete_": 1}]}}, SUFFIXES, r"^c\.py: a\.b\.0\._delete_: .* not be read back equal from a"),
            ({"a": {"b": {None: 1}}}, SUFFIXES, r"^c\.py: a\.b: the key None cannot be written there"),
            ({"a": {"b": {1: 1}}}, [".json"], r"^c\.py: a\.b: the key 1 cannot be written there; expected a string"),
            ({"a": "\ud83d\ude00"}, [".json"], r"^c\.py: a: the value would not be read back equal"),
            ({"_base_": "x.json"}, [".json", ".yaml"], r"^c\.py: _base_: this name is reserved"),
            ({"dict": 1}, [".py"], r"^c\.py: dict: a Python config file cannot set this name"),
            ({"float": 1}, [".py"], r"^c\.py: float: a Python config file cannot set this name"),
            ({"ﬁ": 1}, [".py"], r"^c\.py: ﬁ: a Python config file cannot set this name"),
            ({"a\nb": {1}}, [".json"], r"^c\.py: a\\nb: \{1\} cannot be written"),
        ],
    )
    def test_by_its_key_with_the_file_unchanged(self, tmp_path, config, suffixes, message):
        for suffix in suffixes:
            if suffix == ".yaml":
                pytest.importorskip("yaml", reason="PyYAML is not installed")
            path = tmp_path / f"config{suffix}"
            path.write_text("before")
            with pytest.raises(ConfigError, match=message):
                Config(config, filename="c.py").dump(path)
            assert path.read_text() == "before" and os.listdir(tmp_path).count(path.name) == 1

    def test_the_text_for_people_shows_it_all_the_same(self):
        text = Config({"a": {1}, "b": b"x", "c": 10**5000, "d": Plain.X, "e": "{{ fileDirname }}"}).pretty_text
        shown = ["a = '{1}'", "b = \"b'x'\"", f"c = '{hex(10**5000)}'", "d = '<Plain.X: 1>'", "e = '{{ fileDirname }}'"]
        assert text.splitlines() == shown

    def test_what_is_nested_too_deeply(self, suffix, tmp_path):
        config: Any = 1
        for _ in range(120):
            config = [config]
        with pytest.raises(ConfigError, match=r"^c\.py: expected at most 100 levels$"):
            Config({"a": config}, filename="c.py").dump(tmp_path / f"a{suffix}")
        assert not os.listdir(tmp_path)
        for _ in range(21):
            config = config[0]
        Config({"a": config}).dump(tmp_path / f"a{suffix}")
        assert same({"a": config}, Config.fromfile(tmp_path / f"a{suffix}"))

    def test_names_of_files_that_could_not_be_read(self, tmp_path):
        with pytest.raises(ConfigError, match="must be more than dots and a suffix"):
            Config({"a": 1}).dump(tmp_path / "...py")
        with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/no/a.py: cannot write: No such file")):
            Config({"a": 1}).dump(tmp_path / "no" / "a.py")
        assert not os.listdir(tmp_path)


class TestTheWriteItself:
    def test_is_whole_or_not_at_all(self, suffix, tmp_path, monkeypatch):
        path = tmp_path / f"a{suffix}"
        Config({"a": 1}).dump(path)
        before = path.read_bytes()

        def fsync(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(ConfigError, match=r"cannot write: No space left on device$"):
            Config({"a": 2}).dump(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]

    def test_to_a_path_that_is_no_text(self, suffix, tmp_path):
        path = tmp_path / os.fsdecode(b"\xff" + suffix.encode())
        Config({"a": {"b": str(path)}}).dump(path)
        assert Config.fromfile(path) == {"a": {"b": str(path)}}
