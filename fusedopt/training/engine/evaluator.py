"""Evaluation metrics, over all processes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..registry import EVALUATOR, METRICS
from .data import moved
from .distributed import broadcast, gather, is_main_process

__all__ = ["BaseMetric", "Evaluator", "MultiDatasetsEvaluator"]


class BaseMetric(abc.ABC):
    """Base of the metrics, as ``mmengine.evaluator.BaseMetric``.

    :meth:`process` appends what it needs from each sample to ``results``, and :meth:`compute_metrics` gets the results
    of the whole data set in order.

    Args:
        collect_device: accepted for MMEngine's sake; results are always collected on the CPU.
        prefix: put before the names of the metrics, with a slash; by default the class's ``default_prefix``.
    """

    default_prefix: str | None = None

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None):
        self.collect_device = collect_device
        self.prefix = prefix or self.default_prefix
        self.results: list[Any] = []
        self.dataset_meta: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Append one entry for each sample of a batch to ``self.results``.

        Args:
            data_batch: the batch from the data loader.
            data_samples: the model's outputs for it.
        """

    @abc.abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """Compute the metrics by name from the results of the whole data set."""

    def evaluate(self, size: int) -> dict[str, Any]:
        """Compute the metrics over all processes, and empty ``results``.

        Args:
            size: number of samples in the data set; duplicates that pad the processes' shares are dropped.
        """
        results = _collected(self, size)
        metrics: dict[str, Any] = {}
        if results is not None:
            metrics = self.compute_metrics(results)
            if self.prefix:
                metrics = {f"{self.prefix}/{name}": value for name, value in metrics.items()}
        return broadcast(metrics)


def _collected(metric: Any, size: int) -> list[Any] | None:
    """Empty a metric's ``results``, and return those of all processes in the main process, None in the others."""
    shares = gather(moved(metric.results, "cpu"))
    metric.results = []
    if not is_main_process():
        return None
    # Process r has every world_size-th sample from number r on.
    longest = max(map(len, shares))
    results = [share[index] for index in range(longest) for share in shares if index < len(share)]
    return results[:size] if len(shares) > 1 else results


@EVALUATOR.register_module()
class Evaluator:
    """Several metrics as one, as ``mmengine.evaluator.Evaluator``.

    Args:
        metrics: a metric, its config, or a list of these.
    """

    def __init__(self, metrics: BaseMetric | Mapping[str, Any] | Sequence[BaseMetric | Mapping[str, Any]]):
        self._dataset_meta: Any = None
        listed = metrics if isinstance(metrics, Sequence) else [metrics]
        self.metrics: list[Any] = [METRICS.build(each) if isinstance(each, Mapping) else each for each in listed]

    @property
    def dataset_meta(self) -> Any:
        """Information about the data set for metrics, such as its class names; or a sequence of it, for each part."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: Any) -> None:
        self._dataset_meta = dataset_meta
        for number, metric in enumerate(self.metrics):
            metric.dataset_meta = self._meta_of(number)

    def _meta_of(self, number: int) -> Any:
        """What a metric is told about the data set."""
        return self.dataset_meta

    def begin(self) -> None:
        """Clear the results of an interrupted evaluation."""
        for metric in self.metrics:
            metric.results = []

    def process(self, data_samples: Sequence[Any], data_batch: Any = None) -> None:
        """Pass one batch to every metric; predictions that have ``to_dict``, as MMEngine's data elements, as dicts."""
        if isinstance(data_samples, (Sequence, Tensor)):
            data_samples = [sample.to_dict() if hasattr(sample, "to_dict") else sample for sample in data_samples]
        for metric in self.metrics:
            metric.process(data_batch, data_samples)

    def evaluate(self, size: int) -> dict[str, Any]:
        """Compute all metrics by name.

        Args:
            size: number of samples in the data set.

        Raises:
            ValueError: two metrics have the same name.
        """
        results: dict[str, Any] = {}
        for metric in self.metrics:
            _add(results, metric.evaluate(size))
        return results


def _add(results: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name in results:
            raise ValueError(f"two metrics are called {name!r}; give one of them a prefix")
        results[name] = value


@EVALUATOR.register_module(replaceable=True)
class MultiDatasetsEvaluator(Evaluator):
    """A metric for each part of a concatenated data set, as in MMDetection.

    The data set's ``metainfo`` is a dict, or a sequence of one for each part, and the first has ``cumulative_sizes``:
    for each part, the number of samples up to its end. Names are ``dataset_prefix/metric_prefix/name``.

    Args:
        metrics: the metrics or their configs, in the order of the parts.
        dataset_prefixes: a name for each part.

    Raises:
        ValueError: there is not one prefix for each metric.
    """

    def __init__(self, metrics: Any, dataset_prefixes: Sequence[str]):
        super().__init__(metrics)
        if len(dataset_prefixes) != len(self.metrics):
            raise ValueError(
                f"dataset_prefixes={dataset_prefixes!r}: expected {len(self.metrics)}, one for each metric"
            )
        self.dataset_prefixes = dataset_prefixes

    def _meta_of(self, number: int) -> Any:
        meta = self.dataset_meta
        return meta[number] if isinstance(meta, Sequence) else meta

    def evaluate(self, size: int) -> dict[str, Any]:
        """Compute each metric on the samples of its part.

        Args:
            size: number of samples in the whole data set.

        Raises:
            ValueError: the data set does not say where its parts end, or two metrics have the same name.
        """
        ends = list((self._meta_of(0) or {}).get("cumulative_sizes", ()))
        if len(ends) != len(self.metrics):
            raise ValueError(
                f"cumulative_sizes={ends!r} in the metainfo of the data set: expected {len(self.metrics)} numbers, one "
                "for each metric"
            )
        found: dict[str, Any] = {}
        for metric, name, start, end in zip(self.metrics, self.dataset_prefixes, [0, *ends], ends, strict=False):
            results = _collected(metric, size)
            if results is not None:
                prefix = "/".join(filter(None, (name, metric.prefix)))
                metrics = metric.compute_metrics(results[start:end])
                _add(found, {f"{prefix}/{key}": value for key, value in metrics.items()})
        return broadcast(found)
