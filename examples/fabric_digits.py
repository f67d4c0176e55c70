"""Train a small network on handwritten digits with Lightning Fabric and a fused optimizer.

    python examples/fabric_digits.py

Two lines are different from those for a stock optimizer: the one that makes the optimizer, and ``fuse(fabric)``. With
them, ``fabric.clip_gradients`` clips in the optimizer's step, and the norm that it returns is known after the step.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import fusedopt
from fusedopt.integrations.lightning import fuse


def main() -> None:
    """Train for ten epochs, in bfloat16 where autocast allows it."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    fuse(fabric)

    source = load_digits()
    data = TensorDataset(torch.from_numpy(source.data).float() / 8 - 1, torch.from_numpy(source.target))
    train, val = random_split(data, [0.8, 0.2])
    loader = fabric.setup_dataloaders(DataLoader(train, 64, shuffle=True))
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    model, optimizer = fabric.setup(model, fusedopt.FusedAdamW(model.parameters(), lr=3e-3))

    norms = []
    for _ in range(10):
        for images, labels in loader:
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(model(images), labels))
            norms.append(fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False))
            optimizer.step()

    images, labels = val[:]
    accuracy = (model(images).argmax(1) == labels).float().mean()
    print(f"{len(norms)} steps, of which {sum(bool(norm > 1) for norm in norms)} were clipped")
    print(f"validation accuracy: {accuracy:.3f}")


if __name__ == "__main__":
    main()
