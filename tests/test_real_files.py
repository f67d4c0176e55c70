"""Weights from the files that other packages write, where they are installed."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedopt.training.reading import find_weights, read_file

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of while it is imported is not ours
        return pytest.importorskip(name, reason=f"{name} is not installed")


def assert_found(path: Path, weights: dict[str, Any], prefix: str = "") -> str:
    found = find_weights(read_file(path))
    assert set(found.state_dict) == {prefix + name for name in weights}
    assert all(torch.equal(found.state_dict[prefix + name], value) for name, value in weights.items())
    return found.told()


def test_lightning(tmp_path):
    lightning = imported("pytorch_lightning")

    class Net(lightning.LightningModule):
        def __init__(self, lr: float = 0.1, settings: Any = None):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    model = Net(settings=argparse.Namespace(a=1))
    trainer.fit(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=8))
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    told = assert_found(tmp_path / "file.ckpt", model.net.state_dict(), "net.")
    assert "pytorch-lightning_version" in told and "objects of argparse.Namespace" in told


def test_transformers(tmp_path):
    transformers = imported("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=37, vocab_size=50)
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for name in ("model.safetensors", "pytorch_model.bin"):
        assert_found(tmp_path / name, model.state_dict())


def test_timm(tmp_path):
    timm = imported("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    arguments = argparse.Namespace(model="resnet10t", lr=0.1)
    settings = dict(
        args=arguments, model_ema=timm.utils.ModelEmaV3(model), optimizer=torch.optim.AdamW(model.parameters())
    )
    timm.utils.CheckpointSaver(model, checkpoint_dir=tmp_path, recovery_dir=tmp_path, **settings).save_checkpoint(
        3, 70.5
    )
    told = assert_found(tmp_path / "last.pth.tar", model.state_dict())
    assert "state_dict_ema" in told and "objects of argparse.Namespace" in told
