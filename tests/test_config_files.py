"""Config files that are hostile or odd: one line that says what is wrong, never a traceback or a hang; placeholders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusedopt.cli import main
from fusedopt.training.config import Config, ConfigError, parse_options

TOO_DEEP = "the file is nested too deeply"
DIGITS = "1" * 5000
MANY = 100_000

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def needs_yaml(name: str) -> None:
    if name.endswith((".yaml", ".yml")):
        pytest.importorskip("yaml", reason="PyYAML is not installed")


def refused(path: Path) -> str:
    """The one line about a config file that cannot be read."""
    with pytest.raises(ConfigError) as caught:
        Config.fromfile(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


class TestFilesThatAreNone:
    @pytest.fixture(params=["config", "base"])
    def error_about(self, request, write, tmp_path) -> Callable[[str], str]:
        """The error about a file of this name, as the config or as what a config inherits."""
        if request.param == "config":
            return lambda name: refused(tmp_path / name).removeprefix(f"{tmp_path / name}: cannot read the config file")
        return lambda name: refused(write("child.py", f"_base_ = {name!r}\n")).removeprefix(
            f"{tmp_path / 'child.py'}: _base_: cannot read {tmp_path / name}"
        )

    def test_a_fifo_does_not_wait(self, error_about, tmp_path):
        os.mkfifo(tmp_path / "a.py")
        assert error_about("a.py") == ": not a regular file"

    def test_a_device(self, error_about, tmp_path):
        (tmp_path / "a.py").symlink_to("/dev/zero")
        assert error_about("a.py") == ": not a regular file"

    def test_a_folder(self, error_about, tmp_path):
        (tmp_path / "a.py").mkdir()
        assert error_about("a.py") == ": Is a directory"

    def test_links_in_a_loop(self, error_about, tmp_path):
        (tmp_path / "a.py").symlink_to("b.py")
        (tmp_path / "b.py").symlink_to("a.py")
        assert error_about("a.py") == ": Too many levels of symbolic links"

    def test_a_link_to_a_config_is_one(self, write, tmp_path):
        (tmp_path / "link.py").symlink_to(write("a.py", "x = 1\n"))
        assert Config.fromfile(tmp_path / "link.py") == {"x": 1}

    @pytest.mark.parametrize("name", ["a\0b.py", "a\ud800b.py"])
    def test_names_that_no_file_has(self, write, name):
        assert refused(write("a.py", f"_base_ = {name!r}\n")).endswith(": no file can have this name")

    @pytest.mark.parametrize("name", ["..py", "...py", "....json"])
    def test_names_that_lead_to_another_folder(self, write, name):
        """The default work_dir of ...py would be work_dirs/.., and so would {{ fileBasenameNoExtension }}."""
        assert refused(write(name, "{}")).endswith(f"{name}: the name of a config must be more than dots and a suffix")

    def test_a_name_with_a_line_break_and_an_escape_sequence(self, write, tmp_path):
        path = write("a\n\x1b[31m.py", "_base_ = 'b\\nc.py'\n")
        assert refused(path) == rf"{tmp_path}/a\n\x1b[31m.py: _base_: cannot read {tmp_path}/b\nc.py: " + (
            "No such file or directory"
        )


class TestContentsThatAreNone:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            (
                "a.py",
                "x = 1\nwith read_base():\n    from a import *\n",
                r":2: `with read_base\(\):` is how",
            ),
            ("a.py", "x = 1\ny = '{{$LR:0.1}}'\n", r":2: {{\$LR:0.1}}: environment variables are not inserted"),
            ("a.yaml", "x: {{$LR:0.1}}\n", r":1: {{\$LR:0.1}}: environment variables are not inserted"),
            ("a.yaml", "x: 1\n!!set y: 1\n", r":2: a (set|generator) cannot be a key"),
            ("a.yaml", "x: 1\ny: 2024-13-45\n", r":2: syntax error: '2024-13-45' is not a valid timestamp: month must"),
            ("a.yaml", f"x: 1\ny: {DIGITS}\n", r":2: syntax error: '1+\.\.\.1+' is not a valid int: .* 5000 digits"),
            ("a.yaml", "x: !!timestamp abc", r":1: syntax error: 'abc' is not a valid timestamp$"),
            ("a.yaml", "x: !!int ''", r":1: syntax error: '' is not a valid int$"),
            ("a.yaml", "x: !!bool maybe", r":1: syntax error: 'maybe' is not a valid bool$"),
            ("a.json", f'{{"x": {DIGITS}}}', r": Exceeds the limit .* 5000 digits"),
            ("a.py", f"x = 1\ny = {DIGITS}\n", r":2: syntax error: Exceeds the limit .* 5000 digits"),
            ("a.py", f"x = {'-' * MANY}1\n", f": {TOO_DEEP}$"),
            ("a.py", f"x = {'[' * MANY}{']' * MANY}\n", ":1: syntax error: too many nested parentheses$"),
            ("a.py", f"x = {'+'.join('1' * MANY)}\n", f": {TOO_DEEP}$"),
            ("a.py", f"_base_ = {'-' * MANY}'a.py'\n", f": {TOO_DEEP}$"),
            ("a.py", "x = 1\nfor i in range(150):\n    x = [x]\n", f": {TOO_DEEP}$"),
            ("a.json", f'{{"x": {"[" * MANY}{"]" * MANY}}}', f": {TOO_DEEP}$"),
            ("a.json", f'{{"x": {"[" * 101}{"]" * 101}}}', f": {TOO_DEEP}$"),
            ("a.yaml", f"x: {'[' * MANY}{']' * MANY}", f": {TOO_DEEP}$"),
            ("a.yaml", f"x:\n  {'- ' * MANY}1", f": {TOO_DEEP}$"),
            ("a.py", "raise ValueError('a\\n  b\\x1b[31m')", r":1: ValueError: a b\\x1b\[31m$"),
        ],
    )
    def test_one_line(self, write, name, text, message):
        needs_yaml(name)
        path = write(name, text)
        assert re.search(f"^{re.escape(str(path))}{message}", refused(path))

    def test_a_base_is_named(self, write):
        write("a.py", f"x = {'-' * MANY}1\n")
        assert refused(write("b.py", "_base_ = 'a.py'\n")).endswith(f"a.py: {TOO_DEEP}")

    def test_what_the_parser_takes_the_rest_takes_too(self, write):
        """Python's parser allows about a thousand levels."""
        cfg = Config.fromfile(write("a.py", f"x = {'-' * 800}1\ny = {'+'.join('1' * 800)}\n"))
        assert cfg == {"x": 1, "y": 800}

    @pytest.mark.parametrize("shape", ["minus", "plus", "attributes", "calls", "lambda", "elif"])
    def test_no_depth_of_code_crashes_the_interpreter(self, shape, tmp_path):
        code = """if True:
            import sys
            from pathlib import Path
            from fusedopt.training.config import ConfigError
            from fusedopt.training.config.files import load_text
            for n in (100, 500, 900, 1000, 1500, 2500, 2900, 3000, 20000):
                text = dict(
                    minus="x = " + "-" * n + "1",
                    plus="x = " + "+".join("1" * n),
                    attributes="x = lambda: a" + ".a" * n,
                    calls="x = lambda: a" + "()" * n,
                    elif_="if 1: x = 1\\n" + "elif 1: pass\\n" * n,
                )
                text["lambda"] = "x = " + "lambda: " * n + "1"
                try:
                    load_text(text.get(sys.argv[1]) or text["elif_"], Path("a.py"))
                except ConfigError as error:
                    assert str(error) == "a.py: the file is nested too deeply", error
        """
        done = subprocess.run(
            [sys.executable, "-c", code, shape], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def laughs(levels: int, step: str, first: str) -> str:
    lines = [f"a0: &a0 {first}"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} " + step.format(", ".join([f"*a{level - 1}"] * 10)))
    return "\n".join(lines)


class TestAliases:
    @pytest.fixture(autouse=True)
    def _yaml(self):
        pytest.importorskip("yaml", reason="PyYAML is not installed")

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            (laughs(8, "[{}]", "[1, 1]"), 7),
            (laughs(12, "{{<<: [{}]}}", "{x: 1, y: 2}"), 7),
            ("".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 1}]\n" for i in range(3000)), 1),
            ("x: 1\ny: &a [1, *a]\n", 2),
            ("x: &a {b: {c: *a}}\n", 1),
            ("x: &a\n  <<: *a\n", 1),
        ],
        ids=["lists", "merges", "chain", "itself", "itself_below", "itself_merged"],
    )
    def test_aliases_that_expand_to_too_much(self, write, text, line):
        message = "with aliases expanded, there are more than 1000000 values here"
        assert re.search(rf"a\.yaml:{line}: {message}$", refused(write("a.yaml", text)))

    def test_others_expand(self, write):
        text = "base: &base {x: 1, y: [2]}\nmore: {<<: *base, x: 3, z: *base}\nboth:\n  <<: [*base, {x: 4, w: 5}]\n"
        cfg = Config.fromfile(write("a.yaml", text))
        assert cfg.more == {"x": 3, "y": [2], "z": {"x": 1, "y": [2]}} and cfg.both == {"x": 1, "y": [2], "w": 5}
        cfg.more.z.x = 7
        assert cfg.base.x == 1


class TestRepeatedKeys:
    @pytest.mark.parametrize(
        ("name", "text", "key", "line"),
        [
            ("a.json", '{"x": 1,\n "y": 2,\n "x": 3}', "'x'", 3),
            ("a.json", '{"x": {"y": "{\\"z\\": 1",\n  "z": [{"y": 1}, {"y": 2}],\n\n  "\\u0079": 2}}', "'y'", 4),
            ("a.yaml", "x: 1\ny: 2\nx: 3\n", "'x'", 3),
            ("a.yaml", "x: [{y: 1}, {y: 1,\n  z: 2, 'y': 3}]\n", "'y'", 2),
            ("a.yaml", "x: {1: a,\n  1.0: b}\n", "1.0", 2),
            ("a.yaml", "x: {=: a,\n  =: b}\n", "'='", 2),
        ],
    )
    def test_file_line_and_key(self, write, name, text, key, line):
        needs_yaml(name)
        path = write(name, text)
        assert refused(path) == f"{path}:{line}: the key {key} occurs twice"

    def test_the_same_key_in_different_dicts(self, write):
        text = '{"x": {"x": 1, "a:": "x"}, "y": [{"x": "{"}, {"x": "}"}], "z": "\\"x\\":"}'
        assert Config.fromfile(write("a.json", text)).y[1].x == "}"


class TestFileNames:
    """``{{ fileDirname }}`` and its kin are inserted as data, whatever is in the name."""

    NAMES = ("a", 'it\'s "q"', "x', y='2", 'x", "y": "2', "tab\\t", "{x} {{_base_.y}}", "# x: y", "new\nline", "12")

    @pytest.mark.parametrize("stem", NAMES)
    @pytest.mark.parametrize("suffix", [".py", ".json", ".yaml"])
    def test_in_strings_and_keys(self, write, stem, suffix, tmp_path):
        needs_yaml(suffix)
        text = {
            ".py": "a = 'w/{{ fileBasenameNoExtension }}'\nb = {'{{fileBasename}}': [r'\\{{ fileDirname }}']}\n",
            ".json": '{"a": "w/{{ fileBasenameNoExtension }}", "b": {"{{fileBasename}}": ["\\\\{{ fileDirname }}"]}}',
            ".yaml": "a: w/{{ fileBasenameNoExtension }}\nb: {'{{fileBasename}}': ['\\{{ fileDirname }}']}\n",
        }[suffix]
        cfg = Config.fromfile(write(stem + suffix, text))
        assert cfg == {"a": f"w/{stem}", "b": {stem + suffix: [f"\\{tmp_path}"]}}

    @pytest.mark.parametrize("stem", NAMES)
    def test_in_other_strings_of_python(self, write, stem):
        text = (
            "_base_ = ['{{ fileDirname }}/base.py']\n"
            "y = f'{{ fileBasenameNoExtension }} {1 + 1} {\"{{ fileExtname }}\"}' '{{ fileExtname }}'\n"
            'z = """\n{{ fileBasenameNoExtension }}"""\nw = {{ fileBasenameNoExtension }} + "!"\n'
        )
        write("base.py", "x = 1\n")
        expected = {"x": 1, "y": f"{stem} 2 .py.py", "z": f"\n{stem}", "w": f"{stem}!"}
        assert Config.fromfile(write(f"{stem}.py", text)) == expected

    @pytest.mark.parametrize(
        "code", ["x = dict({{ fileBasename }}=1)", "x = b'{{ fileBasename }}'", "{{ fileExtname }} = 1"]
    )
    def test_elsewhere_they_are_refused(self, write, code):
        assert refused(write("a.py", f"y = 1\n{code}")).endswith(
            "a.py:2: the placeholder of a file name must be in a string"
        )

    def test_what_looks_like_the_inserted_identifier_stays(self, write):
        text = "x = '_file_name_fileExtname_ {{ fileExtname }}'\n"
        assert Config.fromfile(write("a.py", text)).x == "_file_name_fileExtname_ .py"

    def test_a_key_may_not_become_another(self, write):
        path = write("a.json", '{"x": {"a.json": 1, "{{ fileBasename }}": 2}}')
        assert refused(path) == f"{path}: a.json: the key occurs twice, once as a placeholder"

    def test_paths_that_are_no_text(self, write, tmp_path):
        folder = tmp_path / os.fsdecode(b"\xff")
        folder.mkdir()
        (folder / "a.py").write_text("_base_ = '{{ fileDirname }}/b.json'\nx = '{{ fileDirname }}'\n")
        (folder / "b.json").write_text('{"y": "{{ fileDirname }}"}')
        assert Config.fromfile(folder / "a.py") == {"x": str(folder), "y": str(folder)}


class TestOptions:
    @pytest.mark.parametrize("wrap", ["{}", "[{}]", "(1,{})", "-{}"])
    def test_integers_that_are_too_long(self, wrap):
        with pytest.raises(ConfigError, match=r"^--cfg-options x=.*: Exceeds the limit .* 5000 digits") as caught:
            parse_options([f"x={wrap.format(DIGITS)}"])
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize("value", ["[" * MANY, "[" * MANY + "]" * MANY, "(" * MANY + "," + ")" * MANY])
    def test_brackets(self, value):
        with pytest.raises(ConfigError, match=r"expected at most 100 nested brackets$") as caught:
            parse_options([f"x={value}"])
        assert len(str(caught.value)) < 500

    def test_minus_signs_are_a_string(self):
        assert parse_options([f"x={'-' * MANY}"]) == {"x": "-" * MANY}

    @pytest.mark.parametrize("option", [f"x{'.a' * MANY}=1", f"x{'.a' * 60}={'[' * 60}{']' * 60}"])
    def test_keys_that_lead_too_deep(self, option):
        cfg = Config({"x": {}}, filename="c.py")
        with pytest.raises(ConfigError, match=r"^c\.py: x\.a\.[a.]+: expected a setting at most 100 levels deep$"):
            cfg.merge_from_dict(parse_options([option]))
        assert cfg == {"x": {}}


class TestCommandLine:
    """The same through the command line, in a process of its own: exit code 2 and one line."""

    @pytest.mark.parametrize("command", ["train", "plot-schedule"])
    def test_exit_code_and_one_line(self, tmp_path, command, capsys, write):
        pytest.importorskip("matplotlib", reason="plot-schedule needs matplotlib")
        os.mkfifo(tmp_path / "fifo.py")
        write("deep.py", f"x = {'-' * MANY}1\n")
        write("...py", "x = 1\n")
        write("a.py", "optim_wrapper = dict(optimizer=dict(type='SGD'))\n")
        attempts: list[list[Any]] = [
            [tmp_path / "fifo.py"],
            [tmp_path / "deep.py"],
            [tmp_path / "...py"],
            [tmp_path / "no\nsuch\x1b[31m.py"],
            [tmp_path / "a.py", "--cfg-options", f"optim_wrapper={'[' * 50_000}"],
            [tmp_path / "a.py", "--cfg-options", f"optim_wrapper.lr={DIGITS}"],
            [tmp_path / "a.py", "--cfg-options", "optim\nwrapper=3"],
            [tmp_path / "a.py", "--no\nsuch\x1b[31m"],
        ]
        for arguments in attempts:
            try:
                code = main([command, *map(str, arguments)])
            except SystemExit as exit:
                code = exit.code
            output = capsys.readouterr()
            assert code == 2 and output.out == ""
            assert output.err.startswith("fusedopt") and output.err[:-1].isprintable() and output.err[-1] == "\n"

    def test_other_errors_and_warnings_are_one_line_too(self, capsys, write, tmp_path):
        pytest.importorskip("matplotlib", reason="plot-schedule needs matplotlib")
        text = (
            "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\ntrain_cfg = dict(by_epoch=True, max_epochs=2)\n"
        )
        text += "custom_imports = dict(imports='no_such', allow_failed_imports=True)\n"
        path = write("a\x1b[31m.py", text)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert main(["plot-schedule", str(path), "-o", str(tmp_path / "a.x\ny")]) == 2
        warning, error = capsys.readouterr().err.splitlines()
        assert warning.startswith(rf"fusedopt: warning: {tmp_path}/a\x1b[31m.py: custom_imports: 'no_such' is skipped")
        assert error.startswith(rf"fusedopt: --out {tmp_path}/a.x\ny: cannot save: ")

    def test_in_a_process_of_its_own(self, tmp_path):
        os.mkfifo(tmp_path / "fifo.py")
        command = [sys.executable, "-m", "fusedopt", "train", "fifo.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        expected = "fusedopt: fifo.py: cannot read the config file: not a regular file\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)
        assert os.listdir(tmp_path) == ["fifo.py"]
