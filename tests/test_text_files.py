"""Text files and file names: UTF-8 whatever the locale, and paths that are no text."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_cases import config, scalars, train

import fusedopt
from fusedopt.messages import encodable, one_line
from fusedopt.training.config import Config, ConfigError
from fusedopt.training.engine import CheckpointError
from fusedopt.training.engine.checkpoint import find_latest_checkpoint
from fusedopt.training.engine.hooks.logger import _ProgressBar
from fusedopt.training.engine.log import build_logger
from fusedopt.training.files import replace_file, utf8_name

TESTS = Path(__file__).parent
ROOT = Path(fusedopt.__file__).resolve().parent

#: No locale but ASCII, and none of what Python does about it.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}

#: A folder name that is no text in any locale.
BYTES = os.fsdecode(b"caf\xe9")


def run(*arguments: str | bytes | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(TESTS)]), **env}
    command = [sys.executable, "-m", "fusedopt", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=120
    )


def text_mode_without_encoding(call: ast.Call) -> bool:
    """Whether a call opens a file or a pipe as text, in the locale's encoding."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in ("read_text", "write_text"):
        return True
    if name in ("run", "Popen", "check_output"):
        return any(getattr(given.get(key), "value", False) for key in ("text", "universal_newlines"))
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os" and name == "open":
            return False
        modes = [node.value for node in (*call.args, *given.values()) if isinstance(node, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        return not binary and (bool(modes) or name in ("open", "fdopen"))
    return False


class TestEncoding:
    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("open(path)", True),
            ("open(path, 'w')", True),
            ("path.open('a')", True),
            ("path.read_text()", True),
            ("path.write_text(x)", True),
            ("subprocess.run(x, text=True)", True),
            ("open(path, 'rb')", False),
            ("path.open(mode='wb')", False),
            ("path.read_text(encoding='utf-8')", False),
            ("os.open(path, flags)", False),
            ("tempfile.NamedTemporaryFile()", False),
            ("tempfile.NamedTemporaryFile('w')", True),
            ("subprocess.run(x)", False),
        ],
    )
    def test_what_is_looked_for(self, source, expected):
        call = ast.parse(source, mode="eval").body
        assert isinstance(call, ast.Call) and text_mode_without_encoding(call) is expected

    @pytest.mark.parametrize("folder", ["fusedopt", "benchmarks"])
    def test_every_text_file_names_its_encoding(self, folder):
        if not (ROOT.parent / folder).exists():
            pytest.skip("not in a source tree")
        for path in (ROOT.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    assert not text_mode_without_encoding(node), f"{path}:{node.lineno}: name the encoding"


class TestText:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("größe 😀, 'it' \\ x", "größe 😀, 'it' \\ x"),
            ("a\nb\r\tc", r"a\nb\r\tc"),
            ("\x1b[31m\0\x85\u2028\u202e", r"\x1b[31m\x00\x85\u2028\u202e"),
            ("\udcff\ufeff", r"\udcff\ufeff"),
        ],
    )
    def test_one_line(self, text, expected):
        assert one_line(text) == expected == one_line(expected)
        assert str(ConfigError(text)) == expected

    def test_the_stream_says_what_can_be_shown(self):
        assert encodable("aü\udcff", io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == "a\\xfc\\udcff"
        assert encodable("aü\udcff", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "aü\\udcff"
        assert encodable("aü", object()) == "aü"


class TestNames:
    def test_names_are_utf8_in_an_ascii_locale(self, monkeypatch):
        assert utf8_name("größe") == "größe" and utf8_name(BYTES) == BYTES and utf8_name("\ud800") == "\ud800"
        monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
        assert utf8_name("ü") == "\udcc3\udcbc" == utf8_name("\udcc3\udcbc")

    def test_configs_are_read_and_written_under_them(self, tmp_path):
        code = (
            "from fusedopt.training.config import Config\n"
            "Config({'a': '\\xfc'}).dump('\\xfc.py')\n"
            "assert Config.fromfile('\\xfc.py') == {'a': '\\xfc'}"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **ASCII}, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "ü.py").read_bytes() == "a = 'ü'\n".encode()


class TestReplacingAFile:
    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "link").symlink_to("file")
        replace_file(tmp_path / "link", lambda file: file.write(b"after"))
        assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"after"

    def test_a_failure_leaves_the_file_and_nothing_else(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("before")

        def fail(*paths: Path) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            replace_file(tmp_path / "file", lambda file: file.write(b"after"))
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


class TestLog:
    def test_the_terminal_gets_escapes_and_the_file_utf8(self, tmp_path, monkeypatch, capfd):
        monkeypatch.setattr(logging, "raiseExceptions", True)
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        build_logger(str(tmp_path / BYTES), "log", "INFO").info("größe \udcff")
        assert stream.buffer.getvalue().endswith(b"INFO gr\\xf6\\xdfe \\udcff\n")
        text = (tmp_path / BYTES / "log.log").read_bytes()
        assert text.endswith("INFO größe \\udcff\n".encode())
        assert capfd.readouterr().err == ""


def test_the_progress_bar_gets_escapes(monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    bar = _ProgressBar()
    bar.begin("train", 2, 0)
    bar.tell("train", "précision: 1")
    bar.close()
    assert b"pr\\xe9cision: 1" in stream.buffer.getvalue()


OWN = """
import time
from engine_cases import HOOKS, METRICS, Hook, HitRate

@METRICS.register_module()
class Precision(HitRate):
    def compute_metrics(self, results):
        return {"précision": time.time()}  # which grows

@HOOKS.register_module()
class Speaking(Hook):
    def before_train(self, runner):
        runner.logger.info("größe 😀 \\udcff")
        runner.visualizer.add_image("größe", __import__("torch").zeros(2, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("locale", "experiment_name"),
    [
        pytest.param(ASCII, "naïve 😀", id="named"),
        pytest.param(ASCII, None, id="ascii", marks=pytest.mark.full),
        pytest.param({}, None, id="usual"),
    ],
)
def test_a_run_logs_and_resumes(tmp_path, locale, experiment_name):
    pytest.importorskip("matplotlib")
    folder = tmp_path / BYTES
    folder.mkdir()
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    cfg = config("{{ fileDirname }}/aus gabe ü", log_level="INFO", experiment_name=experiment_name)
    cfg["custom_imports"] = dict(imports=["own"])
    cfg["param_scheduler"] = None
    cfg["val_evaluator"] = dict(type="Precision")
    cfg["default_hooks"]["checkpoint"] = dict(
        type="CheckpointHook", filename_tmpl="é{}.pth", max_keep_ckpts=1, save_best="précision", rule="greater"
    )
    cfg["custom_hooks"] = [dict(type="Speaking")]
    (folder / "basis ü.json").write_text(json.dumps(cfg), encoding="utf-8")
    (folder / "größe.py").write_text("_base_ = 'basis ü.json'\n", encoding="utf-8")
    first = run("train", "größe.py", "--cfg-options", "train_cfg.max_epochs=1", cwd=folder, **locale)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    out = folder / "aus gabe ü"
    assert (out / "last_checkpoint").read_bytes() == os.fsencode(folder) + "/aus gabe ü/é1.pth".encode()
    assert {path.name for path in out.glob("*.pth")} == {"é1.pth", "best_précision_é1.pth"}
    assert (out / "vis_data/vis_image/größe_0.png").is_file()
    second = run("train", "größe.py", "--resume", "--cfg-options", "train_cfg.max_epochs=2", cwd=folder, **locale)
    assert second.returncode == 0 and second.stderr == "", second.stderr
    assert {path.name for path in out.glob("*.pth")} == {"é2.pth", "best_précision_é2.pth"}
    logs = "".join(path.read_text(encoding="utf-8") for path in out.glob("*.log"))
    assert "größe 😀 \\udcff" in logs and "précision: " in logs and "1 epochs and 5 iterations are done" in logs
    assert any("précision" in line for line in scalars(out))
    assert Config.fromfile(out / "größe.py", import_custom_modules=False).work_dir == f"{folder}/aus gabe ü"
    assert find_latest_checkpoint(out) == out / "é2.pth"


def test_a_last_checkpoint_that_is_no_text(tmp_path):
    for content in (b"\xff\0\x1b\n\xfe", b"\xff" * 5000):
        (tmp_path / "last_checkpoint").write_bytes(content)
        with pytest.raises(CheckpointError, match="does not exist"):
            find_latest_checkpoint(tmp_path)
    (tmp_path / os.fsdecode(b"\xff.pth")).touch()
    (tmp_path / "last_checkpoint").write_bytes(b"\xff.pth\n")
    assert find_latest_checkpoint(tmp_path) == tmp_path / os.fsdecode(b"\xff.pth")


def test_a_checkpoint_elsewhere_under_a_name_that_is_no_text(tmp_path):
    cfg = config(tmp_path / "work" / BYTES, validates=False)
    cfg["default_hooks"]["checkpoint"] = dict(type="CheckpointHook", out_dir=str(tmp_path / "elsewhere" / BYTES))
    train(cfg)
    newest = find_latest_checkpoint(tmp_path / "work" / BYTES)
    assert newest == tmp_path / "elsewhere" / BYTES / BYTES / "epoch_4.pth"


def test_pictures_and_reports_of_a_config_whose_name_is_no_text(tmp_path):
    pytest.importorskip("matplotlib")
    name = os.fsdecode(b"a\xff\n.json")
    cfg = config(tmp_path)
    (tmp_path / name).write_text(json.dumps(cfg), encoding="utf-8")
    picture = os.fsdecode(b"\xff.png")
    arguments = ["plot-schedule", name, "-o", picture, "--cfg-options", "custom_imports.imports=engine_cases"]
    for locale in (ASCII, {}):
        done = run(*arguments, cwd=tmp_path, **locale)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "Saved \\udcff.png: 20 iterations, schedulers: 2\n" and (tmp_path / picture).is_file()
        (tmp_path / picture).unlink()
