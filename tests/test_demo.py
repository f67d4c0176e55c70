"""The demonstration: configs, data, models, and the memory that a step takes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedopt.training.builder import build_optim_wrapper
from fusedopt.training.registry import MODELS

pytest.importorskip("sklearn", reason="the demonstration needs the extra fusedopt[demo]: scikit-learn is missing")

from examples.digits.data import DigitsDataset, load_digits
from fusedopt.bench import memory
from fusedopt.bench.memory import PeakMemory
from fusedopt.training.config import Config

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [FOLDER / "digits_resnet.py", FOLDER / "digits_vit.py"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operations, and other tests at the same time: threads that wait for each other would only be slower."""
    torch.set_num_threads(1)


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
