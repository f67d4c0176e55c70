"""Automatic mixed precision: a GradScaler that leaves the gradient passes to the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.amp.grad_scaler import OptState
from torch.compiler import is_dynamo_compiling

from .backends.base import device_of
from .backends.native import update_scale
from .messages import plain, plain_settings
from .optimizers.outside import outside_of_graphs
from .optimizers.shared import Shared, steps_fused
from .shards import refuse_scaling_of_flat_shards, state_is_being_made

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ``step`` adds no pass over the gradients of a fused optimizer.

    The optimizer's statistics pass finds the infs; with clipping, the same read also yields the norm. Arguments,
    state dict, growth and backoff are torch's; any number of fused and stock optimizers may share one scaler.
    ``unscale_(optimizer)`` still works; like torch's, it then writes the gradients.

    Args:
        device: type of the device that the losses are on.
        init_scale: the first scale.
        growth_factor: the scale is multiplied by it after ``growth_interval`` steps without an overflow, > 1.
        backoff_factor: the scale is multiplied by it after an overflow, < 1.
        growth_interval: number of steps without an overflow after which the scale grows.
        enabled: False makes every method do without a scale.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ):
        numbers = map(plain, (init_scale, growth_factor, backoff_factor, growth_interval, enabled))
        super().__init__(device, *numbers)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, as ``torch.amp.GradScaler.unscale_``.

        Raises:
            ValueError: a parameter of a stock optimizer is a shard of a FullyShardedDataParallel model.
            RuntimeError: called twice, or after ``step``.
        """
        if not self._enabled:
            return
        _refuse_shards(optimizer)
        if not steps_fused(optimizer):
            super().unscale_(optimizer)
            return
        shared: Shared = optimizer._shared  # type: ignore[attr-defined]
        inner = getattr(optimizer, "optimizer", None)  # Lightning has a wrapper, but steps what is in it
        asked = shared.next
        wanted = asked is not None and asked.still_wanted()
        super().unscale_(inner if getattr(inner, "_shared", None) is shared else optimizer)  # type: ignore[arg-type]
        if asked is not None and wanted:
            asked.unscaled()

    def set_growth_factor(self, new_factor: float) -> None:
        """As ``torch.amp.GradScaler.set_growth_factor``."""
        super().set_growth_factor(plain(new_factor))

    def set_backoff_factor(self, new_factor: float) -> None:
        """As ``torch.amp.GradScaler.set_backoff_factor``."""
        super().set_backoff_factor(plain(new_factor))

    def set_growth_interval(self, new_interval: int) -> None:
        """As ``torch.amp.GradScaler.set_growth_interval``."""
        super().set_growth_interval(plain(new_interval))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.amp.GradScaler.load_state_dict``."""
        super().load_state_dict(plain_settings(state_dict))

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step ``optimizer`` with unscaled gradients, or skip it when they hold inf or NaN.

        Raises:
            RuntimeError: called twice without ``update()``, or with a closure.
            ValueError: a parameter of a stock optimizer is a shard of a FullyShardedDataParallel model.
            AssertionError: no parameter of the optimizer has a gradient.
        """
        if is_dynamo_compiling() or get_eval_frame_callback() is not None:  # Note [Compiled callers]
            return self._step_outside_of_graphs(optimizer, *args, **kwargs)
        if self._enabled:
            _refuse_shards(optimizer)
        if not self._enabled or not steps_fused(optimizer):
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs or any(arg is not None for arg in args):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        record = self._per_optimizer_states[id(optimizer)]
        if record["stage"] is not OptState.READY:  # unscaled by hand, or a second step: torch's own path serves both
            return self._stock_step(optimizer, **kwargs)
        self._check_scale_growth_tracker("step")
        shared: Shared = optimizer._shared  # type: ignore[attr-defined]
        shared.scale = self._get_scale_async()
        try:
            result = optimizer.step(**kwargs)
        finally:
            shared.scale = None
        report = optimizer.last_step  # type: ignore[attr-defined]
        found_inf = None if report is None else report.found_inf
        if found_inf is None and state_is_being_made():  # of zeros; the step has asked nobody
            found_inf = torch.zeros((), device=device_of(optimizer.param_groups))
        if found_inf is None:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        record["found_inf_per_device"] = {found_inf.device: found_inf}
        record["stage"] = OptState.STEPPED
        return result

    _step_outside_of_graphs = outside_of_graphs(step)  # as the optimizer's step

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Update the scale, as ``torch.amp.GradScaler.update``."""
        if is_dynamo_compiling() or get_eval_frame_callback() is not None:  # Note [Compiled callers]
            return self._update_outside_of_graphs(new_scale)
        if not self._enabled:
            return
        records = self._per_optimizer_states
        if new_scale is None and len(records) == 1 and self._update_from(*records.values()):
            records.clear()
            return
        if len(records) > 1:
            # torch adds up the flags of several optimizers in place, but they belong to the optimizers' reports.
            for record in records.values():
                flags = record["found_inf_per_device"]
                record["found_inf_per_device"] = {device: flag.clone() for device, flag in flags.items()}
        new_scale = plain(new_scale)
        super().update(float(new_scale) if isinstance(new_scale, int) else new_scale)

    _update_outside_of_graphs = outside_of_graphs(update)

    def _update_from(self, record: dict[str, Any]) -> bool:
        """Update the scale without torch's dispatcher, if this one record's flag allows it."""
        flags = tuple(record["found_inf_per_device"].values())
        if len(flags) != 1 or self._scale is None or self._growth_tracker is None:
            return False
        return update_scale(
            self._scale,
            self._growth_tracker,
            flags[0],
            self._growth_factor,
            self._backoff_factor,
            self._growth_interval,
        )

    def _stock_step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        """torch's step, which passes scale and found_inf as attributes and leaves them set when it fails."""
        shared: Shared = optimizer._shared  # type: ignore[attr-defined]
        before = shared.grad_scale, shared.found_inf
        takes_scale = shared.takes_scale
        shared.takes_scale = True  # off only for scalers that do not know of the report
        try:
            return super().step(optimizer, **kwargs)
        except BaseException:
            shared.grad_scale, shared.found_inf = before
            raise
        finally:
            shared.takes_scale = takes_scale


def _refuse_shards(optimizer: torch.optim.Optimizer) -> None:
    if not steps_fused(optimizer):  # those ask the other processes
        refuse_scaling_of_flat_shards(optimizer.param_groups, "this GradScaler")
