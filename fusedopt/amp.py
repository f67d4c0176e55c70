"""Automatic mixed precision: a GradScaler that leaves the gradient passes to the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from .backends.native import update_scale
from .optimizers import FusedOptimizer

__all__ = ["GradScaler"]


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` whose ``step`` makes no gradient pass of its own for a fused optimizer.

    The optimizer's statistics pass finds the infs, in the same read that finds the norm when it clips. Arguments,
    state dict, growth and backoff are torch's; any number of fused and stock optimizers may share one scaler.
    ``unscale_(optimizer)`` still works, and then writes the gradients as torch's does.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step ``optimizer`` with unscaled gradients, or skip it when they hold inf or NaN.

        Raises:
            RuntimeError: called twice without ``update()``, or with a closure.
            AssertionError: no parameter of the optimizer has a gradient.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        if "closure" in kwargs or any(arg is not None for arg in args):
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        record = self._per_optimizer_states[id(optimizer)]
        if record["stage"] is not OptState.READY:  # unscaled by hand, or a second step: torch's own path serves both
            return self._stock_step(optimizer, **kwargs)
        self._check_scale_growth_tracker("step")
        optimizer._scale_of_scaler = self._get_scale_async()
        try:
            result = optimizer.step(**kwargs)
        finally:
            optimizer._scale_of_scaler = None
        report = optimizer.last_step
        if report is None or report.found_inf is None:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        record["found_inf_per_device"] = {report.found_inf.device: report.found_inf}
        record["stage"] = OptState.STEPPED
        return result

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Update the scale, as ``torch.amp.GradScaler.update``."""
        if not self._enabled:
            return
        records = self._per_optimizer_states
        if new_scale is None and len(records) == 1 and self._update_from(*records.values()):
            records.clear()
            return
        if len(records) > 1:
            # torch adds the flags of several optimizers up in place; those are the optimizers' reports.
            for record in records.values():
                flags = record["found_inf_per_device"]
                record["found_inf_per_device"] = {device: flag.clone() for device, flag in flags.items()}
        super().update(new_scale)

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

    def _stock_step(self, optimizer: FusedOptimizer, **kwargs: Any) -> Any:
        """torch's step, which hands scale and found_inf over as attributes and leaves them there when it fails."""
        own = vars(optimizer)
        before: dict[str, Any] = {name: own[name] for name in ("grad_scale", "found_inf") if name in own}
        try:
            return super().step(optimizer, **kwargs)
        except BaseException:
            for name in ("grad_scale", "found_inf"):
                own.pop(name, None)
            own.update(before)
            raise
