"""Training one config twice, with the stock optimizer and with its fused twin, and comparing the two."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..optimizers import FUSED_TWINS
from ..training.config import Config, naming
from ..training.engine.runner import Runner
from ..training.engine.validation import check_names
from ..training.registry import OPTIMIZERS, check_config
from ..version import __version__
from .measurement import WARMUP_STEPS, OptimizerMeasurement

__all__ = ["LOSS_TOLERANCE", "Comparison", "Listener", "Run", "compare"]

#: How far the mean losses of an epoch may lie apart. The two trainings differ in rounding only, but in low precision
#: that grows: single iterations drift apart by more, while a wrong update shows in the means.
LOSS_TOLERANCE = 0.05

#: Called after every iteration with the number of iterations done, their total, and the last loss of both trainings.
Listener = Callable[[int, int, float, float], None]


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
        epochs: passes over the training data.
        seed: of weights, order and dropout.
        environment: machine, device, threads and versions.
        stock: the training with torch's optimizer.
        fused: the training with its fused twin.
    """

    config: str
    epochs: int
    seed: int
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
            "seed": self.seed,
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


@contextlib.contextmanager
def _runners(config: Config, device: torch.device) -> Iterator[tuple[Runner, Runner]]:
    """The trainings with the stock optimizer and with its fused twin; they write no files."""
    with tempfile.TemporaryDirectory() as folder:
        with naming(config):
            check_config("model", config.get("model"))
            check_config("optim_wrapper", config.get("optim_wrapper"))
            check_config("optim_wrapper.optimizer", config["optim_wrapper"].get("optimizer"))
            env_cfg, randomness = (config.get(key) or {} for key in ("env_cfg", "randomness"))
            check_config("env_cfg", env_cfg)
            check_config("randomness", randomness)
            check_names(config)
            common = {
                **config,
                "work_dir": folder,
                "resume": False,
                "log_level": "ERROR",
                "env_cfg": {**env_cfg, "device": str(device)},
                "randomness": {**randomness, "seed": randomness.get("seed") or 0},
                "default_hooks": dict.fromkeys(("runtime_info", "timer", "logger", "checkpoint")),
                "launcher": "none",
            }
            stock, fused = (
                Runner.from_cfg(Config({**common, "optim_wrapper": variant}, filename=config.filename))
                for variant in _variants(config["optim_wrapper"])
            )
            if stock.train_loop is None or not stock.train_loop.by_epoch:
                raise ValueError("compare trains by epochs: train_cfg = dict(by_epoch=True, max_epochs=...)")
        yield stock, fused


def _measured(runner: Runner, measurement: OptimizerMeasurement) -> Run:
    assert runner.optim_wrapper is not None
    metrics = {} if runner.val_loop is None else runner.val_loop.run()
    optimizer = runner.optim_wrapper.optimizer
    return Run(
        optimizer=type(optimizer).__name__,
        backend=getattr(optimizer, "backend_in_use", "torch"),
        param_groups=len(optimizer.param_groups),
        losses=measurement.losses,
        optimizer_ms=[1e3 * seconds for seconds in measurement.optimizer_seconds],
        step_ms=[1e3 * seconds for seconds in measurement.step_seconds],
        peak_bytes=round(statistics.median(measurement.peak_bytes)) if measurement.peak_bytes else None,
        metrics=metrics,
    )


def compare(config: Config, *, device: torch.device | None = None, listener: Listener | None = None) -> Comparison:
    """Train the model of a config with the stock optimizer and with its fused twin.

    The two trainings take turns, iteration by iteration, in this process, so that whatever else the machine does
    meets both. Weights, batches and dropout are the same; which of the two goes first changes after every step. There
    is one validation, at the end; a hook that stops a training has no effect. torch's global random number generator
    is seeded.

    Args:
        config: as a :class:`fusedopt.training.engine.Runner` takes it, by epochs and with one optimizer; it may name
            either of the two. Of its ``default_hooks`` only the schedulers' and the sampler's act. Not changed.
        device: where to train, the CPU by default.
        listener: is told about every iteration.

    Raises:
        ConfigError: the config is wrong.
        MissingExtraError: a package that the config needs is not installed.
    """
    device = torch.device("cpu") if device is None else device
    with _runners(config, device) as runners:
        measurements = [OptimizerMeasurement() for _ in runners]
        for runner, measurement in zip(runners, measurements, strict=True):
            runner.register_hook(measurement)
        with runners[1].running(), runners[0].running():
            _train(runners, measurements, listener)
            stock, fused = map(_measured, runners, measurements)
        return Comparison(
            config=config.filename or "config",
            epochs=runners[0].max_epochs,
            seed=runners[0].seed,
            environment=_environment(device),
            stock=stock,
            fused=fused,
        )


def _train(runners: tuple[Runner, Runner], measurements: list[OptimizerMeasurement], listener: Listener | None) -> None:
    """Train both, taking turns."""

    def call_hooks(name: str) -> None:
        for runner in runners:
            runner.call_hook(name)

    for runner in runners:
        assert runner.optim_wrapper is not None
        runner.optim_wrapper.initialize_count_status(runner.model, 0, runner.max_iters)
        runner.load_or_resume()
    call_hooks("before_train")
    order, done, total = list(runners), 0, runners[0].max_iters
    for _ in range(runners[0].max_epochs):
        call_hooks("before_train_epoch")
        for runner in runners:
            runner.model.train()
        for index, batch in enumerate(runners[0].train_dataloader or ()):
            done += 1
            for runner in order:
                torch.manual_seed(runner.seed + done)  # the same dropout in both
                assert runner.train_loop is not None
                runner.train_loop.run_iter(index, batch)
            if all(measurement.made_step for measurement in measurements):
                order.reverse()
            if listener is not None:
                listener(done, total, *(measurement.losses[-1] for measurement in measurements))
        call_hooks("after_train_epoch")
        for runner in runners:
            assert runner.train_loop is not None
            runner.train_loop.epoch += 1
    call_hooks("after_train")
