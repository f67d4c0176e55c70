"""The handwritten digits that ship with scikit-learn: 1797 real grey images of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusedopt.messages import require
from fusedopt.training.registry import DATASETS

__all__ = ["Digits", "DigitsDataset", "load_digits"]


class Digits(NamedTuple):
    """One split: ``images`` is float32, N x 1 x 8 x 8, from -1 to 1; ``labels`` is int64, N."""

    images: Tensor
    labels: Tensor


def load_digits(val_fraction: float = 0.2, seed: int = 0) -> tuple[Digits, Digits]:
    """Load the training and the validation split.

    Args:
        val_fraction: share of the images that goes into the validation split, between 0 and 1.
        seed: seed of the random split.

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


@DATASETS.register_module()
class DigitsDataset(Dataset):
    """A split of the digits; a sample is ``dict(inputs=image, labels=label)``.

    Args:
        split: ``'train'`` or ``'val'``.
        val_fraction: see :func:`load_digits`.
        seed: see :func:`load_digits`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        ValueError: an unknown split, or ``val_fraction`` is out of range.
    """

    metainfo: ClassVar[dict[str, Any]] = {"classes": tuple("0123456789")}

    def __init__(self, split: str, val_fraction: float = 0.2, seed: int = 0):
        if split not in ("train", "val"):
            raise ValueError(f"Invalid split: {split!r}; expected 'train' or 'val'")
        self.digits = load_digits(val_fraction, seed)[split == "val"]

    def __len__(self) -> int:
        return len(self.digits.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.digits.images[index], "labels": self.digits.labels[index]}
