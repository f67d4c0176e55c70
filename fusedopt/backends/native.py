"""The native backend: the compiled module fusedopt._C."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..rules import Rule
from .binding import REBUILD, load
from .plan import PlanBackend

__all__ = ["NativeBackend", "compiled_module", "update_scale"]

#: What was found when fusedopt was imported: the compiled module, or why there is none.
_module, _reason = load()
if _module is None:
    warnings.warn(f"{_reason}: fusedopt runs on its slow reference backend; {REBUILD}", stacklevel=2)


def compiled_module() -> tuple[Any, str | None]:
    """(module, None), or (None, reason) where none serves this torch: what was found when fusedopt was imported."""
    return _module, _reason


def update_scale(
    scale: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
) -> bool:
    """``torch._amp_update_scale_`` without its overhead; False, with nothing done, where that has to do it."""
    return _module is not None and _module.update_scale(
        scale, growth_tracker, found_inf, growth_factor, backoff_factor, growth_interval
    )


class NativeBackend(PlanBackend):
    """Compiled kernels over one plan of all the optimizer's tensors, for CPUs and NVIDIA GPUs.

    On GPUs a step waits for nothing (but under ``error_if_nonfinite``) and can be captured in a CUDA graph.
    Hyperparameters, ``max_norm`` and ``grad_scale`` given as tensors on the GPU stay live in the graph; numbers are
    what they were at the capture.
    """

    name = "native"

    def _make_plan(self) -> Any:
        assert _module is not None
        kept = self._how_state_is_kept()
        return _module.StepPlan(self.rule.name, self._device_type, shards=self.shards, **kept)

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        if _module is None:
            return _reason
        if device.type == "cpu":
            return None
        if device.type != "cuda" or torch.version.cuda is None:
            return f"this build has no kernels for {device.type} tensors"
        if (reason := _module.cuda_problem()) is not None:
            return reason
        if not torch.cuda.is_available():
            return "torch finds no usable CUDA device"
        index = torch.cuda.current_device() if device.index is None else device.index
        with torch.cuda.device(index):
            return _module.cuda_problem_on(index)

    @classmethod
    def unavailable_for(cls, rule: Rule) -> str | None:
        assert _module is not None
        if rule.name in _module.rule_names():
            return None
        return f"this build has no kernels for the rule {rule.name}; build fusedopt again"
