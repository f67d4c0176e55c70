"""What a comparison has found: the runs, how far their losses lie apart, and who is how many times as fast as whom."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import torch

from .measurement import WARMUP_STEPS

__all__ = ["LOSS_TOLERANCE", "TORCH_WAYS", "Comparison", "Moved", "Ratio", "Run"]

#: How far the mean losses of an epoch may lie apart. Two runs differ in rounding only, but in low precision that grows:
#: single iterations drift apart by more, while a wrong update shows in the means.
LOSS_TOLERANCE = 0.05

#: How torch runs a step; the values of :attr:`Run.backend` for its optimizers.
TORCH_WAYS = ("for-loop", "foreach", "fused")

_MEASURED = ("median_ms", "p90_ms", "median_step_ms", "share")
_KINDS = {"optimizer": "timed_ms", "whole step": "timed_step_ms"}


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


@dataclasses.dataclass(frozen=True)
class Run:
    """Figures of one run. Times are in milliseconds and have an entry for each optimizer step.

    Args:
        optimizer: name of the optimizer's class.
        backend: what ran its steps: a backend of fusedopt, or one of TORCH_WAYS.
        param_groups: number of parameter groups.
        losses: training loss of each iteration.
        optimizer_ms: time from the end of backward to zeroed gradients.
        step_ms: time of the whole step, forward and backward of its iterations included.
        peak_bytes: extra memory at the peak of the optimizer's part, None where the system does not tell.
        metrics: what the validation after training gave, by name; empty where the config has no validation.
    """

    optimizer: str
    backend: str
    param_groups: int
    losses: list[float]
    optimizer_ms: list[float]
    step_ms: list[float]
    peak_bytes: int | None
    metrics: dict[str, float]

    @property
    def name(self) -> str:
        """What to call it beside the others: ``"torch's for-loop AdamW"``, ``"FusedAdamW"``."""
        return f"torch's {self.backend} {self.optimizer}" if self.backend in TORCH_WAYS else self.optimizer

    @property
    def excluded_steps(self) -> int:
        """How many of the first steps the times below leave out."""
        return min(WARMUP_STEPS, len(self.optimizer_ms) - 1)

    @property
    def timed_ms(self) -> list[float]:
        """``optimizer_ms`` without the excluded steps."""
        return self.optimizer_ms[self.excluded_steps :]

    @property
    def timed_step_ms(self) -> list[float]:
        """``step_ms`` without the excluded steps."""
        return self.step_ms[self.excluded_steps :]

    @property
    def median_ms(self) -> float:
        """Median time of the optimizer's part."""
        return statistics.median(self.timed_ms)

    @property
    def p90_ms(self) -> float:
        """The time that 90 % of the steps stay within."""
        return _quantile(self.timed_ms, 0.9)

    @property
    def median_step_ms(self) -> float:
        """Median time of the whole step."""
        return statistics.median(self.timed_step_ms)

    @property
    def share(self) -> float:
        """Median share of the optimizer in a whole step, 0 to 1."""
        return statistics.median(part / step for part, step in zip(self.timed_ms, self.timed_step_ms, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"name": self.name, **dataclasses.asdict(self), **{name: getattr(self, name) for name in _MEASURED}}


@dataclasses.dataclass(frozen=True)
class Moved:
    """The noise floor: the stock run again, from a start in which one weight is moved by one ulp. It is not timed.

    Args:
        parameter: name of the parameter with that weight.
        before, after: the weight.
        losses, metrics: as in :class:`Run`.
    """

    parameter: str
    before: float
    after: float
    losses: list[float]
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast one run is as another, over the pairs of timed steps.

    Args:
        part: of a step: the ``'optimizer'`` alone, or the ``'whole step'``.
        of, against: names of the two.
        median: of the pairs.
        p10, p90: 10 % of the pairs lie below, and above.
    """

    part: str
    of: str
    against: str
    median: float
    p10: float
    p90: float

    def __str__(self) -> str:
        return f"{self.median:.2f} times as fast as {self.against}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs of one config that differ in the optimizer only.

    Args:
        config: path of the config, as given.
        epochs: passes over the training data.
        seed: of weights, order and dropout.
        environment: machine, device, threads and versions.
        stock: torch's optimizer, as the config has it.
        fused: its fused twin.
        moved: torch's optimizer again, from another start.
        torch_fused: torch's optimizer with ``fused=True``, or None.
        no_torch_fused: why that one is missing.
    """

    config: str
    epochs: int
    seed: int
    environment: dict[str, Any]
    stock: Run
    fused: Run
    moved: Moved
    torch_fused: Run | None = None
    no_torch_fused: str | None = None

    @property
    def timed(self) -> list[Run]:
        """The runs that are timed: the stock one first, the fused twin last."""
        return [run for run in (self.stock, self.torch_fused, self.fused) if run is not None]

    @property
    def ratios(self) -> list[Ratio]:
        """Of each pair of runs, the later one in ``timed`` against the earlier; none of runs that disagree."""
        learned = [run for run in self.timed if self.agree(run)] if self.agrees else []
        return [
            _ratio(part, of, against)
            for part in _KINDS
            for number, of in enumerate(learned)
            for against in learned[:number]
        ]

    def ratio(self, part: str, of: Run, against: Run) -> Ratio | None:
        """One of the ratios, if it is there."""
        wanted = (part, of.name, against.name)
        return next((ratio for ratio in self.ratios if (ratio.part, ratio.of, ratio.against) == wanted), None)

    @property
    def agrees(self) -> bool:
        """Whether stock and fused agree."""
        return self.agree(self.fused)

    def agree(self, run: Run) -> bool:
        """Whether a run's mean losses of every epoch are the stock run's within LOSS_TOLERANCE, and finite."""
        means = zip(self.epoch_losses(self.stock), self.epoch_losses(run), strict=True)
        return all(abs(stock - other) <= LOSS_TOLERANCE for stock, other in means)

    def largest_loss_difference(self, run: Run | Moved) -> float:
        """The largest difference between a run's loss and the stock run's at the same iteration."""
        return max(abs(stock - other) for stock, other in zip(self.stock.losses, run.losses, strict=True))

    def epoch_losses(self, run: Run | Moved) -> list[float]:
        """Mean training loss of each epoch."""
        return torch.tensor(run.losses, dtype=torch.float64).view(self.epochs, -1).mean(dim=1).tolist()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        runs = {"torch_fused": self.torch_fused, "fused": self.fused, "moved": self.moved}
        return {
            "config": self.config,
            "epochs": self.epochs,
            "seed": self.seed,
            "environment": self.environment,
            "excluded_steps": self.stock.excluded_steps,
            "agrees": self.agrees,
            "loss_tolerance": LOSS_TOLERANCE,
            "largest_loss_difference": {
                "against": self.stock.name,
                **{key: self.largest_loss_difference(run) for key, run in runs.items() if run is not None},
            },
            "ratios": [{**dataclasses.asdict(ratio), "text": str(ratio)} for ratio in self.ratios],
            "stock": self.stock.as_dict(),
            "torch_fused": None if self.torch_fused is None else self.torch_fused.as_dict(),
            "no_torch_fused": self.no_torch_fused,
            "fused": self.fused.as_dict(),
            "moved": dataclasses.asdict(self.moved),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Comparison:
        """A comparison from what ``as_dict`` gave."""

        def made(kind: Any, values: Mapping[str, Any]) -> Any:
            return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})

        kinds = {"stock": Run, "torch_fused": Run, "fused": Run, "moved": Moved}
        runs = {key: content[key] and made(kind, content[key]) for key, kind in kinds.items()}
        return made(cls, {**content, **runs})


def _ratio(part: str, of: Run, against: Run) -> Ratio:
    pairs = zip(getattr(against, _KINDS[part]), getattr(of, _KINDS[part]), strict=True)
    values = [slow / fast for slow, fast in pairs]
    quantiles = (_quantile(values, 0.1), _quantile(values, 0.9))
    return Ratio(part, of.name, against.name, statistics.median(values), *quantiles)
