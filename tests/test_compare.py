"""``fusedopt compare``: the runs that it trains side by side."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from fusedopt.optimizers import FUSED_TWINS
from fusedopt.training.registry import MODELS

pytest.importorskip("sklearn", reason="the demonstration needs the extra fusedopt[demo]: scikit-learn is missing")

from examples.digits import DigitsResNet
from examples.digits.data import load_digits
from fusedopt.compare import compare as compare_module
from fusedopt.compare.compare import compare
from fusedopt.compare.comparison import Comparison
from fusedopt.compare.variants import move_one_weight, torch_way, why_no_torch_fused
from fusedopt.training.config import Config, ConfigError
from fusedopt.training.engine import Hook

FOLDER = Path(__file__).parents[1] / "configs"

# In float32 the runs differ by the order of operations alone; 22 steps make 1e-6 of that.
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
            assert [run.optimizer for run in comparison.timed] == [stock, stock, fused]
            assert [run.backend for run in comparison.timed[:2]] == ["for-loop", "fused"]
            assert comparison.fused.backend in ("native", "reference", "triton")
            for run in (*comparison.timed, comparison.moved):
                assert comparison.largest_loss_difference(run) < FLOAT32_LOSS_TOLERANCE
                assert comparison.agree(run)
            assert comparison.fused.losses[-1] < comparison.fused.losses[0] - 0.1
            assert len(comparison.stock.losses) == len(comparison.stock.optimizer_ms) == 1438 // 64
        assert comparisons[0].stock.losses == pytest.approx(comparisons[1].stock.losses, abs=FLOAT32_LOSS_TOLERANCE)

    def test_all_runs_see_the_same_batches_and_dropout(self, small_config, monkeypatch):
        monkeypatch.setitem(FUSED_TWINS, torch.optim.SGD, torch.optim.SGD)
        comparison = compare(small_config("optimizer=dict(type='SGD', lr=0.1)"))
        assert comparison.largest_loss_difference(comparison.fused) < 1e-6

    def test_torch_fused_may_be_missing(self, small_config):
        comparison = compare(small_config("optimizer=dict(type='SGD', lr=0.1, fused=True)"))
        assert comparison.torch_fused is None
        assert comparison.no_torch_fused == "the config's own optimizer is torch's fused one"
        assert [run.name for run in comparison.timed] == ["torch's fused SGD", "FusedSGD"]
        assert Comparison.from_dict(comparison.as_dict()) == comparison

    def test_the_moved_start_differs_in_one_weight(self, small_config, monkeypatch):
        """And in nothing else: without the move, its losses are those of the stock run."""
        config = small_config("optimizer=dict(type='AdamW', lr=2e-3)")
        moved = compare(config).moved
        model = MODELS.build(config.model)
        assert moved.parameter == "pos_embed", "the class token before it is all zeros"
        assert moved.parameter in dict(model.named_parameters())
        assert moved.after == torch.tensor(moved.before).nextafter(torch.tensor(math.inf)).item() > moved.before
        monkeypatch.setattr(compare_module, "move_one_weight", lambda model: ("", 0.0, 0.0))
        comparison = compare(config)
        assert comparison.moved.losses == comparison.stock.losses
        assert comparison.moved.metrics == comparison.stock.metrics

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
        for run in comparison.timed:
            assert len(run.losses) == 22
            assert len(run.optimizer_ms) == len(run.step_ms) == 6  # the last of two iterations only
            assert all(0 < part < whole for part, whole in zip(run.optimizer_ms, run.step_ms, strict=True))

    def test_settings_of_a_fused_optimizer_are_translated(self, small_config):
        optimizer = "dict(type='FusedSGD', lr=0.1, clip_grad=dict(max_norm=0.1), backend='reference')"
        comparison = compare(small_config(f"optimizer={optimizer}"))
        assert comparison.fused.backend == "reference"
        assert comparison.largest_loss_difference(comparison.fused) < FLOAT32_LOSS_TOLERANCE

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

    def test_hooks_see_all_runs_take_turns(self, small_config):
        """The epochs are counted, the order of a turn changes after every step, and hooks are closed at the end."""
        Witness.seen.clear()
        config = small_config("accumulative_counts=2, optimizer=dict(type='SGD', lr=0.1)")
        config.train_cfg.max_epochs = 6
        config.param_scheduler = None
        config.train_dataloader.batch_size = 500
        config.custom_hooks = [dict(type=Witness)]
        compare(config)
        everyone = ["for-loop SGD", "fused SGD", "FusedSGD", "for-loop SGD"]
        assert [entry for entry in Witness.seen if entry[0] == "epoch"] == [
            ("epoch", name, number) for number in range(6) for name in everyone
        ]
        # Two batches an epoch are one step.
        turns = [name for kind, name, _ in Witness.seen if kind == "iter"]
        steps = [turns[start : start + 4] for start in range(0, len(turns), 8)]
        assert steps == [turns[start : start + 4] for start in range(4, len(turns), 8)]
        assert {tuple(step) for step in steps} == {
            (*order, everyone[0]) for order in itertools.permutations(everyone[:3])
        }
        assert [name for kind, name, _ in Witness.seen if kind == "close"] == everyone


class Lossless(DigitsResNet):
    def train_step(self, data, optim_wrapper):
        super().train_step(data, optim_wrapper)
        return {"cross_entropy": torch.zeros(())}


class Witness(Hook):
    """Notes the epochs and iterations of all runs, and when it is closed."""

    seen: ClassVar[list[tuple[str, str, int]]] = []

    def before_run(self, runner):
        optimizer = runner.optim_wrapper.optimizer
        name = type(optimizer).__name__
        self.name = name if name.startswith("Fused") else f"{torch_way(optimizer)} {name}"

    def before_train_epoch(self, runner):
        self.seen.append(("epoch", self.name, runner.epoch))

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(("iter", self.name, runner.iter))

    def close(self):
        self.seen.append(("close", self.name, 0))


def params(*dtypes: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in dtypes]


class TestTorchFused:
    @pytest.mark.parametrize("cls", FUSED_TWINS)
    @pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"lr": torch.tensor(0.1)}])
    def test_torch_has_it_for_these(self, cls, settings):
        if isinstance(settings.get("lr"), torch.Tensor) and settings.get("foreach"):
            pytest.skip("not in torch")
        assert why_no_torch_fused(cls(params(torch.float32, torch.bfloat16), **{"lr": 0.1, **settings})) is None

    def test_says_why_torch_has_none(self):
        class Slow(torch.optim.SGD):
            def __init__(self, params, lr):
                super().__init__(params, lr=lr)

        assert "unexpected keyword argument 'fused'" in why_no_torch_fused(Slow(params(torch.float32), lr=0.1))
        reason = why_no_torch_fused(torch.optim.AdamW(params(torch.float32, torch.complex64)))
        assert reason.startswith("torch's AdamW(fused=True) does not step torch.complex64 on cpu: ")
        assert "\n" not in reason

    def test_how_torch_runs_a_step(self):
        ways = {"for-loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
        for way, settings in ways.items():
            assert torch_way(torch.optim.Adam(params(torch.float32), **settings)) == way
        meta = [nn.Parameter(torch.ones(2, device="meta"))]  # as on a GPU
        assert torch_way(torch.optim.Adam(meta)) == "foreach"
        assert torch_way(torch.optim.Adam(meta, foreach=False)) == "for-loop"
        assert torch_way(torch.optim.Adam(meta, lr=torch.tensor(0.1))) == "for-loop"


class TestMovedWeight:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_the_first_that_is_trained_and_not_zero(self, dtype):
        model = nn.ParameterDict(
            {
                "frozen": nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False),
                "zeros": nn.Parameter(torch.zeros(2, dtype=dtype)),
                "weight": nn.Parameter(torch.tensor([[0.0, 0.0], [-0.5, 3.0]], dtype=dtype)),
            }
        )
        before = {name: param.clone() for name, param in model.named_parameters()}
        name, old, new = move_one_weight(model)
        assert (name, old) == ("weight", -0.5)
        assert old < new < old * (1 - torch.finfo(dtype).eps)
        assert model["weight"].tolist() == [[0.0, 0.0], [new, 3.0]]
        assert all(torch.equal(before[key], param) for key, param in model.items() if key != "weight")

    def test_there_may_be_none(self):
        assert move_one_weight(nn.ParameterDict({"zeros": nn.Parameter(torch.zeros(2))})) == ("", 0.0, 0.0)
