"""The handwritten digits that ship with scikit-learn: 1797 real grey images of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..extras import require

__all__ = ["Digits", "load_digits", "random_batches"]


class Digits(NamedTuple):
    """One split: ``images`` is float32, N x 1 x 8 x 8, from -1 to 1; ``labels`` is int64, N."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Digits:
        """The split on ``device``."""
        return Digits(self.images.to(device), self.labels.to(device))


def load_digits(val_fraction: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """The training and the validation split.

    Args:
        val_fraction: share of the images that goes into the validation split, between 0 and 1.
        seed: which images these are.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: ``val_fraction`` is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"Invalid val_fraction: {val_fraction}; expected a number between 0 and 1")
    source = require("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(source.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    val, train = order.split([round(val_fraction * len(order)), len(order) - round(val_fraction * len(order))])
    return Digits(images[train], labels[train]), Digits(images[val], labels[val])


def random_batches(split: Digits, batch_size: int, epochs: int, seed: int) -> Iterator[Digits]:
    """Batches of ``epochs`` passes over ``split``, each in a new order; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
        for indices in order.split(batch_size):
            if len(indices) == batch_size:
                yield Digits(split.images[indices], split.labels[indices])
