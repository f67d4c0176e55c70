"""The demonstration: configs, data, models, and the comparison of the stock and the fused training."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import statistics
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from fusedopt.optimizers import FUSED_TWINS
from fusedopt.training.builder import build_optim_wrapper
from fusedopt.training.registry import MODELS

pytest.importorskip("sklearn", reason="the demonstration needs the extra fusedopt[demo]: scikit-learn is missing")
pytest.importorskip("matplotlib", reason="the demonstration needs the extra fusedopt[demo]: matplotlib is missing")
pytest.importorskip("rich", reason="the demonstration needs the extra fusedopt[demo]: rich is missing")

from rich.console import Console

from examples.digits import DigitsResNet
from examples.digits.data import DigitsDataset, load_digits
from fusedopt.bench import memory
from fusedopt.bench.memory import PeakMemory
from fusedopt.compare.compare import LOSS_TOLERANCE, Comparison, Run, compare
from fusedopt.compare.report import print_comparison, save_figure, save_json, show_progress
from fusedopt.training.config import Config, ConfigError
from fusedopt.training.engine import Hook

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [FOLDER / "digits_resnet.py", FOLDER / "digits_vit.py"]

# In float32 the two trainings differ by the order of operations alone; 22 steps make 1e-6 of that.
FLOAT32_LOSS_TOLERANCE = 1e-5
# Rates at which the small model learns something in these steps.
LEARNING_RATES = {"SGD": 0.1, "Adam": 2e-3, "AdamW": 2e-3}

SMALL = """
_base_ = "{folder}/_base_/datasets/digits.py"
model = dict(type="examples.digits.DigitsViT", embed_dims=32, num_layers=2, num_heads=2, patch_size=4, dropout=0.1)
train_dataloader = dict(batch_size=64)
train_cfg = dict(by_epoch=True, max_epochs=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=5),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=5)]
optim_wrapper = dict({wrapper}, paramwise_cfg=dict(bias_lr_mult=2.0))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operations, and other tests at the same time: threads that wait for each other would only be slower."""
    torch.set_num_threads(1)


@pytest.fixture
def small_config(tmp_path: Path):
    """Writes a config of a small model with the given arguments of the wrapper and lines; returns the config."""

    def write(wrapper: str, more: str = "") -> Config:
        path = tmp_path / "small.py"
        path.write_text(SMALL.format(folder=FOLDER, wrapper=wrapper) + more)
        return Config.fromfile(path)

    return write


def make_comparison(stock_losses: list[float], fused_losses: list[float], epochs: int = 2) -> Comparison:
    steps = len(stock_losses)
    stock = Run(
        "AdamW", "torch", 3, stock_losses, ([9.0] * 5 + [4.0] * steps)[:steps], [20.0] * steps, None, {"loss": 0.5}
    )
    fused = dataclasses.replace(stock, optimizer="FusedAdamW", losses=fused_losses, optimizer_ms=[2.0] * steps)
    environment = {"device": "cpu", "threads": 2, "cpu_capability": "any", "torch": "any", "fusedopt": "any"}
    return Comparison("configs/some.py", epochs, 0, environment, stock, fused)


def printed(comparison: Comparison) -> str:
    stream = io.StringIO()
    print_comparison(comparison, Console(file=stream, width=120))
    return " ".join(stream.getvalue().split())


class TestShippedConfigs:
    @pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
    def test_shipped_configs_make_a_group_for_each_parameter(self, path):
        config = Config.fromfile(path)
        model = MODELS.build(config["model"])
        wrapper = build_optim_wrapper(model, config["optim_wrapper"])
        assert [len(group["params"]) for group in wrapper.optimizer.param_groups] == [1] * len(list(model.parameters()))
        names = {id(param): name for name, param in model.named_parameters()}
        decayed = {
            names[id(group["params"][0])] for group in wrapper.optimizer.param_groups if group["weight_decay"] > 0
        }
        weights = (nn.Linear, nn.Conv2d)
        assert decayed == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, weights)}

    def test_vit_learns_more_slowly_towards_the_input(self):
        config = Config.fromfile(next(path for path in CONFIGS if path.stem == "digits_vit"))
        model = MODELS.build(config["model"])
        wrapper = build_optim_wrapper(model, config["optim_wrapper"])
        rates = {id(group["params"][0]): group["lr"] for group in wrapper.optimizer.param_groups}
        layers = [{rates[id(param)] for param in layer.parameters()} for layer in model.layers]
        assert all(len(layer) == 1 for layer in layers)
        ordered = [rates[id(model.pos_embed)], *(layer.pop() for layer in layers), rates[id(model.head.weight)]]
        assert ordered == sorted(ordered)
        assert len(set(ordered)) == len(ordered)


class TestData:
    def test_split_is_complete_disjoint_and_fixed_by_the_seed(self):
        train, val = load_digits(val_fraction=0.25, seed=3)
        assert len(train.labels) + len(val.labels) == 1797
        assert len(val.labels) == 449
        assert train.images.shape == (1348, 1, 8, 8)
        assert train.images.dtype == torch.float32
        assert (train.images.min(), train.images.max()) == (-1, 1)
        again, other = load_digits(val_fraction=0.25, seed=3)[0], load_digits(val_fraction=0.25, seed=4)[0]
        assert torch.equal(train.images, again.images)
        assert not torch.equal(train.images, other.images)

    @pytest.mark.parametrize("val_fraction", [0, 1, -0.5, math.nan])
    def test_refuses_a_split_without_two_parts(self, val_fraction):
        with pytest.raises(ValueError, match="Invalid val_fraction"):
            load_digits(val_fraction=val_fraction)

    def test_a_data_set_is_one_of_the_splits(self):
        train, val = DigitsDataset("train", val_fraction=0.25, seed=3), DigitsDataset("val", val_fraction=0.25, seed=3)
        assert (len(train), len(val)) == (1348, 449)
        image, label = (split[5] for split in load_digits(val_fraction=0.25, seed=3)[1])
        assert torch.equal(val[5]["inputs"], image) and val[5]["labels"] == label
        assert train.metainfo["classes"][label] == str(label.item())
        with pytest.raises(ValueError, match="Invalid split: 'test'; expected 'train' or 'val'"):
            DigitsDataset("test")


class TestModels:
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param({"type": "DigitsViT", "embed_dims": 16, "num_layers": 2}, id="vit_2x2_patches"),
            pytest.param({"type": "DigitsViT", "embed_dims": 16, "patch_size": 4, "dropout": 0}, id="vit_4x4_patches"),
            pytest.param({"type": "DigitsResNet", "channels": (8, 16)}, id="resnet"),
            pytest.param({"type": "DigitsResNet", "channels": (8, 8, 16), "blocks_per_stage": 2}, id="resnet_deeper"),
        ],
    )
    def test_every_parameter_gets_a_gradient(self, config):
        model = MODELS.build(config)
        logits = model(torch.randn(3, 1, 8, 8))
        assert logits.shape == (3, 10)
        logits.square().sum().backward()
        assert all(param.grad is not None for param in model.parameters())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"patch_size": 3}, "Invalid patch_size: 3; expected a divisor of 8"),
            ({"embed_dims": 30, "num_heads": 4}, "Invalid num_heads: 4; expected a divisor of embed_dims"),
        ],
    )
    def test_vit_names_a_setting_that_does_not_fit(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MODELS.build({"type": "DigitsViT", **settings})


SGD = "optimizer=dict(type='SGD', lr=1)"


def validation_loss(model: nn.Module) -> float:
    """Mean cross entropy on the validation split."""
    images, labels = load_digits()[1]
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(images), labels).item()


class TestCompare:
    @pytest.mark.parametrize(("stock", "fused"), [(s.__name__, f.__name__) for s, f in FUSED_TWINS.items()])
    def test_float32_losses_agree_whichever_of_the_two_the_config_names(self, small_config, stock, fused):
        settings = f"lr={LEARNING_RATES[stock]}, weight_decay=0.01"
        wrapper = "clip_grad=dict(max_norm=1.0), optimizer=dict(type='{}', {})"
        comparisons = [compare(small_config(wrapper.format(name, settings))) for name in (stock, fused)]
        for comparison in comparisons:
            assert (comparison.stock.optimizer, comparison.fused.optimizer) == (stock, fused)
            assert comparison.stock.backend == "torch"
            assert comparison.fused.backend in ("native", "reference", "triton")
            assert comparison.largest_loss_difference < FLOAT32_LOSS_TOLERANCE
            assert comparison.agrees
            assert comparison.fused.losses[-1] < comparison.fused.losses[0] - 0.1
            assert len(comparison.stock.losses) == len(comparison.stock.optimizer_ms) == 1438 // 64
        assert comparisons[0].stock.losses == pytest.approx(comparisons[1].stock.losses, abs=FLOAT32_LOSS_TOLERANCE)

    def test_both_trainings_see_the_same_batches_and_dropout(self, small_config, monkeypatch):
        monkeypatch.setitem(FUSED_TWINS, torch.optim.SGD, torch.optim.SGD)
        comparison = compare(small_config("optimizer=dict(type='SGD', lr=0.1)"))
        assert comparison.largest_loss_difference < 1e-6

    @pytest.mark.parametrize("factor", [0.5, 1.5])
    def test_a_wrong_update_is_noticed(self, small_config, monkeypatch, factor):
        class Wrong(torch.optim.AdamW):
            def __init__(self, params, **settings):
                super().__init__(params, **settings)
                for group in self.param_groups:
                    group["lr"] *= factor

        monkeypatch.setitem(FUSED_TWINS, torch.optim.AdamW, Wrong)
        assert not compare(small_config("optimizer=dict(type='AdamW', lr=2e-3)")).agrees

    def test_steps_and_not_iterations_are_timed(self, small_config):
        comparison = compare(small_config("accumulative_counts=4, optimizer=dict(type='AdamW', lr=1e-3)"))
        for run in (comparison.stock, comparison.fused):
            assert len(run.losses) == 22
            assert len(run.optimizer_ms) == len(run.step_ms) == 6  # the last of two iterations only
            assert all(0 < part < whole for part, whole in zip(run.optimizer_ms, run.step_ms, strict=True))

    def test_settings_of_a_fused_optimizer_are_translated(self, small_config):
        optimizer = "dict(type='FusedSGD', lr=0.1, clip_grad=dict(max_norm=0.1), backend='reference')"
        comparison = compare(small_config(f"optimizer={optimizer}"))
        assert comparison.fused.backend == "reference"
        assert comparison.largest_loss_difference < FLOAT32_LOSS_TOLERANCE

    @pytest.mark.parametrize(
        ("wrapper", "more", "message"),
        [
            (
                "optimizer=dict(type='AdamV', lr=1)",
                "",
                r"optim_wrapper\.optimizer\.type: 'AdamV' .* did you mean 'Adam",
            ),
            ("optimizer=dict(lr=1)", "", r"no `optim_wrapper\.optimizer\.type`"),
            ("type='OptimWrapper'", "", r"optim_wrapper\.optimizer must be a dict, got NoneType"),
            ("type='OptimWrapper'", "del model", "model must be a dict, got NoneType"),
            ("type='OptimWrapper'", "del optim_wrapper", "optim_wrapper must be a dict, got NoneType"),
            ("type='OptimWrapper'", "model = 3", "model must be a dict, got int"),
            ("type='OptimWrapper'", "optim_wrapper = dict(optimizer=3),", "optim_wrapper is a tuple .* comma"),
            ("optimizer=dict(type='RMSprop', lr=1)", "", "'RMSprop' has no fused twin .* AdamW, FusedAdamW, SGD"),
            ("optimizer=dict(type='SGD', lr=-1)", "", "Invalid optimizer lr: -1; expected a number >= 0"),
            (
                "optimizer=dict(type='SGD', lr=1, wieght_decay=1)",
                "",
                r"optim_wrapper\.optimizer\.wieght_decay: SGD takes",
            ),
            ("type='AmpOptimWraper', optimizer=dict(type='SGD', lr=1)", "", "did you mean 'AmpOptimWrapper'"),
            (SGD, "model = dict(type='DigitsVit')", r"model\.type: .* did you mean 'DigitsViT'"),
            (SGD, "train_dataloader = 3", "dataloader must be a dict, got int"),
            (SGD, "train_dataloader = dict(batch_size=0)", "batch_size"),
            (SGD, "train_dataloader = dict(batch_size=5000)", "train_dataloader has no batch"),
            (
                SGD,
                "train_cfg = dict(by_epoch=True, max_epochs=1.5)",
                r"train_cfg\.max_epochs: 1\.5; expected a whole number",
            ),
            (SGD, "train_cfg = dict(by_epoch=False, max_iters=30)", "compare trains by epochs"),
            (SGD, "del train_cfg, param_scheduler", "train_cfg"),
            (SGD, "env_cfg = 3", "env_cfg must be a dict, got int"),
            (SGD, "randomness = 3", "randomness must be a dict, got int"),
            (SGD, "model = dict(_delete_=True, type='DigitsResNet', channels=(4, -1))", r"model: .*negative dimension"),
            (
                SGD,
                "model = dict(_delete_=True, type='examples.digits.DigitsResNet', channels=())",
                r"small\.py: model: ",
            ),
        ],
    )
    def test_config_errors_name_the_file_and_the_matter(self, small_config, wrapper, more, message):
        config = small_config(wrapper, more)
        with pytest.raises(ConfigError, match=message) as caught:
            compare(config)
        assert str(caught.value).startswith(f"{config.filename}: ")
        assert "\n" not in str(caught.value)

    def test_the_config_is_not_changed_and_no_file_is_left(self, small_config, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = small_config("optimizer=dict(type='SGD', lr=0.1)", "custom_hooks = [dict(type='EMAHook')]\n")
        before, files = config.copy(), set(tmp_path.rglob("*"))
        assert compare(config).stock.metrics.keys() == {"accuracy", "loss"}
        assert config == before and set(tmp_path.rglob("*")) == files

    def test_schedules_and_weights_are_those_of_the_config(self, small_config, tmp_path):
        """A rate of nothing from the first iteration on leaves the weights that it starts from."""
        config = small_config("optimizer=dict(type='SGD', lr=0.1)")
        config.param_scheduler = dict(type="ConstantLR", factor=1e-30, by_epoch=False, end=1000)
        model = MODELS.build(config.model)
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        config.load_from = str(tmp_path / "weights.pth")
        comparison = compare(config)
        for run in (comparison.stock, comparison.fused):
            assert run.metrics["loss"] == pytest.approx(validation_loss(model), rel=1e-5)

    def test_a_model_without_a_loss(self, small_config):
        config = small_config(SGD)
        config.model = dict(type=Lossless)
        with pytest.raises(ConfigError, match=r"small\.py: compare needs train_step to return a loss"):
            compare(config)

    def test_hooks_see_both_trainings_take_turns(self, small_config):
        """The epochs are counted, the first of a turn changes after every step, and hooks are closed at the end."""
        Witness.seen.clear()
        config = small_config("accumulative_counts=2, optimizer=dict(type='SGD', lr=0.1)")
        config.train_cfg.max_epochs = 2
        config.param_scheduler = None
        config.train_dataloader.batch_size = 500
        config.custom_hooks = [dict(type=Witness)]
        compare(config)
        stock, fused = "SGD", "FusedSGD"
        one, other = [stock, fused], [fused, stock]
        assert [entry for entry in Witness.seen if entry[0] == "epoch"] == [
            ("epoch", name, number) for number in (0, 1) for name in one
        ]
        # Two batches an epoch are one step.
        assert [name for kind, name, _ in Witness.seen if kind == "iter"] == one * 2 + other * 2
        assert [name for kind, name, _ in Witness.seen if kind == "close"] == one


class Lossless(DigitsResNet):
    def train_step(self, data, optim_wrapper):
        super().train_step(data, optim_wrapper)
        return {"cross_entropy": torch.zeros(())}


class Witness(Hook):
    """Notes the epochs and iterations of both trainings, and when it is closed."""

    seen: ClassVar[list[tuple[str, str, int]]] = []

    def before_run(self, runner):
        self.name = type(runner.optim_wrapper.optimizer).__name__

    def before_train_epoch(self, runner):
        self.seen.append(("epoch", self.name, runner.epoch))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(("iter", self.name, runner.iter))

    def close(self):
        self.seen.append(("close", self.name, 0))


class TestReport:
    def test_times_leave_out_the_warm_up(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 10)
        assert comparison.stock.excluded_steps == 5
        assert (comparison.stock.median_ms, comparison.stock.p90_ms, comparison.stock.share) == (4.0, 4.0, 0.2)
        assert comparison.speed_up == statistics.median(comparison.ratios) == 2.0
        assert make_comparison([1.0] * 2, [1.0] * 2).stock.excluded_steps == 1

    def test_prints_both_runs(self):
        text = printed(make_comparison([1.0] * 10, [1.0] * 9 + [1.01]))
        assert "Speed-up of the optimizer: 2.00x (median of 5 paired steps" in text
        assert "over 5 steps without the first 5" in text
        assert "Largest difference of the losses of one iteration: 0.0100" in text
        assert "│ n/a │ n/a │" in text  # memory, where the system does not tell

    def test_slower_is_called_slower(self):
        comparison = make_comparison([1.0] * 10, [1.0] * 10)
        swapped = dataclasses.replace(comparison, stock=comparison.fused, fused=comparison.stock)
        assert "2.00x slower" in printed(swapped)

    @pytest.mark.parametrize("wrong", [1 + 5.1 * LOSS_TOLERANCE, math.nan, math.inf])
    def test_gives_no_speed_up_when_the_losses_disagree(self, wrong, tmp_path):
        comparison = make_comparison([1.0] * 10, [1.0] * 9 + [wrong])
        assert not comparison.agrees
        text = printed(comparison)
        assert "no speed-up is given" in text
        assert "faster" not in text
        save_figure(comparison, tmp_path / "figure.png")

    def test_saves_figures_and_picture(self, tmp_path):
        comparison = make_comparison([2.0, 1.0] * 5, [2.0, 1.0] * 5)
        save_json(comparison, tmp_path / "comparison.json")
        save_figure(comparison, tmp_path / "comparison.png")
        loaded = json.loads((tmp_path / "comparison.json").read_text())
        assert loaded["config"] == "configs/some.py"
        assert loaded["seed"] == 0
        assert (loaded["speed_up"], loaded["agrees"]) == (2.0, True)
        assert loaded["stock"]["losses"] == [2.0, 1.0] * 5
        assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    def test_progress_is_plain_lines_without_a_terminal(self, capsys):
        with show_progress(Console(force_terminal=False)) as listener:
            for done in range(1, 41):
                listener(done, 40, 0.5, 0.25)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert lines[-1] == "iteration 40/40  loss: stock 0.5000, fused 0.2500"

    def test_progress_is_a_bar_on_a_terminal(self, capsys):
        with show_progress(Console(force_terminal=True, width=100)) as listener:
            listener(7, 40, 0.5, 0.25)
        assert "7/40" in capsys.readouterr().out


class TestPeakMemory:
    def test_sees_what_was_freed_again(self):
        peak = PeakMemory(torch.device("cpu"))
        peak.start()
        block = torch.ones(16 * 2**20)  # 64 MiB
        del block
        used = peak.stop()
        if used is None:
            pytest.skip("this system does not report the peak of the resident set")
        assert 60 * 2**20 < used < 100 * 2**20

    def test_is_none_where_the_system_does_not_tell(self, monkeypatch):
        monkeypatch.setattr(memory, "_resident_kib", lambda: {})
        peak = PeakMemory(torch.device("cpu"))
        peak.start()
        assert peak.stop() is None
