"""Train a small network on handwritten digits in a loop of plain torch, with mixed precision and clipping.

    python examples/plain_digits.py

The step of the optimizer unscales, clips and updates, so the loop has no unscale_ and no clip_grad_norm_. It runs on a
GPU if there is one. Needs scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import fusedopt

EPOCHS = 6
BATCH = 64


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).flatten(1).to(device)
    labels = torch.from_numpy(digits.target).to(device)
    train, val = torch.randperm(len(labels)).split([1437, 360])

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    weights = [param for param in model.parameters() if param.ndim > 1]
    biases = [param for param in model.parameters() if param.ndim <= 1]
    optimizer = fusedopt.FusedAdamW(
        [{"params": weights, "weight_decay": 0.05}, {"params": biases, "weight_decay": 0.0}],
        lr=3e-3,
        clip_grad={"max_norm": 1.0},  # one norm, over both groups
    )
    scaler = fusedopt.amp.GradScaler(device.type)
    steps = EPOCHS * -(-len(train) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)

    for epoch in range(1, EPOCHS + 1):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            with torch.autocast(device.type, torch.float16):
                loss = functional.cross_entropy(model(images[batch]).float(), labels[batch])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
        report = optimizer.last_step
        print(f"epoch {epoch}: loss {loss.item():.3f}, norm of the last gradient {report.grad_norm:.2f}")

    with torch.no_grad():
        right = (model(images[val]).argmax(1) == labels[val]).float().mean()
    print(f"accuracy: {right:.1%}")


if __name__ == "__main__":
    main()
