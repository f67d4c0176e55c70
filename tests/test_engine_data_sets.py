"""Data sets made of others: the samples that MMEngine's have, in a Runner, and mistakes."""

from __future__ import annotations

import pickle
import random

import pytest
import torch
from engine_cases import Points, config, loader, train

from fusedopt.training.engine import ClassBalancedDataset, ConcatDataset, RepeatDataset
from fusedopt.training.registry import DATASETS


class Numbers(torch.utils.data.Dataset):
    """Numbers with classes, loaded only by ``full_init``."""

    def __init__(self, first: int, size: int, metainfo=None):
        self.numbers, self.size = range(first, first), size
        self.first = first
        self.metainfo = dict(classes=("a", "b")) if metainfo is None else metainfo

    def full_init(self) -> None:
        self.numbers = range(self.first, self.first + self.size)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> int:
        return self.numbers[index]

    def get_data_info(self, index: int) -> dict[str, int]:
        return dict(number=self.numbers[index])

    def get_cat_ids(self, index: int) -> list[int]:
        number = self.numbers[index]
        return [each for each in range(5) if random.Random(number * 5 + each).random() < 0.5**each / 2]


def samples(dataset) -> list[int]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("lazy_init", [False, True])
def test_the_samples_are_those_of_the_parts(lazy_init):
    parts = [Numbers(0, 3), Numbers(10, 1), Numbers(20, 2)]
    joined = ConcatDataset(parts, lazy_init=lazy_init)
    assert len(parts[0]) == (0 if lazy_init else 3)
    assert samples(joined) == [0, 1, 2, 10, 20, 21] and joined[-1] == 21 and joined[-6] == 0
    assert joined.cumulative_sizes == [3, 4, 6] and joined.datasets == parts
    assert joined.metainfo == dict(classes=("a", "b"))
    assert joined.get_data_info(3) == dict(number=10)
    repeated = RepeatDataset(Numbers(5, 2), times=3, lazy_init=lazy_init)
    assert samples(repeated) == [5, 6] * 3 and repeated.get_cat_ids(4) == repeated.dataset.get_cat_ids(0)
    assert samples(pickle.loads(pickle.dumps(repeated))) == [5, 6] * 3
    with pytest.raises(IndexError, match="sample 6 of a RepeatDataset with 6 samples"):
        repeated[6]


@pytest.mark.parametrize("threshold", [0.0, 1e-3, 0.1, 0.7, 3.0])
def test_rare_classes_are_repeated_as_in_mmengine(threshold):
    theirs = pytest.importorskip("mmengine.dataset", reason="mmengine is not installed")

    expected = theirs.ClassBalancedDataset.__new__(theirs.ClassBalancedDataset)
    expected.dataset = Numbers(0, 200)
    expected.dataset.full_init()
    factors = expected._get_repeat_factors(expected.dataset, threshold)
    mine = ClassBalancedDataset(Numbers(0, 200), oversample_thr=threshold)
    counts = [mine.repeat_indices.count(index) for index in range(200)]
    assert counts == [int(-(-factor // 1)) for factor in factors]
    assert len(set(counts)) > 1 or threshold < 0.1


def test_in_a_runner(tmp_path):
    part = dict(type="Points", size=10)
    nested = dict(type="RepeatDataset", times=2, dataset=dict(type="ConcatDataset", datasets=[part, part]))
    runner = train(config(tmp_path, train_dataloader={**loader(40, 8, shuffle=True), "dataset": nested}))
    assert len(runner.train_dataloader.dataset) == 40 and runner.iter == 20
    assert runner.train_dataloader.dataset.metainfo == Points.metainfo


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ConcatDataset([]), ValueError, "datasets is empty"),
        (
            lambda: ConcatDataset([Numbers(0, 1), Numbers(0, 1, dict(classes=("a",)))]),
            ValueError,
            r"metainfo\['classes'\] of data set 2 differs",
        ),
        (
            lambda: ConcatDataset([Numbers(0, 1), Numbers(0, 1, dict(other=1))]),
            ValueError,
            r"metainfo\['classes'\] of data set 2 differs",
        ),
        (lambda: ConcatDataset([Numbers(0, 1)], ignore_keys=3), TypeError, "ignore_keys must be a string or a list"),
        (lambda: RepeatDataset(Numbers(0, 1), times=0), ValueError, "times"),
        (lambda: RepeatDataset(Numbers(0, 1), times="2"), TypeError, "times"),
        (lambda: ClassBalancedDataset(Numbers(0, 1), oversample_thr=-1), ValueError, "oversample_thr"),
    ],
)
def test_mistakes(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_metainfo_that_may_differ():
    array, same = torch.arange(3), torch.arange(3)
    parts = [Numbers(0, 1, dict(palette=array, name="x")), Numbers(0, 1, dict(palette=same, name="y"))]
    assert ConcatDataset(parts, ignore_keys="name").metainfo["palette"] is array
    assert ConcatDataset([torch.utils.data.TensorDataset(array)] * 2).metainfo is None


def test_a_package_may_register_its_own(monkeypatch):
    monkeypatch.setattr(DATASETS, "_modules", dict(DATASETS._modules))
    monkeypatch.setattr(DATASETS, "_replaceable", set(DATASETS._replaceable))
    DATASETS.register_module(name="ConcatDataset", module=Numbers)
    assert DATASETS.get("ConcatDataset") is Numbers
