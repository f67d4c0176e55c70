"""The configs that come with the package: what they build, that they train, and the same under MMEngine's Runner."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedopt import FusedAdam, FusedAdamW, FusedSGD, OptimWrapperDict
from fusedopt.cli import main
from fusedopt.training.engine import Config, Runner
from fusedopt.training.engine.validation import check_names
from fusedopt.training.schedulers import simulate_schedule

with contextlib.suppress(ImportError), warnings.catch_warnings():
    # Where another test has loaded a part of MMEngine, configs load the rest. What it warns of then is not ours.
    warnings.simplefilter("ignore")
    import mmengine.runner  # noqa: F401

pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fusedopt[demo]'")

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CLASSIFIERS = ["digits_resnet_step", "digits_resnet_cosine", "digits_vit_layer_decay"]
ZOO = [*CLASSIFIERS, "gan_digits"]
EPOCHS = 3
EPOCH_LENGTH = 1438 // 32


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operations, and other tests at the same time: threads that wait for each other would only be slower."""
    torch.set_num_threads(1)


def load(name: str, kind: Any = Config, epochs: int | None = None) -> Any:
    config = kind.fromfile(CONFIGS / f"{name}.py")
    if epochs is not None:
        config.train_cfg.max_epochs = epochs
    return config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_names_only_what_there_is_and_survives_a_dump(path, tmp_path):
    config = Config.fromfile(path)
    check_names(config)
    config.dump(tmp_path / "dumped.py")
    assert Config.fromfile(tmp_path / "dumped.py") == config


class TestSchedules:
    """What the configs are there to show."""

    def rates(self, name: str) -> list[torch.Tensor]:
        return [curve.values for curve in simulate_schedule(load(name), epoch_length=EPOCH_LENGTH).curves]

    def test_step(self):
        (rates,) = (values for values in self.rates("digits_resnet_step") if values[0] == 0.1)
        assert rates.tolist() == pytest.approx([0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001])

    def test_cosine_after_a_warm_up_by_iteration(self):
        (rates,) = (values for values in self.rates("digits_resnet_cosine") if values.max() > 0.1)
        warm_up = 2 * EPOCH_LENGTH
        assert rates[0] == pytest.approx(0.02) and rates[warm_up] == pytest.approx(0.2)
        assert (rates[:warm_up].diff() > 0).all()
        per_epoch = rates[warm_up:].view(8, EPOCH_LENGTH)
        assert (per_epoch == per_epoch[:, :1]).all() and (per_epoch[:, 0].diff() < 0).all()

    def test_layer_decay(self, tmp_path):
        config = load("digits_vit_layer_decay")
        config.work_dir = str(tmp_path)
        wrapper = Runner.from_cfg(config).optim_wrapper
        scales = {group["param_name"]: group["lr_scale"] for group in wrapper.optimizer.param_groups}
        assert scales["pos_embed"] == scales["patch_embed.weight"] == pytest.approx(0.65**5)
        assert scales["layers.0.norm1.weight"] == pytest.approx(0.65**4)
        assert scales["head.weight"] == scales["norm.bias"] == 1
        decays = {group["param_name"]: group["weight_decay"] for group in wrapper.optimizer.param_groups}
        assert {name.rpartition(".")[2] for name, decay in decays.items() if decay} == {"weight"}
        assert not any("norm" in name for name, decay in decays.items() if decay)

    def test_optimizers(self, tmp_path):
        expected = [FusedSGD, FusedSGD, FusedAdamW, OptimWrapperDict]
        for name, kind in zip(ZOO, expected, strict=True):
            config = load(name)
            config.work_dir = str(tmp_path)
            wrapper = Runner.from_cfg(config).optim_wrapper
            assert type(getattr(wrapper, "optimizer", wrapper) if kind is not OptimWrapperDict else wrapper) is kind
        assert {type(each.optimizer) for each in wrapper.values()} == {FusedAdam}


class TestTraining:
    def train(self, name: str, folder: Path, *options: str) -> list[dict[str, float]]:
        """Train on the command line; returns the logged scalars."""
        arguments = ["train", str(CONFIGS / f"{name}.py"), "--work-dir", str(folder)]
        assert main([*arguments, *(["--cfg-options", *options] if options else [])]) == 0
        lines = (folder / "vis_data" / "scalars.json").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_a_few_epochs(self, name, tmp_path):
        scalars = self.train(name, tmp_path, f"train_cfg.max_epochs={EPOCHS}", "default_hooks.logger.interval=22")
        losses = [line["loss"] for line in scalars if "lr" in line]
        assert len(losses) == 2 * EPOCHS and losses[-1] < losses[0] / 4
        assert scalars[-1]["accuracy"] > 0.9
        assert (tmp_path / f"epoch_{EPOCHS}.pth").is_file()

    @pytest.mark.slow
    @pytest.mark.full
    @pytest.mark.parametrize("name", CLASSIFIERS)
    def test_to_the_end(self, name, tmp_path):
        assert self.train(name, tmp_path)[-1]["accuracy"] > 0.97

    def test_the_gan(self, tmp_path):
        self.train("gan_digits", tmp_path, "train_cfg.max_epochs=2", "default_hooks.checkpoint.interval=2")
        checkpoint = torch.load(tmp_path / "epoch_2.pth", weights_only=True)
        steps = {
            name: {int(state["step"]) for state in saved["state"].values()}
            for name, saved in checkpoint["optimizer"].items()
        }
        assert steps == {"discriminator": {89}, "generator": {44}}

    def test_amp_and_resuming(self, tmp_path, capsys):
        options = ("default_hooks.logger.interval=44", "model.channels=(4,8)")
        arguments = ["train", str(CONFIGS / "digits_resnet_cosine.py"), "--work-dir", str(tmp_path), "--amp"]
        dtype = "optim_wrapper.dtype=bfloat16"
        assert main([*arguments, "--cfg-options", "train_cfg.max_epochs=3", dtype, *options]) == 0
        saved = torch.load(tmp_path / "epoch_3.pth", weights_only=True)
        assert "loss_scaler" in saved["optimizer"] and saved["meta"]["iter"] == 3 * EPOCH_LENGTH
        capsys.readouterr()
        assert main([*arguments, "--resume", "--cfg-options", "train_cfg.max_epochs=4", dtype, *options]) == 0
        output = capsys.readouterr().out
        assert "3 epochs and 132 iterations are done" in output
        assert "Epoch(train) [4]" in output and "Epoch(train) [3]" not in output
        third = str(tmp_path / "epoch_3.pth")
        assert main([*arguments, "--resume", third, "--cfg-options", "train_cfg.max_epochs=4", dtype, *options]) == 0
        assert "epoch_3.pth: 3 epochs" in capsys.readouterr().out


class TestUnderMMEngine:
    """The same files, read by MMEngine's Config and trained by its Runner, give the same training."""

    pytestmark = pytest.mark.filterwarnings("ignore")  # MMEngine's Runner uses what torch deprecated

    numbers = itertools.count()

    @pytest.fixture(autouse=True)
    def mmengine(self, monkeypatch):
        pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
        from mmengine import registry
        from torch.optim import optimizer

        from fusedopt import integrations
        from fusedopt.integrations import mmengine_log

        monkeypatch.setattr(optimizer, "_global_optimizer_pre_hooks", collections.OrderedDict())
        monkeypatch.setattr(mmengine_log, "_watching", False)
        for name in ("OPTIMIZERS", "OPTIM_WRAPPERS", "OPTIM_WRAPPER_CONSTRUCTORS"):
            each = getattr(registry, name)
            monkeypatch.setattr(each, "_module_dict", dict(each._module_dict))
        # Imported anew by the config, as in a new process.
        for name in ("current", "mmengine"):
            monkeypatch.delattr(integrations, name, raising=False)
        for name in [name for name in sys.modules if name.startswith(integrations.__name__ + ".")]:
            monkeypatch.delitem(sys.modules, name)

    @pytest.mark.parametrize("name", ZOO)
    def test_both_runners_train_alike(self, name, tmp_path):
        from mmengine.config import Config as TheirConfig
        from mmengine.runner import Runner as TheirRunner

        theirs, ours = load(name, TheirConfig, EPOCHS), load(name, Config, EPOCHS)
        theirs.experiment_name = f"zoo_{next(self.numbers)}"
        runners = []
        for config, kind in ((theirs, TheirRunner), (ours, Runner)):
            config.work_dir = str(tmp_path / kind.__module__)
            runners.append(kind.from_cfg(config))
            runners[-1].train()
        their, our = ({name: value.double() for name, value in each.model.state_dict().items()} for each in runners)
        assert their.keys() == our.keys()
        for key, value in their.items():
            if key.endswith("qkv.bias"):
                continue  # a key's bias changes nothing: its gradient is rounding, which AdamW makes steps of
            torch.testing.assert_close(
                our[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
            )
        if name in CLASSIFIERS:
            accuracies = [each.message_hub.get_scalar("val/accuracy").current() for each in runners]
            assert accuracies[0] == accuracies[1] > 0.9
