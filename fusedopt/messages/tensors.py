"""Checks of parameters, gradients and state, with errors that name the tensor and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dtensors import dealt_out, dealt_out_alike, is_dtensor, local_of
from .names import did_you_mean

__all__ = [
    "SUPPORTED_DTYPES",
    "check_gradient",
    "check_no_model",
    "check_parameter",
    "check_state_kinds",
    "parse_dtype",
    "unsupported_kind",
]

#: Parameter, gradient and state dtypes that the kernels read and write.
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """One of :data:`SUPPORTED_DTYPES`, given as a dtype or by name, such as ``'float32'``; None stays None.

    Raises:
        TypeError: neither of these.
        ValueError: another dtype or an unknown name.
    """
    if dtype is None or dtype in SUPPORTED_DTYPES:
        return dtype
    if not isinstance(dtype, (str, torch.dtype)):
        raise TypeError(f"dtype must be the name of a dtype, a torch.dtype or None, got {dtype!r}")
    names = {str(known).removeprefix("torch."): known for known in SUPPORTED_DTYPES}
    if dtype not in names:
        raise ValueError(f"Invalid dtype: {dtype!r}; {did_you_mean(str(dtype), names)}")
    return names[dtype]


def unsupported_kind(tensor: Tensor) -> str | None:
    """The reason why no kernel can work on this tensor, or on the local part of a DTensor, or None."""
    if is_dtensor(tensor):
        placements = tensor.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            return (
                f"is a DTensor with placements {tuple(placements)}, whose parts have yet to be added up; expected "
                "Shard or Replicate"
            )
        tensor = local_of(tensor)
    if tensor.layout != torch.strided:
        return f"has sparse layout {tensor.layout}; dense tensors are expected (torch.optim.SparseAdam takes sparse)"
    if torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return f"is a {type(tensor).__name__}, a tensor subclass with its own dispatch, which is not supported"
    if tensor.is_meta:
        return "is on the meta device and has no storage; materialize the model before creating the optimizer"
    if tensor.is_complex():
        return f"is complex ({tensor.dtype}), which is not supported; optimize torch.view_as_real() of it"
    if tensor.dtype not in SUPPORTED_DTYPES:
        return f"has dtype {tensor.dtype}; expected float32, float64, bfloat16 or float16"
    if tensor.is_neg():
        return "is a lazily negated view; use its resolve_neg()"
    return None


def check_no_model(params: Any, place: str = "params") -> None:
    """Raise TypeError if ``params`` is a model instead of its parameters."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{place} is a model, {type(params).__name__}; expected its parameters: model.parameters()")


def check_state_kinds(name: str, state: Mapping[str, Any]) -> None:
    """Raise TypeError for state in tensor subclasses, such as quantised tensors, which no kernel can write."""
    for key, value in state.items():
        if isinstance(value, Tensor) and torch._C._dispatch_keys(local_of(value)).has(torch._C.DispatchKey.Python):
            raise TypeError(
                f"state {key!r} of {name} is of type {type(value).__module__}.{type(value).__name__}, a tensor "
                "subclass with its own dispatch, such as other packages' quantised state; expected a plain tensor"
            )


def check_parameter(name: str, param: Tensor) -> None:
    """Raise TypeError unless ``param`` is a dense, real, floating-point tensor with storage of its own."""
    if torch.nn.parameter.is_lazy(param):
        return  # checked at the first step, when it has been materialized
    reason = unsupported_kind(param)
    param = local_of(param)
    if reason is None and torch._debug_has_internal_overlap(param) == 1:
        reason = "has elements that share memory (an expanded tensor?), so they cannot be updated one by one"
    if reason is not None:
        raise TypeError(f"{name} {reason}")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError unless ``grad`` can drive an update of ``param``."""
    reason = unsupported_kind(grad)
    if reason is None and not dealt_out_alike(param, grad):
        reason = f"is {dealt_out(grad)} but the parameter is {dealt_out(param)}"
    if reason is None and grad.device != param.device:
        reason = f"is on {grad.device} but the parameter is on {param.device}"
    if reason is None and grad.shape != param.shape:
        reason = f"has shape {tuple(grad.shape)} but the parameter has shape {tuple(param.shape)}"
    if reason is not None:
        raise RuntimeError(f"gradient of {name} {reason}")
