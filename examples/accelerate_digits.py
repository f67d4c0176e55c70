"""Train a small network on handwritten digits with accelerate and a fused optimizer.

    python examples/accelerate_digits.py [--epochs N]

On a GPU it trains in float16, with a loss scale. Clipping and, there, unscaling are part of the optimizer's step.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedopt
from fusedopt.integrations.accelerate import fuse


def train(epochs: int) -> tuple[float, float]:
    """Train, and return the accuracy on images that were left out, and the largest norm of the gradients."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    loader = DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=50, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))

    accelerator = fuse(Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no"))
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    norms = []
    for _ in range(epochs):
        for batch, target in loader:
            accelerator.backward(nn.functional.cross_entropy(model(batch), target))
            norms.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))  # known after the step
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    with torch.no_grad():
        hits = model(x[1500:].to(accelerator.device)).argmax(1).cpu() == y[1500:]
    return float(hits.float().mean()), max(map(float, norms))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8, help="number of epochs (default: %(default)s)")
    torch.set_num_threads(1)  # more threads only wait for each other on so small a network
    accuracy, norm = train(parser.parse_args().epochs)
    print(f"accuracy {accuracy:.1%} on 297 images that it has not seen; largest norm of the gradients {norm:.2f}")


if __name__ == "__main__":
    main()
