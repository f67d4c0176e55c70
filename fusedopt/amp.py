"""Automatic mixed precision: a GradScaler that leaves the gradient passes to the fused step."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

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
        if args or kwargs.get("closure") is not None:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        record = self._per_optimizer_states[id(optimizer)]
        if record["stage"] is not OptState.READY:  # unscaled by hand, or a second step: torch's own path serves both
            return super().step(optimizer, **kwargs)
        self._check_scale_growth_tracker("step")
        result = optimizer.step(grad_scale=self._get_scale_async(), **kwargs)
        report = optimizer.last_step
        if report is None or report.found_inf is None:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        # A copy: update() adds the flags of several optimizers up in place, and the report keeps its own.
        record["found_inf_per_device"] = {report.found_inf.device: report.found_inf.clone()}
        record["stage"] = OptState.STEPPED
        return result
