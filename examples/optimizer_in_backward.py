"""Train on handwritten digits with an optimizer for each parameter, which steps inside the backward pass.

    python examples/optimizer_in_backward.py

Each gradient is freed as soon as its parameter has been updated, so that the gradients of all parameters never exist at
the same time. Needs scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from fusedopt import FusedAdamW

EPOCHS = 6
BATCH = 64


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().div(8).sub(1).flatten(1), torch.from_numpy(digits.target)
    train, val = torch.randperm(len(labels)).split([1437, 360])

    widths = [64, 128, 128, 128, 10]
    layers = [[nn.Linear(*widths[i : i + 2]), nn.ReLU()] for i in range(len(widths) - 1)]
    model = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])
    clip = {"type": "value", "clip_value": 0.1}
    optimizers = {param: FusedAdamW([param], lr=2e-3, clip_grad=clip) for param in model.parameters()}
    most = 0

    def step_now(param: nn.Parameter) -> None:
        nonlocal most
        most = max(most, sum(each.grad.nbytes for each in optimizers if each.grad is not None))
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_now)

    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()  # also steps

    with torch.no_grad():
        right = (model(images[val]).argmax(1) == labels[val]).float().mean()
    total = sum(param.nbytes for param in model.parameters())
    print(f"{len(optimizers)} optimizers; at most {most:,} of {total:,} bytes of gradients at a time")
    print(f"accuracy: {right:.1%}")


if __name__ == "__main__":
    main()
