"""Metrics of a validation, over all processes."""

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

    :meth:`process` appends what it needs of each sample to ``results``, and :meth:`compute_metrics` gets those of the
    whole data set, in its order.

    Args:
        collect_device: MMEngine's, where results are collected; here it is always the CPU.
        prefix: put before the names of the metrics, with a slash; by default the class' ``default_prefix``.
    """

    default_prefix: str | None = None

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None):
        self.collect_device = collect_device
        self.prefix = prefix or self.default_prefix
        self.results: list[Any] = []
        self.dataset_meta: Mapping[str, Any] | None = None

    @abc.abstractmethod
    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Append what is needed of one batch to ``self.results``, one entry for each sample.

        Args:
            data_batch: what the data loader gave.
            data_samples: what the model returned for it.
        """

    @abc.abstractmethod
    def compute_metrics(self, results: list[Any]) -> dict[str, Any]:
        """The metrics by name, from the results of the whole data set."""

    def evaluate(self, size: int) -> dict[str, Any]:
        """The metrics over all processes, and an empty ``results`` for the next time.

        Args:
            size: number of samples in the data set; what processes got twice to have equal shares is left out.
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
        """Information on the data set that metrics may use, such as the names of its classes."""
        return self.metrics[0].dataset_meta if self.metrics else None

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: Mapping[str, Any] | None) -> None:
        for metric in self.metrics:
            metric.dataset_meta = dataset_meta

    def begin(self) -> None:
        """Forget the results of an evaluation that was interrupted."""
        for metric in self.metrics:
            metric.results = []

    def process(self, data_samples: Sequence[Any], data_batch: Any = None) -> None:
        """Show one batch to every metric."""
        for metric in self.metrics:
            metric.process(data_batch, data_samples)

    def evaluate(self, size: int) -> dict[str, Any]:
        """All metrics by name.

        Args:
            size: number of samples in the data set.

        Raises:
            ValueError: two metrics have one name.
        """
        results: dict[str, Any] = {}
        for metric in self.metrics:
            for name, value in metric.evaluate(size).items():
                if name in results:
                    raise ValueError(f"two metrics are called {name!r}; give one of them a prefix")
                results[name] = value
        return results
