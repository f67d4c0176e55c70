"""The command line: what it prints, what it saves, and how it answers a mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fusedopt
from examples.digits import DigitsDataset, DigitsResNet
from fusedopt.cli import main
from fusedopt.cli.main import _build_parser as build_parser
from fusedopt.training.registry import MODELS

CONFIGS = Path(__file__).parents[1] / "configs"

VALID = f"""
_base_ = "{CONFIGS}/_base_/datasets/digits.py"
model = dict(type="examples.digits.DigitsResNet", channels=(4, 8))
train_dataloader = dict(batch_size=128)
train_cfg = dict(by_epoch=True, max_epochs=3)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9))
param_scheduler = dict(type="MultiStepLR", milestones=[1, 2])
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

    @pytest.mark.parametrize("command", ["", "train", "test", "compare", "plot-schedule", "convert", "bench", "info"])
    def test_each_command_has_help_with_examples_that_parse(self, capsys, command):
        with pytest.raises(SystemExit) as exit:
            main([*command.split(), "--help"])
        assert exit.value.code == 0
        text, _, examples = capsys.readouterr().out.partition("\n\nexamples:\n")
        assert f"usage: fusedopt {command}" in text
        shown = [line.partition("fusedopt ")[2] for line in examples.splitlines()]
        assert shown and all(line.startswith(command) for line in shown)
        for line in shown:
            configs = [word for word in shlex.split(line) if word.startswith("configs/")]
            assert all((CONFIGS.parent / name).is_file() for name in configs), line
            build_parser().parse_args(shlex.split(line))

    def test_the_version(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["--version"])
        assert exit.value.code == 0
        assert capsys.readouterr().out == f"fusedopt {fusedopt.__version__}\n"


def test_info_prints_what_info_returns(capsys, monkeypatch):
    monkeypatch.setattr("fusedopt.cli.info.info", lambda: "all about it")
    monkeypatch.setattr("fusedopt.cli.info.recipes", lambda: "what it takes")
    monkeypatch.setattr("fusedopt.cli.info.warm_up", lambda: "how long it took")
    monkeypatch.setattr("fusedopt.cli.info.self_test", lambda: ("what differs", False))
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "all about it\n\nwhat it takes\n"
    assert main(["info", "--warmup"]) == 0
    assert capsys.readouterr().out == "all about it\n\nwhat it takes\n\nhow long it took\n"
    assert main(["info", "--selftest"]) == 1
    assert capsys.readouterr().out == "all about it\n\nwhat it takes\n\nwhat differs\n"
    monkeypatch.setattr("fusedopt.cli.info.self_test", lambda: ("nothing differs", True))
    assert main(["info", "--selftest"]) == 0


def test_info_shows_the_backend_of_the_environment(monkeypatch):
    from fusedopt.cli import info

    assert "FUSEDOPT_BACKEND" not in info.info()
    monkeypatch.setenv("FUSEDOPT_BACKEND", "triton")
    assert "triton: used instead of 'auto'" in info.info()


def test_warm_up_tells_of_each_gpu_what_was_compiled_or_why_not(monkeypatch):
    from fusedopt.backends import TritonBackend, triton, triton_warm_up
    from fusedopt.cli import info

    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(info, "_devices", lambda: [torch.device("cpu")])
    assert "no GPU" in info.warm_up()
    monkeypatch.setattr(info, "_devices", lambda: [torch.device("cpu"), *gpus])
    monkeypatch.setattr(
        TritonBackend, "unavailable", classmethod(lambda cls, device: "no driver" if device.index else None)
    )
    found = triton_warm_up.WarmUp("adam", torch.bfloat16, 2.25, triton.Tuning(512, 4))
    monkeypatch.setattr(triton_warm_up, "warm_up", lambda device: [found])
    first, second = info.warm_up().splitlines()
    assert first.startswith("warm-up of adam, bfloat16 on cuda:0  2.2 s, 512 elements and 4 warps")
    assert second.split("  ")[0] == "warm-up on cuda:1" and second.endswith("not done: no driver")


class TestCompare:
    @pytest.mark.parametrize(
        ("name", "optimizers"),
        [
            pytest.param("digits_vit", ("AdamW", "FusedAdamW"), marks=pytest.mark.full),
            ("digits_resnet", ("SGD", "FusedSGD")),
        ],
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
        assert saved["torch_fused"]["name"] == f"torch's fused {optimizers[0]}"
        assert saved["moved"]["losses"][-1] < saved["moved"]["losses"][0] / 2
        assert f"{optimizers[1]} is " in (text := capsys.readouterr().out)
        assert f"times as fast as torch's fused {optimizers[0]}" in " ".join(text.split())

    def test_saves_under_work_dirs_by_default(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        assert main(["compare", "config.py", "--epochs", "1", "--device", "cpu", "--threads", "1"]) == 0
        saved = json.loads((tmp_path / "work_dirs" / "config" / "comparison.json").read_text())
        assert saved["config"] == "config.py"
        assert saved["environment"]["threads"] == 1

    def test_disagreeing_losses_exit_with_1(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        monkeypatch.setattr("fusedopt.compare.comparison.LOSS_TOLERANCE", -1.0)
        assert (
            main(["compare", str(config), "--epochs", "1", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)])
            == 1
        )


class TestTrain:
    """What a config trains is tested with the configs that come with the package."""

    def test_saves_under_work_dirs_by_default(self, config, tmp_path, monkeypatch, capsys):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        assert main(["train", "config.py", "--cfg-options", "train_cfg.max_epochs=1"]) == 0
        folder = tmp_path / "work_dirs" / "config"
        assert (folder / "epoch_1.pth").is_file()
        assert "train_cfg = dict(by_epoch=True, max_epochs=1)" in (folder / "config.py").read_text()

    def test_the_work_dir_of_the_config_and_that_of_the_command_line(self, config, tmp_path):
        needs_demo_extra()
        config.write_text(VALID.replace("max_epochs=3", "max_epochs=1") + f"work_dir = '{tmp_path / 'own'}'\n")
        assert main(["train", str(config)]) == 0
        assert (tmp_path / "own" / "epoch_1.pth").is_file()
        assert main(["train", str(config), "--work-dir", str(tmp_path / "other")]) == 0
        assert (tmp_path / "other" / "epoch_1.pth").is_file()

    def test_a_work_dir_of_none_is_that_by_default(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        assert main(["train", "config.py", "--cfg-options", "train_cfg.max_epochs=1", "work_dir=None"]) == 0
        assert (tmp_path / "work_dirs" / "config" / "epoch_1.pth").is_file()

    def test_resuming_from_the_newest_forgets_load_from(self, config, tmp_path, capsys):
        needs_demo_extra()
        config.write_text(VALID.replace("max_epochs=3", "max_epochs=1") + "load_from = 'nowhere.pth'\n")
        assert main(["train", str(config), "--resume", "--work-dir", str(tmp_path / "out")]) == 0
        assert "There is no checkpoint in" in capsys.readouterr().out
        assert (tmp_path / "out" / "epoch_1.pth").is_file()

    def test_a_warning_is_one_line(self, config, tmp_path, capsys):
        needs_demo_extra()
        config.write_text(VALID.replace("max_epochs=3", "max_epochs=1") + "val_dataloder = None\n")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            shown = warnings.showwarning
            assert main(["train", str(config), "--work-dir", str(tmp_path / "out")]) == 0
            assert warnings.showwarning is shown
        assert capsys.readouterr().err == (
            "fusedopt: warning: the config has 'val_dataloder', which the Runner does not use; did you mean "
            "'val_dataloader'?\n"
        )

    def test_modules_named_on_the_command_line_register_what_the_config_names(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        (tmp_path / "registering.py").write_text(
            "from examples.digits import DigitsResNet\nfrom fusedopt.training.registry import MODELS\n"
            "MODELS.register_module(name='NetOfTheCommandLine', module=DigitsResNet)\n"
        )
        config.write_text(VALID.replace("examples.digits.DigitsResNet", "NetOfTheCommandLine").replace("=3", "=1"))
        monkeypatch.setattr(MODELS, "_modules", dict(MODELS._modules))
        monkeypatch.chdir(tmp_path)
        assert main(["train", "config.py", "--cfg-options", "custom_imports.imports=registering"]) == 0
        assert sys.modules.pop("registering")

    def test_modules_of_the_current_folder_can_be_imported(self, config, tmp_path, monkeypatch):
        needs_demo_extra()
        (tmp_path / "own_models.py").write_text("from examples.digits import DigitsResNet as OwnNet\n")
        config.write_text(VALID.replace("examples.digits.DigitsResNet", "own_models.OwnNet").replace("=3", "=1"))
        monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
        monkeypatch.chdir(tmp_path)
        assert main(["train", "config.py", "--cfg-options", "custom_imports.imports=[own_models]"]) == 0
        assert sys.modules.pop("own_models").__file__ == str(tmp_path / "own_models.py")

    @pytest.mark.slow
    def test_two_processes(self, config, tmp_path):
        needs_demo_extra()
        config.write_text(VALID.replace("channels=(4, 8)", "channels=(4, 4)"))
        command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusedopt", "train", config]
        options = ["--launcher", "pytorch", "--work-dir", tmp_path, "--cfg-options", "train_cfg.max_epochs=1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CONFIGS.parent)}
        arguments = [sys.executable, "-m", *map(str, [*command, *options])]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "Epoch(val) [1]" in done.stdout
        saved = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
        assert saved["meta"]["iter"] == 1438 // 2 // 128 and len(saved["processes"]) == 2


class TestTest:
    """``fusedopt test``."""

    @pytest.fixture
    def trained(self, config, tmp_path, capsys):
        """A checkpoint of the config's model, with weights that a test would not find by itself."""
        needs_demo_extra()
        torch.manual_seed(1)
        torch.save({"state_dict": DigitsResNet(channels=(4, 8)).state_dict()}, tmp_path / "trained.pth")
        return tmp_path / "trained.pth"

    def test_prints_the_metrics_of_the_checkpoint(self, config, trained, tmp_path, capsys):
        options = ["--work-dir", str(tmp_path / "out"), "--cfg-options", "log_level=WARNING"]
        assert main(["test", str(config), str(trained), *options, "test_dataloader.batch_size=100"]) == 0
        model = DigitsResNet(channels=(4, 8)).eval()
        model.load_state_dict(torch.load(trained)["state_dict"])
        data = DigitsDataset("val").digits
        with torch.no_grad():
            right = (model(data.images).argmax(1) == data.labels).double().mean()
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [name for name, _ in lines] == ["accuracy", "loss"]
        assert float(lines[0][1]) == pytest.approx(right.item(), abs=1e-12)

    def test_saves_under_work_dirs_by_default_and_needs_nothing_to_train_with(
        self, config, trained, tmp_path, monkeypatch
    ):
        gone = "train_dataloader = dict(dataset=dict(type='Gone'))\noptim_wrapper = dict(type='Gone')\n"
        config.write_text(VALID + gone + "load_from = 'gone.pth'\nresume = True\n")
        monkeypatch.chdir(tmp_path)
        assert main(["test", "config.py", str(trained)]) == 0
        assert next((tmp_path / "work_dirs" / "config").glob("*.log"))

    def test_weights_that_are_missing_are_a_mistake(self, config, trained, tmp_path, capsys):
        weights = torch.load(trained)["state_dict"]
        del weights["head.bias"]
        torch.save(weights, trained)
        assert main(["test", str(config), str(trained), "--work-dir", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error == f"fusedopt: {trained} does not fit the model: it lacks head.bias\n"

    def test_a_checkpoint_that_is_not_there(self, config, tmp_path, capsys):
        needs_demo_extra()
        assert main(["test", str(config), str(tmp_path / "no.pth"), "--work-dir", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"fusedopt: {tmp_path / 'no.pth'}: there is no such checkpoint\n"

    def test_mistakes(self, config, tmp_path, capsys, monkeypatch):
        needs_demo_extra()
        monkeypatch.delenv("RANK", raising=False)
        assert "CHECKPOINT" in mistake(capsys, "test", config)
        error = mistake(capsys, "test", config, "a.pth", "--launcher", "pytorch")
        assert f"fusedopt test {config} a.pth --launcher pytorch" in error
        work_dir = ("--work-dir", tmp_path / "out")
        for option, message in (
            ("test_dataloader=None", f"{config}: there is nothing to test: set test_dataloader"),
            ("test_evaluator.type=Gone", "test_evaluator.type: 'Gone' is not in the metric registry"),
            ("test_cfg=None", "test_cfg"),
        ):
            assert message in mistake(capsys, "test", config, "a.pth", *work_dir, "--cfg-options", option)


class TestPlotSchedule:
    def test_saves_a_picture(self, config, tmp_path, capsys):
        needs_demo_extra()
        picture = tmp_path / "new" / "curve.png"
        assert main(["plot-schedule", str(config), "-o", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert capsys.readouterr().out == f"Saved {picture}: 3 epochs, schedulers: 1\n"

    @pytest.mark.parametrize(
        ("options", "iterations"), [([], 3 * (1438 // 128)), (["--epoch-length", "50", "--log"], 150)]
    )
    def test_counts_the_iterations_of_the_data_or_those_given(self, config, tmp_path, capsys, options, iterations):
        needs_demo_extra()
        path = tmp_path / "curve.svg"
        change = ["--cfg-options", "param_scheduler.by_epoch=False"]
        assert main(["plot-schedule", str(config), "--out", str(path), *options, *change]) == 0
        assert f"{iterations} iterations" in capsys.readouterr().out
        assert "<svg" in path.read_text()

    def test_data_that_are_not_there_are_not_needed(self, config, tmp_path, capsys):
        needs_demo_extra()
        config.write_text(VALID + "train_dataloader = dict(dataset=dict(val_fraction=2))\n")
        arguments = ["plot-schedule", config, "-o", tmp_path / "curve.png"]
        assert main([*map(str, arguments)]) == 0
        capsys.readouterr()
        by_iteration = ["--cfg-options", "param_scheduler.by_epoch=False"]
        assert "--epoch-length" in mistake(capsys, *arguments, *by_iteration)

    @pytest.mark.filterwarnings("ignore:model 'ResNet' is not registered")
    def test_a_config_of_another_package(self, config, tmp_path, capsys):
        """Its model, data, metrics and hooks are not registered here."""
        needs_demo_extra()
        config.write_text(
            "model = dict(type='ResNet', depth=50)\n"
            "train_dataloader = dict(batch_size=32, dataset=dict(type='ImageNet'))\n"
            "val_evaluator = dict(type='Accuracy')\ncustom_hooks = [dict(type='PreciseBN')]\n"
            "train_cfg = dict(by_epoch=True, max_epochs=4)\noptim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n"
            "param_scheduler = dict(type='CosineAnnealingLR', convert_to_iter_based=True)\n"
        )
        arguments = ["plot-schedule", str(config), "-o", str(tmp_path / "curve.png")]
        assert "epoch_length, the number of iterations in an epoch: give --epoch-length" in mistake(capsys, *arguments)
        assert main([*arguments, "--epoch-length", "10"]) == 0
        assert "40 iterations, schedulers: 1" in capsys.readouterr().out
        unknown = ["--cfg-options", "optim_wrapper.optimizer.type=SDG"]
        assert "optim_wrapper.optimizer.type: 'SDG'" in mistake(capsys, *arguments, *unknown)

    def test_a_name_without_a_suffix_gets_one(self, config, tmp_path, capsys):
        needs_demo_extra()
        assert main(["plot-schedule", str(config), "-o", str(tmp_path / "curve")]) == 0
        assert capsys.readouterr().out.startswith(f"Saved {tmp_path / 'curve.png'}: ")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    def test_a_format_that_there_is_not(self, config, tmp_path, capsys):
        needs_demo_extra()
        assert "Format 'xyz' is not supported" in mistake(capsys, "plot-schedule", config, "-o", tmp_path / "curve.xyz")


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["comparr"], "comparr"),
            (["compare"], "CONFIG"),
            (["compare", "x.py", "--epochs", "0"], "argument --epochs: '0' is not a whole number above 0"),
            (["compare", "x.py", "--threads", "many"], "argument --threads: 'many' is not a whole number above 0"),
            (["compare", "x.py", "--device", "gpu"], "argument --device"),
            (["train"], "CONFIG"),
            (["train", "x.py", "--launcher", "slurm"], "argument --launcher"),
            (["plot-schedule", "x.py", "--epoch-length", "0"], "'0' is not a whole number above 0"),
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
            pytest.param(
                "model = dict()\noptim_wrapper = dict()", "optim_wrapper.optimizer must be a dict", id="no_optimizer"
            ),
            pytest.param("_base_ = 'gone.py'", "config.py: _base_: cannot read", id="no_base"),
            pytest.param("_base_ = 'config.py'", "config.py: _base_: the file inherits from itself", id="cycle"),
            pytest.param(VALID.replace("SGD", "SDG"), "did you mean 'SGD'?", id="unknown_optimizer"),
        ],
    )
    def test_config(self, config, capsys, source, message):
        needs_demo_extra()
        config.write_text(source)
        error = mistake(capsys, "compare", config)
        assert str(config) in error
        assert message in error

    @pytest.mark.parametrize("command", ["train", "test", "compare", "plot-schedule"])
    def test_missing_config_leaves_nothing_behind(self, tmp_path, monkeypatch, capsys, command):
        needs_demo_extra()
        monkeypatch.chdir(tmp_path)
        arguments = ["nowhere.py", "nowhere.pth"][: 2 if command == "test" else 1]
        assert "nowhere.py: cannot read the config file: No such file" in mistake(capsys, command, *arguments)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            (
                "optim_wrapper.optimizer.type=SDG",
                "optim_wrapper.optimizer.type: 'SDG' is not in the optimizer registry",
            ),
            ("optim_wrapper.optimizer.momentun=1", "optim_wrapper.optimizer.momentun: SGD takes no such argument; did"),
            ("optim_wrapper.optimizer.lr=-1", "optim_wrapper: Invalid learning rate: -1"),
            (
                "optim_wrapper.accumulate=2",
                "optim_wrapper: unknown key 'accumulate'; did you mean 'accumulative_counts'",
            ),
            ("optim_wrapper.optimizer.lr.x=1", "optim_wrapper.optimizer.lr: a dict cannot be merged into 0.1"),
            ("param_scheduler.type=MultiStep", "param_scheduler.type: 'MultiStep' is not in the parameter scheduler"),
            ("param_scheduler.milestone=3", "param_scheduler.milestone: MultiStepLR takes no such argument; did you"),
            ("param_scheduler.milestones=x", "param_scheduler: "),
            ("train_dataloader.dataset.split=test", "train_dataloader: Invalid split: 'test'"),
            ("train_dataloader.dataset.size=3", "train_dataloader.dataset.size: DigitsDataset takes no such argument"),
            ("train_cfg.max_epoch=3", "train_cfg"),
            ("default_hooks.logger.type=Loger", "default_hooks.logger.type: 'Loger' is not in the hook registry"),
            ("model.channels=(4,-1)", "model: "),
            ("train_dataloader.dataset.seed=x", "train_dataloader: "),
            ("load_from=3", "load_from must be a path or None, got 3"),
            ("cfg=3", "--cfg-options cfg: there is no such setting"),
            ("mdoel.channels=3", "--cfg-options mdoel.channels: there is no such setting; did you mean 'model'?"),
            ("model.channels", "--cfg-options model.channels: expected KEY=VALUE"),
        ],
    )
    def test_option(self, config, capsys, tmp_path, option, message):
        needs_demo_extra()
        error = mistake(capsys, "train", config, "--work-dir", tmp_path / "out", "--cfg-options", option)
        assert message in error
        assert not (tmp_path / "out").exists()
        assert message.startswith("--cfg-options") or error.startswith(f"fusedopt: {config}: ")

    def test_nothing_to_train(self, config, capsys, tmp_path):
        needs_demo_extra()
        config.write_text("model = dict(type='examples.digits.DigitsViT')\n")
        assert "there is nothing to train" in mistake(capsys, "train", config, "--work-dir", tmp_path)

    def test_mixed_precision_of_another_wrapper(self, config, capsys, tmp_path):
        needs_demo_extra()
        config.write_text("optim_wrapper = dict(type='fusedopt.OptimWrapperDict', optimizer=dict())\n")
        message = f"{config}: optim_wrapper: mixed precision can be switched on for an OptimWrapper"
        assert message in mistake(capsys, "train", config, "--amp", "--work-dir", tmp_path)

    @pytest.mark.parametrize(
        ("folder", "message"), [("config.py", "work_dir: .*exists"), ("", "work_dir must be a path")]
    )
    def test_a_work_dir_that_cannot_be(self, config, capsys, monkeypatch, folder, message):
        needs_demo_extra()
        monkeypatch.chdir(config.parent)
        assert re.search(message, mistake(capsys, "train", config, "--work-dir", folder))
        assert list(config.parent.iterdir()) == [config]

    def test_checkpoints(self, config, capsys, tmp_path):
        needs_demo_extra()
        for name, text, message in (
            ("nowhere.pth", None, "there is no such checkpoint"),
            ("text.pth", "no checkpoint", "neither a file of torch.save nor of safetensors"),
        ):
            path = tmp_path / name
            if text is not None:
                path.write_text(text)
            assert main(["train", str(config), "--work-dir", str(tmp_path / "out"), "--resume", str(path)]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"fusedopt: {path}: ") and message in error and error.count("\n") == 1

    def test_processes_without_torchrun(self, config, capsys, monkeypatch):
        monkeypatch.delenv("RANK", raising=False)
        assert "torchrun --nproc-per-node 2" in mistake(capsys, "train", config, "--launcher", "pytorch")

    def test_out_is_a_file(self, config, capsys, monkeypatch):
        needs_demo_extra()
        trained = []
        monkeypatch.setattr("fusedopt.compare.compare.compare", trained.append)
        assert f"--out {config}: cannot make the folder: File" in mistake(capsys, "compare", config, "--out", config)
        assert not trained

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

        monkeypatch.setattr("fusedopt.compare.compare.compare", fail)
        with pytest.raises(RuntimeError, match="a fault"):
            main(["compare", str(config)])

    def test_interruption_is_one_line(self, config, monkeypatch, capsys):
        needs_demo_extra()

        def interrupt(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("fusedopt.compare.compare.compare", interrupt)
        assert main(["compare", str(config)]) == 130
        assert capsys.readouterr().err == "fusedopt: interrupted\n"


@pytest.mark.slow
@pytest.mark.full
def test_the_commands_in_the_docs_run(tmp_path, monkeypatch, capsys):
    """Those of docs/engine.md, in their order, in two epochs or fewer; what is printed is what the page shows."""
    needs_demo_extra()
    text = (CONFIGS.parent / "docs" / "engine.md").read_text().partition("## On the command line")[2]
    commands, shown = (re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("bash", "console"))
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    for line in commands.splitlines():
        shorter = (
            line.replace("max_epochs=5", "max_epochs=1")
            .replace("epoch_5", "epoch_2")
            .replace("--epochs 2", "--epochs 1 --threads 1")
        )
        if line.endswith("--resume"):
            shorter += " --cfg-options train_cfg.max_epochs=2"
        assert main(shlex.split(shorter)[1:]) == 0, line
    assert (tmp_path / "runs" / "first" / "epoch_2.pth").is_file() and (tmp_path / "curve.png").is_file()
    capsys.readouterr()
    command, answer = shown.splitlines()
    assert mistake(capsys, *shlex.split(command)[2:]) == f"{answer}\n"
