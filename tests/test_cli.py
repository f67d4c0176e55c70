"""The command line: what it prints, what it saves, and how it answers a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusedopt.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"

VALID = """
model = dict(type="DigitsResNet", channels=(4, 8))
data = dict(batch_size=128)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(VALID)
    return path


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a mistake prints to stderr, after checking that this is all that happens."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as exit:
        code = exit.code
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith("fusedopt")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    return output.err


def needs_demo_extra() -> None:
    for module in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(module, reason=f"the demonstration needs the extra fusedopt[demo]: {module} is missing")


class TestHelp:
    def test_module_without_arguments_prints_help(self):
        done = subprocess.run(
            [sys.executable, "-m", "fusedopt"], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.startswith("usage: fusedopt ")
        assert "compare" in done.stdout
        assert "info" in done.stdout

    @pytest.mark.parametrize("command", ["compare", "info"])
    def test_each_command_has_help(self, capsys, command):
        with pytest.raises(SystemExit) as exit:
            main([command, "--help"])
        assert exit.value.code == 0
        assert f"usage: fusedopt {command}" in capsys.readouterr().out


def test_info_prints_what_info_returns(capsys, monkeypatch):
    module = ModuleType("fusedopt.info")
    module.info = lambda: "all about it"  # type: ignore[attr-defined]
    module.warm_up = lambda: "how long it took"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fusedopt.info", module)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "all about it\n"
    assert main(["info", "--warmup"]) == 0
    assert capsys.readouterr().out == "all about it\n\nhow long it took\n"


def test_info_shows_the_backend_of_the_environment(monkeypatch):
    from fusedopt import info

    assert "FUSEDOPT_BACKEND" not in info.info()
    monkeypatch.setenv("FUSEDOPT_BACKEND", "triton")
    assert "triton: taken in place of 'auto'" in info.info()


def test_warm_up_tells_of_each_gpu_what_was_compiled_or_why_not(monkeypatch):
    from fusedopt import info
    from fusedopt.backends import TritonBackend, triton

    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(info, "_devices", lambda: [torch.device("cpu")])
    assert "no GPU" in info.warm_up()
    monkeypatch.setattr(info, "_devices", lambda: [torch.device("cpu"), *gpus])
    monkeypatch.setattr(
        TritonBackend, "unavailable", classmethod(lambda cls, device: "no driver" if device.index else None)
    )
    found = triton.WarmUp("adam", torch.bfloat16, 2.25, triton.Tuning(512, 4))
    monkeypatch.setattr(triton, "warm_up", lambda device: [found])
    first, second = info.warm_up().splitlines()
    assert first.startswith("warm-up of adam, bfloat16 on cuda:0  2.2 s, 512 elements and 4 warps")
    assert second.split("  ")[0] == "warm-up on cuda:1" and second.endswith("not done: no driver")


class TestCompare:
    @pytest.mark.parametrize(
        ("name", "optimizers"),
        [("digits_vit", ("AdamW", "FusedAdamW")), ("digits_resnet", ("SGD", "FusedSGD"))],
    )
    def test_shipped_configs_run_in_low_precision_and_agree(self, tmp_path, capsys, name, optimizers):
        needs_demo_extra()
        path, out = CONFIGS / f"{name}.py", tmp_path / "new" / "folder"
        assert (
            main(["compare", str(path), "--epochs", "1", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
        )
        saved = json.loads((out / "comparison.json").read_text())
        assert saved["config"] == str(path)
        assert saved["epochs"] == 1
        assert (saved["stock"]["optimizer"], saved["fused"]["optimizer"]) == optimizers
        # The mean loss of an epoch: single iterations drift apart in low precision.
        assert saved["agrees"]
        assert saved["fused"]["losses"][-1] < saved["fused"]["losses"][0] / 2
        assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
        assert "Speed-up of the optimizer" in capsys.readouterr().out

    def test_saves_under_work_dirs_by_default(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        assert main(["compare", "config.py", "--epochs", "1", "--device", "cpu", "--threads", "1"]) == 0
        saved = json.loads((tmp_path / "work_dirs" / "config" / "comparison.json").read_text())
        assert saved["config"] == "config.py"
        assert saved["environment"]["threads"] == 1

    def test_disagreeing_losses_exit_with_1(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        monkeypatch.setattr("fusedopt.demo.compare.LOSS_TOLERANCE", -1.0)
        assert (
            main(["compare", str(config), "--epochs", "1", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)])
            == 1
        )


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["comparr"], "comparr"),
            (["compare"], "CONFIG"),
            (["compare", "x.py", "--epochs", "0"], "argument --epochs: '0' is not a whole number above 0"),
            (["compare", "x.py", "--threads", "many"], "argument --threads: 'many' is not a whole number above 0"),
            (["compare", "x.py", "--device", "gpu"], "argument --device"),
        ],
    )
    def test_arguments(self, capsys, argv, message):
        error = mistake(capsys, *argv)
        assert message in error
        assert "--help" in error

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            pytest.param("model = dict()\noptim_wrapper = dict(\n", "config.py:2: syntax error", id="syntax"),
            pytest.param("model = dict()\noptim_wrapper = dict()", "no `optim_wrapper.optimizer`", id="no_optimizer"),
            pytest.param(VALID.replace("SGD", "SDG"), "did you mean 'SGD'?", id="unknown_optimizer"),
        ],
    )
    def test_config(self, config, capsys, source, message):
        needs_demo_extra()
        config.write_text(source)
        error = mistake(capsys, "compare", config)
        assert str(config) in error
        assert message in error

    def test_missing_config_leaves_nothing_behind(self, tmp_path, monkeypatch, capsys):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        assert "nowhere.py: cannot read the config file: No such file" in mistake(capsys, "compare", "nowhere.py")
        assert list(tmp_path.iterdir()) == []

    def test_out_is_a_file(self, config, capsys):
        needs_demo_extra()
        assert "not a directory" in mistake(capsys, "compare", config, "--out", config)

    def test_no_cuda(self, config, capsys, monkeypatch):
        needs_demo_extra()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "--device cuda" in mistake(capsys, "compare", config, "--device", "cuda")

    def test_debug_shows_the_traceback(self, capsys):
        needs_demo_extra()
        assert main(["compare", "nowhere.py", "--debug"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert "ConfigError: nowhere.py: cannot read the config file" in error

    @pytest.mark.parametrize(
        ("module", "distribution"), [("rich", "rich"), ("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")]
    )
    def test_missing_package_names_the_extra(self, config, capsys, monkeypatch, module, distribution):
        needs_demo_extra()
        for name in [name for name in sys.modules if name.partition(".")[0] == module]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)
        error = mistake(capsys, "compare", config)
        assert f"{distribution} is not installed; install it with: pip install 'fusedopt[demo]'" in error

    def test_a_fault_of_the_program_is_not_hidden(self, config, monkeypatch):
        needs_demo_extra()

        def fail(*args: object, **kwargs: object) -> None:
            raise RuntimeError("a fault")

        monkeypatch.setattr("fusedopt.demo.compare.compare", fail)
        with pytest.raises(RuntimeError, match="a fault"):
            main(["compare", str(config)])

    def test_interruption_is_one_line(self, config, monkeypatch, capsys):
        needs_demo_extra()

        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("fusedopt.demo.compare.compare", interrupt)
        assert main(["compare", str(config)]) == 130
        assert capsys.readouterr().err == "fusedopt: interrupted\n"
