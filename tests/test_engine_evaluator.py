"""Evaluators: their configs, and what metrics get from them."""

from __future__ import annotations

import pytest
import torch
from engine_cases import HitRate, Points, config, loader, recorded, train

from fusedopt.training.engine import BaseMetric, Config, ConfigError, Evaluator, MultiDatasetsEvaluator, Runner
from fusedopt.training.engine.validation import check_names
from fusedopt.training.registry import DATASETS, EVALUATOR


@pytest.mark.parametrize(
    "evaluator",
    [
        dict(type="Evaluator", metrics=[dict(type="HitRate"), dict(type="HitRate", prefix="b")]),
        dict(metrics=[dict(type="HitRate"), HitRate(prefix="b")]),
        Evaluator([HitRate(), HitRate(prefix="b")]),
    ],
    ids=["as in MMagic", "without a type", "an object"],
)
def test_an_evaluator_of_metrics(tmp_path, evaluator):
    cfg = config(tmp_path, val_evaluator=evaluator)
    check_names(cfg)
    runner = train(cfg)
    assert set(recorded(runner).metrics[-1]) == {"accuracy", "count", "b/accuracy", "b/count"}


def test_one_metric_needs_no_list(tmp_path):
    cfg = config(tmp_path, val_evaluator=dict(type="Evaluator", metrics=dict(type="HitRate")))
    check_names(cfg)
    assert type(Runner.from_cfg(cfg).val_loop.evaluator.metrics[0]) is HitRate


@pytest.mark.parametrize(
    ("evaluator", "key", "message"),
    [
        (dict(type="Evaluater", metrics=[]), "val_evaluator.type", "did you mean 'Evaluator'"),
        (dict(type="Evaluator", metrics=[], prefix="a"), "val_evaluator.prefix", "Evaluator takes no such argument"),
        (dict(type="Evaluator", metrics=[dict(type="HitRat")]), "val_evaluator.metrics.0.type", "did you mean"),
    ],
)
def test_mistakes_are_named(tmp_path, evaluator, key, message):
    with pytest.raises(ConfigError, match=f"{key}: .*{message}"):
        check_names(Config(config(tmp_path, val_evaluator=evaluator)))


def test_an_evaluator_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(EVALUATOR, "_modules", dict(EVALUATOR._modules))

    @EVALUATOR.register_module()
    class Doubled(Evaluator):
        def evaluate(self, size):
            return {name: 2 * value for name, value in super().evaluate(size).items()}

    runner = train(config(tmp_path, val_evaluator=dict(type="Doubled", metrics=[dict(type="HitRate")])))
    assert recorded(runner).metrics[-1]["count"] == 40


class Seen(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append((type(data_samples), data_samples))

    def compute_metrics(self, results):
        return {}


class Element:
    def __init__(self, label):
        self.label = label

    def to_dict(self):
        return dict(label=self.label)


@pytest.mark.parametrize(
    ("outputs", "seen"),
    [
        ([Element(1), dict(label=2), 3], [dict(label=1), dict(label=2), 3]),
        ((Element(1), Element(2)), [dict(label=1), dict(label=2)]),
        (torch.tensor([[1], [2]]), [torch.tensor([1]), torch.tensor([2])]),
        ([], []),
    ],
    ids=["a list", "a tuple", "a tensor", "nothing"],
)
def test_metrics_get_data_elements_as_dicts_in_a_list(outputs, seen):
    metric = Seen()
    Evaluator(metric).process(data_samples=outputs, data_batch=None)
    assert metric.results == [(list, seen)]


def test_metrics_get_what_mmengines_get():
    structures = pytest.importorskip("mmengine.structures", reason="mmengine is not installed")
    theirs = pytest.importorskip("mmengine.evaluator").Evaluator
    element = structures.BaseDataElement(metainfo=dict(path="a.png"), label=3)
    inner = structures.BaseDataElement(pred=element)
    found = []
    for kind in (Evaluator, theirs):
        metric = Seen()
        kind([metric]).process(data_samples=[element, inner, dict(label=4)], data_batch=dict(inputs=[1, 2]))
        found.append(metric.results)
    assert found[0] == found[1]


class Parts(Points):
    """As MMDetection's ConcatDataset: the ends of the parts are in ``metainfo``."""

    def __init__(self, sizes=(), metas=None):
        super().__init__(sum(sizes))
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.metainfo = (
            dict(cumulative_sizes=ends) if metas is None else [dict(each, cumulative_sizes=ends) for each in metas]
        )


def parts_config(tmp_path, monkeypatch, prefixes=("one", "two"), **data):
    monkeypatch.setattr(DATASETS, "_modules", {**DATASETS._modules, "Parts": Parts})
    evaluator = dict(
        type="MultiDatasetsEvaluator",
        metrics=[dict(type="HitRate"), dict(type="HitRate", prefix="b")],
        dataset_prefixes=prefixes,
    )
    val = {**loader(0, 8, shuffle=False), "dataset": dict(type="Parts", **data)}
    return config(tmp_path, val_dataloader=val, val_evaluator=evaluator)


@pytest.mark.parametrize("metas", [None, [dict(classes="a"), dict(classes="b")]])
def test_a_metric_for_each_part_of_the_data(tmp_path, monkeypatch, metas):
    cfg = parts_config(tmp_path, monkeypatch, sizes=(5, 12), metas=metas)
    check_names(cfg)
    runner = train(cfg)
    metrics = recorded(runner).metrics[-1]
    assert metrics["one/count"] == 5 and metrics["two/b/count"] == 12 and len(metrics) == 4
    evaluator = runner.val_loop.evaluator
    classes = [(metric.dataset_meta or {}).get("classes") for metric in evaluator.metrics]
    assert classes == ([None, None] if metas is None else ["a", "b"])


def test_parts_that_do_not_fit(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"dataset_prefixes=\('one',\): expected 2, one for each metric"):
        Runner.from_cfg(parts_config(tmp_path, monkeypatch, prefixes=("one",), sizes=(1, 2)))
    with pytest.raises(ValueError, match=r"cumulative_sizes=\[3\] .*: expected 2 numbers"):
        train(parts_config(tmp_path, monkeypatch, sizes=(3,)))
    evaluator = MultiDatasetsEvaluator([HitRate()], ["one"])
    with pytest.raises(ValueError, match=r"cumulative_sizes=\[\] "):
        evaluator.evaluate(0)
