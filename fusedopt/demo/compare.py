"""Training one config twice, with the stock optimizer and with its fused twin, and comparing the two."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..engine.config import Config, naming
from ..optimizers import FUSED_TWINS
from ..registry import OPTIMIZERS, check_config
from ..rules import did_you_mean
from ..version import __version__
from . import models  # noqa: F401  registers the models
from .data import Digits, load_digits, random_batches
from .training import WARMUP_STEPS, ScheduleSettings, Training

__all__ = ["LOSS_TOLERANCE", "Comparison", "Listener", "Run", "compare"]

Settings = TypeVar("Settings")

#: How far the mean losses of an epoch may lie apart. The two trainings differ in rounding only, but in low precision
#: that grows: single iterations drift apart by more, while a wrong update shows in the means.
LOSS_TOLERANCE = 0.05

#: Called after every iteration with the number of iterations done, their total, and the last loss of both trainings.
Listener = Callable[[int, int, float, float], None]


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Invalid {name}: {value!r}; expected a whole number above 0")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """``data`` of a config: images in a batch, and which share of all images, drawn by ``seed``, is held out."""

    batch_size: int = 32
    val_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("data.batch_size", self.batch_size)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """``train_cfg`` of a config: passes over the data, and the seed of weights, order and dropout."""

    max_epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("train_cfg.max_epochs", self.max_epochs)


@dataclasses.dataclass(frozen=True)
class Run:
    """Figures of one training. Times are in milliseconds and have an entry for each optimizer step.

    Args:
        optimizer: name of the optimizer's class.
        backend: what ran its steps: a backend of fusedopt, or ``torch``.
        param_groups: number of parameter groups.
        losses: training loss of each iteration.
        optimizer_ms: time from the end of backward to zeroed gradients.
        step_ms: time of the whole step, forward and backward of its iterations included.
        peak_bytes: extra memory at the peak of the optimizer's part, None where the system does not tell.
        val_loss: loss on the validation split after training.
        val_accuracy: share of the validation images that were recognized, 0 to 1.
    """

    optimizer: str
    backend: str
    param_groups: int
    losses: list[float]
    optimizer_ms: list[float]
    step_ms: list[float]
    peak_bytes: int | None
    val_loss: float
    val_accuracy: float

    @property
    def excluded_steps(self) -> int:
        """How many of the first steps the times below leave out."""
        return min(WARMUP_STEPS, len(self.optimizer_ms) - 1)

    @property
    def timed_ms(self) -> list[float]:
        """``optimizer_ms`` without the excluded steps."""
        return self.optimizer_ms[self.excluded_steps :]

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
        return statistics.median(self.step_ms[self.excluded_steps :])

    @property
    def share(self) -> float:
        """Median share of the optimizer in a whole step, 0 to 1."""
        whole = self.step_ms[self.excluded_steps :]
        return statistics.median(part / step for part, step in zip(self.timed_ms, whole, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        summary = {name: getattr(self, name) for name in ("median_ms", "p90_ms", "median_step_ms", "share")}
        return {**dataclasses.asdict(self), **summary}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two trainings of one config that differ in the optimizer's class only.

    Args:
        config: path of the config, as given.
        epochs: passes over the training split.
        seeds: ``train`` (weights, order, dropout) and ``data`` (the split).
        environment: machine, device, threads and versions.
        stock: the training with torch's optimizer.
        fused: the training with its fused twin.
    """

    config: str
    epochs: int
    seeds: dict[str, int]
    environment: dict[str, Any]
    stock: Run
    fused: Run

    @property
    def ratios(self) -> list[float]:
        """Stock over fused time of each timed optimizer step."""
        return [stock / fused for stock, fused in zip(self.stock.timed_ms, self.fused.timed_ms, strict=True)]

    @property
    def speed_up(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def speed_up_p10(self) -> float:
        """10 % of the ratios lie below."""
        return _quantile(self.ratios, 0.1)

    @property
    def speed_up_p90(self) -> float:
        """10 % of the ratios lie above."""
        return _quantile(self.ratios, 0.9)

    @property
    def largest_loss_difference(self) -> float:
        """The largest difference between the two loss curves at the same iteration."""
        return max(abs(stock - fused) for stock, fused in zip(self.stock.losses, self.fused.losses, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether the mean losses of every epoch agree within LOSS_TOLERANCE; False when one is not finite."""
        means = zip(self.epoch_losses(self.stock), self.epoch_losses(self.fused), strict=True)
        return all(abs(stock - fused) <= LOSS_TOLERANCE for stock, fused in means)

    def epoch_losses(self, run: Run) -> list[float]:
        """Mean training loss of each epoch."""
        return torch.tensor(run.losses, dtype=torch.float64).view(self.epochs, -1).mean(dim=1).tolist()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "config": self.config,
            "epochs": self.epochs,
            "seeds": self.seeds,
            "environment": self.environment,
            "excluded_steps": self.stock.excluded_steps,
            "speed_up": self.speed_up,
            "speed_up_p10": self.speed_up_p10,
            "speed_up_p90": self.speed_up_p90,
            "agrees": self.agrees,
            "loss_tolerance": LOSS_TOLERANCE,
            "largest_loss_difference": self.largest_loss_difference,
            "stock": self.stock.as_dict(),
            "fused": self.fused.as_dict(),
        }


def _quantile(values: list[float], share: float) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(share).item()


def _required(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The section ``name`` of a config, dots in it leading into dicts."""
    section: Any = config
    for key in name.split("."):
        if key not in section:
            raise KeyError(f"no `{name}`; expected {name} = dict(...)")
        section = section[key]
    check_config(name, section)
    return section


def _settings(config: Mapping[str, Any], name: str, kind: type[Settings]) -> Settings:
    """The optional section ``name`` of a config as ``kind``, a dataclass."""
    section = config.get(name, {})
    if not isinstance(section, Mapping):
        raise TypeError(f"`{name}` must be a dict, got {type(section).__name__}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in section:
        if key not in known:
            raise ValueError(f"`{name}`: unknown key {key!r}; {did_you_mean(key, known)}")
    return kind(**section)


def _variants(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``optim_wrapper`` config with the stock and with the fused optimizer, whichever of the two it names."""
    settings = dict(cfg["optimizer"])
    if "type" not in settings:
        raise KeyError("no `optim_wrapper.optimizer.type`; expected the name of an optimizer, such as 'AdamW'")
    named = settings["type"]
    optimizer_class: Any = OPTIMIZERS.resolve(named)
    stock_of = {fused: stock for stock, fused in FUSED_TWINS.items()}
    stock_class = stock_of.get(optimizer_class, optimizer_class)
    if stock_class not in FUSED_TWINS:
        known = ", ".join(name for pair in FUSED_TWINS.items() for name in (pair[0].__name__, pair[1].__name__))
        raise ValueError(f"optimizer {named!r} has no fused twin to compare with; expected one of {known}")
    fused = {**cfg, "optimizer": {**settings, "type": FUSED_TWINS[stock_class]}}
    # What only a fused optimizer takes: the stock one is clipped by the wrapper instead.
    clip_grad = settings.pop("clip_grad", None)
    for name in ("backend", "write_back_grads"):
        settings.pop(name, None)
    stock = {**cfg, "optimizer": {**settings, "type": stock_class}}
    if clip_grad is not None:
        stock["clip_grad"] = clip_grad
    return stock, fused


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": __version__,
    }


def _run(training: Training, validation: Digits) -> Run:
    val_loss, val_accuracy = training.evaluate(validation)
    optimizer = training.wrapper.optimizer
    return Run(
        optimizer=type(optimizer).__name__,
        backend=getattr(optimizer, "backend_in_use", "torch"),
        param_groups=len(optimizer.param_groups),
        losses=training.losses,
        optimizer_ms=[1e3 * seconds for seconds in training.optimizer_seconds],
        step_ms=[1e3 * seconds for seconds in training.step_seconds],
        peak_bytes=round(statistics.median(training.peak_bytes)) if training.peak_bytes else None,
        val_loss=val_loss,
        val_accuracy=val_accuracy,
    )


def compare(
    path: str | Path,
    *,
    epochs: int | None = None,
    device: torch.device | None = None,
    listener: Listener | None = None,
) -> Comparison:
    """Train the model of a config with the stock optimizer and with its fused twin.

    The two trainings take turns, iteration by iteration, in this process, so that whatever else the machine does
    meets both. Weights, batches and dropout are the same; which of the two goes first changes after every step.
    torch's global random number generator is seeded.

    Args:
        path: the config; it may name either of the two optimizers.
        epochs: passes over the data, in place of the config's.
        device: where to train, the CPU by default.
        listener: is told about every iteration.

    Raises:
        ConfigError: the config is wrong.
        MissingExtraError: scikit-learn is not installed.
    """
    device = torch.device("cpu") if device is None else device
    config = Config.fromfile(path)
    with naming(config):
        model, optim_wrapper, _ = (
            _required(config, name) for name in ("model", "optim_wrapper", "optim_wrapper.optimizer")
        )
        data = _settings(config, "data", DataSettings)
        train = _settings(config, "train_cfg", TrainSettings)
        schedule = _settings(config, "lr_schedule", ScheduleSettings)
        if epochs is not None:
            train = dataclasses.replace(train, max_epochs=epochs)
        splits = load_digits(data.val_fraction, data.seed)
        training_split, validation_split = (split.to(device) for split in splits)
        total = train.max_epochs * (len(training_split.labels) // data.batch_size)
        if total < 1:
            raise ValueError(f"data.batch_size {data.batch_size} is more than the {len(training_split.labels)} images")
        stock, fused = (
            Training(model, variant, schedule, total, train.seed, device) for variant in _variants(optim_wrapper)
        )
    order = [stock, fused]
    for done, batch in enumerate(
        random_batches(training_split, data.batch_size, train.max_epochs, train.seed), start=1
    ):
        stepped = [training.train(batch, seed=train.seed + done) for training in order]
        if all(stepped):
            order.reverse()
        if listener is not None:
            listener(done, total, stock.losses[-1], fused.losses[-1])
    return Comparison(
        config=str(path),
        epochs=train.max_epochs,
        seeds={"train": train.seed, "data": data.seed},
        environment=_environment(device),
        stock=_run(stock, validation_split),
        fused=_run(fused, validation_split),
    )
