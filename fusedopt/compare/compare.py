"""Training one config with the stock optimizer, with torch's fused one and with the fused twin, and comparing them."""

from __future__ import annotations

import contextlib
import itertools
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..training.config import Config, naming
from ..training.engine.runner import Runner
from ..training.engine.validation import check_names
from ..training.registry import check_config
from ..version import __version__
from .comparison import Comparison, Moved, Run
from .measurement import OptimizerMeasurement
from .variants import move_one_weight, stock_and_fused, torch_way, why_no_torch_fused, with_torch_fused

__all__ = ["Listener", "compare"]

#: Called after every iteration with the number of iterations done, their total, and the last loss of the stock and of
#: the fused run.
Listener = Callable[[int, int, float, float], None]


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


def _optimizer(runner: Runner) -> Any:
    assert runner.optim_wrapper is not None
    return runner.optim_wrapper.optimizer


@contextlib.contextmanager
def _runners(config: Config, device: torch.device) -> Iterator[tuple[dict[str, Runner], str | None]]:
    """The Runners by the names of :class:`Comparison`, and why there is no ``torch_fused``; they write no files."""
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

            def made(optim_wrapper: Mapping[str, Any]) -> Runner:
                return Runner.from_cfg(Config({**common, "optim_wrapper": optim_wrapper}, filename=config.filename))

            stock_config, fused_config = stock_and_fused(config["optim_wrapper"])
            runners = {"stock": made(stock_config)}
            if runners["stock"].train_loop is None or not runners["stock"].train_loop.by_epoch:
                raise ValueError("compare trains by epochs: train_cfg = dict(by_epoch=True, max_epochs=...)")
            reason = why_no_torch_fused(_optimizer(runners["stock"]))
            if reason is None:
                runners["torch_fused"] = made(with_torch_fused(stock_config))
            runners["fused"] = made(fused_config)
            runners["moved"] = made(stock_config)
        yield runners, reason


def _metrics(runner: Runner) -> dict[str, float]:
    return {} if runner.val_loop is None else runner.val_loop.run()


def _measured(runner: Runner, measurement: OptimizerMeasurement) -> Run:
    optimizer = _optimizer(runner)
    backend = getattr(optimizer, "backend_in_use", None)
    return Run(
        optimizer=type(optimizer).__name__,
        backend=torch_way(optimizer) if backend is None else backend,
        param_groups=len(optimizer.param_groups),
        losses=measurement.losses,
        optimizer_ms=[1e3 * seconds for seconds in measurement.optimizer_seconds],
        step_ms=[1e3 * seconds for seconds in measurement.step_seconds],
        peak_bytes=round(statistics.median(measurement.peak_bytes)) if measurement.peak_bytes else None,
        metrics=_metrics(runner),
    )


def compare(config: Config, *, device: torch.device | None = None, listener: Listener | None = None) -> Comparison:
    """Train the model of a config with the stock optimizer, with torch's fused one and with the fused twin.

    A fourth run, which is not timed, is the noise floor: the stock optimizer from a start in which one weight is moved
    by one ulp. Differences of losses of the size that this makes say nothing about an optimizer.

    All take turns, iteration by iteration, in this process, so that whatever else the machine does meets all of them.
    Weights, batches and dropout are the same; the order of the timed runs changes after every step. There is one
    validation, at the end; a hook that stops a run has no effect. torch's global random number generator is seeded.

    Args:
        config: as a :class:`fusedopt.training.engine.Runner` takes it, by epochs and with one optimizer; it may name
            the stock optimizer or the fused twin. Of its ``default_hooks`` only the schedulers' and the sampler's act.
            Not changed.
        device: where to train, the CPU by default.
        listener: is told about every iteration.

    Raises:
        ConfigError: the config is wrong.
        MissingExtraError: a package that the config needs is not installed.
    """
    device = torch.device("cpu") if device is None else device
    with _runners(config, device) as (runners, reason), contextlib.ExitStack() as running:
        measurements = {name: OptimizerMeasurement() for name in runners}
        for name, runner in runners.items():
            runner.register_hook(measurements[name])
        for runner in reversed(runners.values()):
            running.enter_context(runner.running())
        weight = _train(runners, measurements, listener)
        timed = {name: _measured(runners[name], measurements[name]) for name in runners if name != "moved"}
        return Comparison(
            config=config.filename or "config",
            epochs=runners["stock"].max_epochs,
            seed=runners["stock"].seed,
            environment=_environment(device),
            moved=Moved(*weight, losses=measurements["moved"].losses, metrics=_metrics(runners["moved"])),
            no_torch_fused=reason,
            **timed,
        )


def _train(
    runners: Mapping[str, Runner], measurements: Mapping[str, OptimizerMeasurement], listener: Listener | None
) -> tuple[str, float, float]:
    """Train all of them, taking turns; returns what move_one_weight did."""

    def call_hooks(name: str) -> None:
        for runner in runners.values():
            runner.call_hook(name)

    for runner in runners.values():
        assert runner.optim_wrapper is not None
        runner.optim_wrapper.initialize_count_status(runner.model, 0, runner.max_iters)
        runner.load_or_resume()
    weight = move_one_weight(runners["moved"].model)
    call_hooks("before_train")
    stock, moved = runners["stock"], runners["moved"]
    orders: Iterator[Sequence[Runner]] = itertools.cycle(
        itertools.permutations([runner for runner in runners.values() if runner is not moved])
    )
    order, done = next(orders), 0
    for _ in range(stock.max_epochs):
        call_hooks("before_train_epoch")
        for runner in runners.values():
            runner.model.train()
        for index, batch in enumerate(stock.train_dataloader or ()):
            done += 1
            for runner in (*order, moved):
                torch.manual_seed(runner.seed + done)  # the same dropout in all
                assert runner.train_loop is not None
                with runner.message_hub.as_current():
                    runner.train_loop.run_iter(index, batch)
            if all(measurement.made_step for measurement in measurements.values()):
                order = next(orders)
            if listener is not None:
                listener(done, stock.max_iters, *(measurements[name].losses[-1] for name in ("stock", "fused")))
        call_hooks("after_train_epoch")
        for runner in runners.values():
            assert runner.train_loop is not None
            runner.train_loop.epoch += 1
    call_hooks("after_train")
    return weight
