"""The native backend: the compiled module fusedopt._C."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rules import NormClip, Rule, ValueClip, check_gradient, check_parameter, parameter_name
from .base import Backend, BackendUnavailable, StepReport, StepRequest

__all__ = ["NativeBackend", "load_native_module", "update_scale"]

_REBUILD = "rebuild it with: pip install --no-build-isolation --force-reinstall --no-deps fusedopt (or -e . in a clone)"


def _built_for(path: Path) -> str | None:
    """The torch version stamped into the module's file, which can be read when the module does not load."""
    match = re.search(rb"fusedopt built for torch ([^;]+);", path.read_bytes())
    return match[1].decode() if match else None


def load_native_module() -> tuple[ModuleType | None, str | None]:
    """Import ``fusedopt._C`` and return (module, None), or (None, reason) when it was not built.

    Raises:
        ImportError: it was built for another torch, or cannot be loaded; the message says how to rebuild.
    """
    spec = importlib.util.find_spec("fusedopt._C")
    # One that lies elsewhere belongs to another installation: an editable one serves its own to any copy.
    if spec is None or spec.origin is None or Path(spec.origin).parent != Path(__file__).parents[1]:
        return None, "the compiled module fusedopt._C is not built"
    built_for = _built_for(Path(spec.origin))
    if built_for != torch.__version__:
        raise ImportError(
            f"fusedopt._C was built for torch {built_for} but torch {torch.__version__} is installed; {_REBUILD}"
        )
    try:
        return importlib.import_module("fusedopt._C"), None
    except ImportError as error:
        raise ImportError(f"fusedopt._C cannot be loaded ({error}); {_REBUILD}") from error


_module, _reason = load_native_module()
if _module is None:
    warnings.warn(f"{_reason}: fusedopt runs on its slow reference backend. To build it, {_REBUILD}", stacklevel=2)


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


class NativeBackend(Backend):
    """Compiled kernels over one plan of all the optimizer's tensors, for CPUs and NVIDIA GPUs.

    On GPUs a step waits for nothing (but under ``error_if_nonfinite``) and can be captured in a CUDA graph.
    Hyperparameters, ``max_norm`` and ``grad_scale`` given as tensors on the GPU stay live in the graph; numbers are
    what they were at the capture.
    """

    name = "native"

    def __init__(self, rule: Rule, devices: Iterable[torch.device] = ()):
        super().__init__(rule, devices)
        self._device_type = next((device.type for device in devices), "cpu")
        self._plan = self._make_plan()

    def _make_plan(self) -> Any:
        assert _module is not None
        return _module.StepPlan(self.rule.name, self._device_type)

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
    def unavailable_together(cls, devices: Iterable[torch.device]) -> str | None:
        kinds = sorted({device.type for device in devices})
        return f"one optimizer has parameters on {' and '.join(kinds)}" if len(kinds) > 1 else None

    def step(
        self, param_groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]], request: StepRequest
    ) -> StepReport:
        norm_type, error_if_nonfinite, clip_value = 0.0, False, math.inf
        max_norm: float | Tensor = 0.0
        clip = request.clip
        if isinstance(clip, NormClip):
            norm_type, max_norm, error_if_nonfinite = clip.norm_type, clip.max_norm, clip.error_if_nonfinite
        elif isinstance(clip, ValueClip):
            clip_value = clip.clip_value

        asked = (
            request.grad_scale,
            request.found_inf,
            request.check,
            norm_type,
            max_norm,
            error_if_nonfinite,
            clip_value,
            request.write_back_grads,
        )
        result = self._plan.step(param_groups, state, *asked)
        if isinstance(result, list):
            self._attend(result, param_groups, state)
            result = self._plan.step(param_groups, state, *asked)
        if isinstance(result, list):
            g, i, reason, _ = result[0]
            raise RuntimeError(f"{parameter_name(param_groups[g], g, i)} {reason}")
        return StepReport(*result)

    def _attend(
        self,
        attention: list[tuple[int, int, str, bool | None]],
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
    ) -> None:
        """Look at what the plan cannot serve as it is: raise what is wrong, then create the state that is missing."""
        for g, i, reason, state_missing in attention:
            group = param_groups[g]
            param, name = group["params"][i], parameter_name(group, g, i)
            check_parameter(name, param)
            if param.device.type != self._device_type:
                raise BackendUnavailable(f"{name} is on {param.device}, others on {self._device_type}")
            if state_missing is None:  # nothing that could be mended
                raise RuntimeError(f"{name} {reason}")
            if param.grad is None:  # another thread has dropped it since
                continue
            check_gradient(name, param, param.grad)
            if not state_missing:
                raise RuntimeError(f"{name} {reason}")
        for g, i, _, _ in attention:
            self.rule.init_state(param_groups[g], param_groups[g]["params"][i], state)
