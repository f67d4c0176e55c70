"""Evaluation metrics, over all processes."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

from ..registry import METRICS
from .data import moved
from .distributed import broadcast, gather, is_main_process

__all__ = ["BaseMetric", "Evaluator"]


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
        shares = gather(moved(self.results, "cpu"))
        self.results = []
        metrics: dict[str, Any] = {}
        if is_main_process():
            # Process r has every world_size-th sample from number r on.
            longest = max(map(len, shares))
            results = [share[index] for index in range(longest) for share in shares if index < len(share)]
            metrics = self.compute_metrics(results[:size] if len(shares) > 1 else results)
            if self.prefix:
                metrics = {f"{self.prefix}/{name}": value for name, value in metrics.items()}
        return broadcast(metrics)


class Evaluator:
    """Several metrics as one, as ``mmengine.evaluator.Evaluator``.

    Args:
        metrics: a metric, its config, or a list of these.
    """

    def __init__(self, metrics: BaseMetric | Mapping[str, Any] | Sequence[BaseMetric | Mapping[str, Any]]):
        listed = metrics if isinstance(metrics, Sequence) else [metrics]
        self.metrics: list[Any] = [METRICS.build(each) if isinstance(each, Mapping) else each for each in listed]

    @property
    def dataset_meta(self) -> Mapping[str, Any] | None:
        """Information about the data set for metrics, such as its class names."""
        return self.metrics[0].dataset_meta if self.metrics else None

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: Mapping[str, Any] | None) -> None:
        for metric in self.metrics:
            metric.dataset_meta = dataset_meta

    def begin(self) -> None:
        """Clear the results of an interrupted evaluation."""
        for metric in self.metrics:
            metric.results = []

    def process(self, data_samples: Sequence[Any], data_batch: Any = None) -> None:
        """Pass one batch to every metric."""
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
            for name, value in metric.evaluate(size).items():
                if name in results:
                    raise ValueError(f"two metrics are called {name!r}; give one of them a prefix")
                results[name] = value
        return results
