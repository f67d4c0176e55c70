"""Train a small network on handwritten digits with Lightning's Trainer and a fused optimizer.

    python examples/lightning_digits.py

Two lines are different from those for a stock optimizer: the one that makes the optimizer, and ``callbacks``. With
them, the Trainer's clipping is part of the optimizer's step.
"""

from __future__ import annotations

import logging
import warnings

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fusedopt
from fusedopt.integrations.lightning import FusedClipping


class Digits(pl.LightningModule):
    """A network of two layers for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return fusedopt.FusedAdamW(self.parameters(), lr=3e-3)


def main() -> None:
    """Train for ten epochs, in bfloat16 where autocast allows it."""
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    source = load_digits()
    data = TensorDataset(torch.from_numpy(source.data).float() / 8 - 1, torch.from_numpy(source.target))
    train, val = random_split(data, [0.8, 0.2])
    model = Digits()
    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="cpu",
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[FusedClipping()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(val, 256))
    optimizer = trainer.optimizers[0]
    accuracy, norm = trainer.callback_metrics["accuracy"], optimizer.last_step.grad_norm
    print(f"{trainer.global_step} steps of {type(optimizer).__name__}, the last with a gradient norm of {norm:.3f}")
    print(f"validation accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
