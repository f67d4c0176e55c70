"""fusedopt's wrappers as subclasses of MMEngine's, which its Runner requires."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mmengine.optim
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import Tensor

from ...training.wrappers import AmpOptimWrapper, OptimWrapper
from ...training.wrappers.base import taking
from ..mmengine_log import announce_path

__all__ = ["FusedAmpOptimWrapper", "FusedOptimWrapper"]

#: The most values that wait on the device until they are read.
_MOST_PENDING = 1024


class _DeferredHistory(HistoryBuffer):
    """A history of numbers whose latest are still on the device; reading it waits for them."""

    def __init__(self, source: HistoryBuffer | None = None):
        self._pending: list[Tensor] = []
        super().__init__(*(([], []) if source is None else source.data))

    def append(self, value: Tensor) -> None:
        """Add a 0-dim tensor without waiting for it."""
        self._pending.append(value)
        if len(self._pending) >= _MOST_PENDING:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if pending:  # one read for all
            device = pending[0].device
            for value in torch.stack([each.to(device, torch.float64) for each in pending]).tolist():
                self.update(value)

    @property
    def _log_history(self) -> Any:
        self._flush()
        return self._values

    @_log_history.setter
    def _log_history(self, values: Any) -> None:
        self._values = values

    @property
    def _count_history(self) -> Any:
        self._flush()
        return self._counts

    @_count_history.setter
    def _count_history(self, counts: Any) -> None:
        self._counts = counts

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and checkpoints hold MMEngine's own class, so that they load without fusedopt.
        return HistoryBuffer, (*self.data, self.max_length)


class _InsideMMEngine(OptimWrapper):
    """Logs the path and the gradient norm, as MMEngine's wrappers log it."""

    def __init__(self, *args: Any, **kwargs: Any):
        with taking(kwargs.get("optimizer", args[0] if args else None)):
            super().__init__(*args, **kwargs)
            self.message_hub = MessageHub.get_current_instance()
            announce_path(self)

    def step(self, **kwargs: Any) -> None:
        """Step, and log ``train/grad_norm`` if gradients are clipped by norm, without waiting for it."""
        super().step(**kwargs)
        self._log_norm()

    @property
    def clip_func(self) -> Callable[..., Any]:
        """The function that clips for an optimizer that is not fused; AttributeError without clipping."""
        return torch.nn.utils.clip_grad_norm_ if self._clips_by("norm") else torch.nn.utils.clip_grad_value_

    @property
    def grad_name(self) -> str:
        """``'grad_norm'`` or ``'grad_value'``; AttributeError without clipping."""
        return "grad_norm" if self._clips_by("norm") else "grad_value"

    def _clips_by(self, kind: str) -> bool:
        if self.clip_grad is None:
            raise AttributeError(f"{type(self).__name__} does not clip: clip_grad is None")
        return self.clip_grad["type"] == kind

    def _clip_grad(self) -> None:
        """As in fusedopt, and log the norm."""
        super()._clip_grad()
        if self._stock_clip is not None:
            self._log_norm()

    def _log_norm(self) -> None:
        norm = self.grad_norm
        if norm is not None:
            scalars = self.message_hub.log_scalars
            history = scalars.get("train/grad_norm")
            if not isinstance(history, _DeferredHistory):  # none yet, or one from a checkpoint
                self.message_hub._set_resumed_keys("train/grad_norm", True)
                history = scalars["train/grad_norm"] = _DeferredHistory(history)
            history.append(norm)


class FusedOptimWrapper(_InsideMMEngine, mmengine.optim.OptimWrapper):
    """:class:`fusedopt.OptimWrapper` for MMEngine's Runner.

    Errors, state dict and log are as in :class:`fusedopt.OptimWrapper` and MMEngine's OptimWrapper.

    Args:
        optimizer: the optimizer.
        accumulative_counts: number of iterations whose gradients are accumulated for one step.
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` or
            ``dict(type='value', clip_value=…)``.
    """


class FusedAmpOptimWrapper(_InsideMMEngine, AmpOptimWrapper, mmengine.optim.AmpOptimWrapper):
    """:class:`fusedopt.AmpOptimWrapper` for MMEngine's Runner; it also works on a CPU.

    Errors, state dict and log are as in :class:`fusedopt.AmpOptimWrapper` and MMEngine's.

    Args:
        optimizer: the optimizer.
        accumulative_counts: number of iterations whose gradients are accumulated for one step.
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` or
            ``dict(type='value', clip_value=…)``.
        loss_scale, dtype, use_fsdp: see :class:`fusedopt.AmpOptimWrapper`.
    """
