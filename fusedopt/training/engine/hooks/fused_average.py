"""FusedAverage: the average that fused optimizers keep, for EMAHook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....messages import deal_out_as, parse_dtype
from ....optimizers.averages import begin_again, keep_average, steps_of
from ....optimizers.base import FusedOptimizer
from ....rules import Average, counted_key, new_count
from ...averaging import ExponentialMovingAverage, MomentumAnnealingEMA
from ...registry import MODELS
from ...unwrapping import named_parameters
from ..checks import wrappers_by_name
from ..data import moved

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["PREFIX", "FusedAverage"]

#: Prefix of the names of the model's weights in the average's state dict.
PREFIX = "module."


class FusedAverage:
    """What :class:`EMAHook` does with the averages of a run's optimizers.

    Args:
        cfg: the config of an averaged model, which was checked.
        begin_iter: number of the first iteration, counted from 1, that updates the average.
        begin_epoch: number of the first epoch, counted from 1, whose iterations do.

    Raises:
        ValueError: an average that a step cannot keep.
    """

    def __init__(self, cfg: Mapping[str, Any], begin_iter: int, begin_epoch: int):
        kind = MODELS.resolve(cfg["type"])
        if kind not in (ExponentialMovingAverage, MomentumAnnealingEMA):
            raise ValueError(
                f"EMAHook(fused=True) cannot keep {getattr(kind, '__name__', kind)}; expected ema_type "
                "'ExponentialMovingAverage' or 'MomentumAnnealingEMA', or fused=False"
            )
        for key, why in (
            ("device", "the average is where the parameters are"),
            ("update_buffers", "a step knows no buffers"),
        ):
            if cfg.get(key):
                raise ValueError(f"EMAHook(fused=True) cannot have {key}={cfg[key]!r}: {why}; omit it, or fused=False")
        if parse_dtype(cfg.get("dtype")) not in (None, torch.float32):
            raise ValueError(
                f"EMAHook(fused=True) cannot have dtype={cfg['dtype']!r}: the average is in float32 (of float64 "
                "parameters in float64); omit it, or fused=False"
            )
        known = kind(torch.nn.Module(), **{key: cfg[key] for key in ("momentum", "gamma", "interval") if key in cfg})
        self._momentum, self._interval = known.momentum, known.interval
        self._gamma = getattr(known, "gamma", None)
        self._begin_iter, self._begin_epoch = begin_iter, begin_epoch

    def settle(self, runner: Runner) -> None:
        """Let the optimizers of a run keep the average.

        Raises:
            TypeError: one is not fused.
            ValueError: one keeps another average, or nobody can know at which step the average begins.
        """
        for name, wrapper in self._wrappers(runner).items():
            begin = self._iterations_before(runner) // wrapper._accumulative_counts
            average = Average(momentum=self._momentum, gamma=self._gamma, begin=begin, interval=self._interval)
            optimizer = wrapper.optimizer
            if not isinstance(optimizer, FusedOptimizer):
                raise TypeError(
                    f"EMAHook(fused=True) needs a fused optimizer, whose step averages; the "
                    f"optimizer{name and f' {name!r}'} is of class {type(optimizer).__name__}; "
                    f"expected FusedSGD, FusedAdam or FusedAdamW, or fused=False"
                )
            try:
                keep_average(optimizer, average)
            except ValueError as error:
                raise ValueError(f"EMAHook(fused=True): {error}") from error

    def begin_again(self, runner: Runner) -> None:
        """Forget the averages: they begin with the weights that the next step finds."""
        for wrapper in self._wrappers(runner).values():
            begin_again(wrapper.optimizer)

    @contextmanager
    def applied_to(self, runner: Runner) -> Iterator[None]:
        """Put the averages in the place of the weights inside the block."""
        with ExitStack() as stack:
            for wrapper in self._wrappers(runner).values():
                stack.enter_context(wrapper.optimizer.averaged())
            yield

    def save(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """See :meth:`EMAHook.before_save_checkpoint`. Averages are saved in the parameters' dtypes."""
        own = checkpoint["state_dict"]
        averages, steps = self._averages(runner)
        state = {PREFIX + name: value for name, value in own.items()}
        state["steps"] = torch.tensor(steps)
        names = named_parameters(runner.bare_model, remove_duplicate=False)
        averaged = {name: averages[param].to(param.dtype) for name, param in names if param in averages and name in own}
        checkpoint["state_dict"] = copy(own)  # which keeps the versions that torch attaches to a state dict
        checkpoint["state_dict"].update(moved(averaged, "cpu"))
        checkpoint["ema_state_dict"] = state

    def take(self, runner: Runner, weights: Mapping[str, Any], steps: Any) -> None:
        """Take averages of a checkpoint for parameters whose state, which was loaded, has none.

        Args:
            runner: the run.
            weights: the averages by name.
            steps: how many updates they have seen.
        """
        named = dict(named_parameters(runner.bare_model, remove_duplicate=False))
        for wrapper in self._wrappers(runner).values():
            optimizer = wrapper.optimizer
            state = optimizer.state
            stateless = {
                param
                for group in optimizer.param_groups
                for param in group["params"]
                if param.requires_grad and optimizer.rule.needed_keys(group, param, optimizer._precision) == ["ema"]
            }
            for name, param in named.items():
                # What has no state but the average may have stepped without an entry.
                if param in stateless and not state.get(param) and steps is not None and int(steps):
                    state[param] = {"ema": None}
                entry = state.get(param)
                if entry and "ema" in entry and entry["ema"] is None and steps is not None and int(steps):
                    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                    value = weights[name].detach().to(device=param.device, dtype=dtype, copy=True)
                    entry["ema"] = deal_out_as(param, value)
                    self._count(wrapper, param, entry, int(steps))

    def _count(self, wrapper: Any, param: Tensor, entry: dict[str, Any], steps: int) -> None:
        """Where no state dict counts the steps: let those that the average has seen be counted, or it would begin."""
        optimizer = wrapper.optimizer
        if optimizer._counts is not None and (key := counted_key(optimizer.rule, entry)) is not None:
            before = optimizer._counts.of_entry(param, entry)
            least = optimizer.ema["begin"] + max(steps // wrapper._accumulative_counts, 1)
            count = max(least, 0 if before is None else int(before))
            optimizer._counts.put(param, entry[key], new_count(count, param.device))

    def _averages(self, runner: Runner) -> tuple[dict[Tensor, Tensor], int]:
        """The averages by parameter, and how many updates they have seen."""
        averages: dict[Tensor, Tensor] = {}
        steps = 0
        for wrapper in self._wrappers(runner).values():
            optimizer = wrapper.optimizer
            averages.update(optimizer.averages())
            steps = max(steps, steps_of(optimizer) - optimizer.ema["begin"])
        return averages, steps

    def _wrappers(self, runner: Runner) -> dict[str, Any]:
        return {} if runner.optim_wrapper is None else wrappers_by_name(runner)

    def _iterations_before(self, runner: Runner) -> int:
        """Iterations before the first that updates the average."""
        if self._begin_epoch <= 1:
            return max(self._begin_iter - 1, 0)
        if runner.train_loop is None or not runner.train_loop.by_epoch:
            raise ValueError(
                f"EMAHook(fused=True): begin_epoch={self._begin_epoch} in a training by iterations; expected begin_iter"
            )
        return (self._begin_epoch - 1) * len(runner.train_dataloader)
