"""Data sets made of others: concatenated, repeated, or with rare classes repeated."""

from __future__ import annotations

import abc
import collections
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils import data

from ...messages import check_number, check_whole_number
from ..registry import DATASETS

__all__ = ["ClassBalancedDataset", "ConcatDataset", "RepeatDataset"]


class _Combined(data.Dataset[Any], abc.ABC):
    """Base of the data sets here, whose samples are those of ``parts``.

    Args:
        parts: the data sets or their configs. Those with a method ``full_init`` may load their content later.
        lazy_init: whether they do so when it is first needed, rather than now.

    Attributes:
        metainfo: information about the first data set, such as the names of its classes; None without any.
    """

    def __init__(self, parts: Sequence[Any], lazy_init: bool):
        self._parts = [DATASETS.build(part) if isinstance(part, Mapping) else part for part in parts]
        self.metainfo = getattr(self._parts[0], "metainfo", None)
        self._loaded = False
        if not lazy_init:
            self.full_init()

    def full_init(self) -> None:
        """Let the data sets load their content, if they have not."""
        if self._loaded:
            return
        for part in self._parts:
            load = getattr(part, "full_init", None)
            if load is not None:
                load()
        self._count()
        self._loaded = True

    @abc.abstractmethod
    def _count(self) -> None:
        """Called once, when the sizes of ``parts`` are known."""

    @abc.abstractmethod
    def _size(self) -> int: ...

    @abc.abstractmethod
    def _place(self, index: int) -> tuple[Any, int]:
        """The data set of a sample, and its index there; ``index`` is at least 0."""

    def __len__(self) -> int:
        self.full_init()
        return self._size()

    def _of(self, index: int) -> tuple[Any, int]:
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"sample {index} of a {type(self).__name__} with {size} samples")
        return self._place(index % size)

    def __getitem__(self, index: int) -> Any:
        dataset, inner = self._of(index)
        return dataset[inner]

    def get_data_info(self, index: int) -> Any:
        """What its data set says about a sample."""
        dataset, inner = self._of(index)
        return dataset.get_data_info(inner)

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes in a sample."""
        dataset, inner = self._of(index)
        return dataset.get_cat_ids(inner)


@DATASETS.register_module(replaceable=True)
class ConcatDataset(_Combined, data.ConcatDataset[Any]):
    """Data sets one after the other, as ``mmengine.dataset.ConcatDataset``.

    Args:
        datasets: the data sets or their configs.
        lazy_init: load them when they are first needed.
        ignore_keys: keys of ``metainfo`` that may differ.

    Raises:
        TypeError: ``ignore_keys`` is neither a string nor a list.
        ValueError: there is no data set, or their ``metainfo`` differs.
    """

    def __init__(
        self, datasets: Sequence[Any], lazy_init: bool = False, ignore_keys: str | Sequence[str] | None = None
    ):
        if not datasets:
            raise ValueError("datasets is empty; expected at least one data set")
        ignored = [ignore_keys] if isinstance(ignore_keys, str) else ignore_keys or []
        if not isinstance(ignored, list | tuple):
            raise TypeError(f"ignore_keys must be a string or a list of strings, got {ignore_keys!r}")
        super().__init__(datasets, lazy_init)
        self.datasets = self._parts
        first = self.metainfo or {}
        for number, part in enumerate(self._parts[1:], 2):
            other = getattr(part, "metainfo", None) or {}
            for key in {**first, **other}:
                if key not in ignored and not _agree(first, other, key):
                    raise ValueError(f"metainfo[{key!r}] of data set {number} differs from that of the first one")

    def _count(self) -> None:
        self.cumulative_sizes = list(itertools.accumulate(map(len, self._parts)))

    def _size(self) -> int:
        return self.cumulative_sizes[-1]

    def _place(self, index: int) -> tuple[Any, int]:
        number = bisect_right(self.cumulative_sizes, index)
        return self._parts[number], index - (self.cumulative_sizes[number - 1] if number else 0)


def _agree(first: Mapping[str, Any], other: Mapping[str, Any], key: str) -> bool:
    if key not in first or key not in other or type(first[key]) is not type(other[key]):
        return False
    mine, theirs = first[key], other[key]
    if getattr(mine, "shape", None) != getattr(theirs, "shape", None):
        return False
    same = mine == theirs
    return bool(same.all() if hasattr(same, "all") else same)


@DATASETS.register_module(replaceable=True)
class RepeatDataset(_Combined):
    """A data set several times, as ``mmengine.dataset.RepeatDataset``; an epoch is that much longer.

    Args:
        dataset: the data set or its config.
        times: how often.
        lazy_init: load it when it is first needed.

    Raises:
        TypeError, ValueError: ``times`` is not a whole number of at least 1.
    """

    def __init__(self, dataset: Any, times: int, lazy_init: bool = False):
        self.times = check_whole_number("times", times, 1)
        super().__init__([dataset], lazy_init)
        self.dataset = self._parts[0]

    def _count(self) -> None:
        self._once = len(self._parts[0])

    def _size(self) -> int:
        return self.times * self._once

    def _place(self, index: int) -> tuple[Any, int]:
        return self._parts[0], index % self._once


@DATASETS.register_module(replaceable=True)
class ClassBalancedDataset(_Combined):
    """A data set in which samples of rare classes are repeated, as ``mmengine.dataset.ClassBalancedDataset``.

    With ``f`` the share of samples that a class is in, a sample occurs ``ceil(max(1, sqrt(oversample_thr / f)))``
    times, for the rarest of its classes, as in `LVIS <https://arxiv.org/abs/1908.03195>`_.

    Args:
        dataset: the data set or its config; its method ``get_cat_ids(index)`` returns the classes in a sample.
        oversample_thr: the share below which a class is rare.
        lazy_init: load it when it is first needed.

    Raises:
        TypeError, ValueError: ``oversample_thr`` is not a number of at least 0.
    """

    def __init__(self, dataset: Any, oversample_thr: float, lazy_init: bool = False):
        self.oversample_thr = check_number("oversample_thr", oversample_thr)
        super().__init__([dataset], lazy_init)
        self.dataset = self._parts[0]

    def _count(self) -> None:
        part = self._parts[0]
        classes = [set(part.get_cat_ids(index)) for index in range(len(part))]
        counts = collections.Counter(itertools.chain.from_iterable(classes))
        factors = {each: math.sqrt(self.oversample_thr * len(part) / count) for each, count in counts.items()}
        self.repeat_indices = [
            index
            for index, found in enumerate(classes)
            for _ in range(math.ceil(max([1.0, *(factors[each] for each in found)])))
        ]

    def _size(self) -> int:
        return len(self.repeat_indices)

    def _place(self, index: int) -> tuple[Any, int]:
        return self._parts[0], self.repeat_indices[index]
