"""The package pytorch_lightning, with the same code as lightning: in a process of its own, without the other."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedopt

STEPS = 10


def train_with_pytorch_lightning() -> None:
    import pytorch_lightning as pl
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision import MixedPrecision as FabricMixedPrecision
    from probe import GradientPasses
    from pytorch_lightning.plugins.precision import MixedPrecision

    from fusedopt.integrations.pytorch_lightning import FusedClipping, fuse, unfuse

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**10)

    class Net(pl.LightningModule):
        def __init__(self, kind: type) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.kind = nn.Linear(6, 3), kind

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.kind(self.parameters(), lr=1e-2)

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.layer(batch).square().sum()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.loss(batch)

        def on_after_backward(self) -> None:
            if self.global_step == 3:
                self.layer.bias.grad += float("inf")

    data = list(torch.randn(STEPS, 8, 6))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)

    def by_trainer(kind: type, callbacks: list) -> tuple[Net, list[str], float]:
        net = Net(kind)
        plugin = MixedPrecision("16-mixed", "cpu", scaler())
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, plugins=plugin, callbacks=callbacks, gradient_clip_val=0.5, **quiet
        )
        with GradientPasses(net.parameters()) as passes:
            trainer.fit(net, torch.utils.data.DataLoader(data, batch_size=None))
        assert type(plugin.scaler) is torch.amp.GradScaler and "clip_gradients" not in vars(plugin)
        return net, passes.seen, plugin.scaler.get_scale()

    def by_fabric(kind: type, fuses: bool) -> tuple[Net, list[str], float]:
        plugin = FabricMixedPrecision("16-mixed", "cpu", scaler())
        fabric, net = Fabric(accelerator="cpu", plugins=plugin), Net(kind)
        if fuses:
            fuse(fabric)
        model, optimizer = fabric.setup(net, net.configure_optimizers())
        with GradientPasses(net.parameters()) as passes:
            for batch in data:
                optimizer.zero_grad()
                fabric.backward(net.loss(batch))
                fabric.clip_gradients(model, optimizer, max_norm=0.5)
                optimizer.step()
        unfuse(fabric)
        return net, passes.seen, plugin.scaler.get_scale()

    fused, stock = fusedopt.FusedAdamW, torch.optim.AdamW
    for ours, theirs in (
        (by_trainer(fused, [FusedClipping()]), by_trainer(stock, [])),
        (by_fabric(fused, True), by_fabric(stock, False)),
    ):
        for param, want in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
            torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)
        assert ours[1] == [] != theirs[1]
        assert ours[2] == theirs[2]
    assert "lightning" not in sys.modules


@pytest.mark.slow
def test_the_same_as_with_lightning_which_is_not_imported() -> None:
    pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed: pip install pytorch-lightning")
    result = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=os.environ, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("lightning", "lightning.pytorch", "lightning"),
        ("pytorch_lightning", "pytorch_lightning", "pytorch-lightning"),
    ],
)
def test_a_missing_package_is_a_sentence(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"fusedopt.integrations.{name}", raising=False)
    sentence = rf"^{name} is not installed; install it with: pip install 'fusedopt\[{extra}\]'$"
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module(f"fusedopt.integrations.{name}")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    warnings.simplefilter("ignore")
    train_with_pytorch_lightning()
