"""The native backend: the compiled module fusedopt._C."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..rules import Rule
from .plan import PlanBackend

__all__ = ["NativeBackend", "compiled_module", "load_native_module", "update_scale"]

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


def compiled_module() -> tuple[Any, str | None]:
    """(module, None), or (None, reason) where it was not built: what was found when fusedopt was imported."""
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
        return _module.StepPlan(self.rule.name, self._device_type, shards=self.shards)

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
