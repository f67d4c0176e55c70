"""Checks at the edge: numbers, parameters and gradients, each with an error that names what is wrong."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .plain import plain

__all__ = [
    "SUPPORTED_DTYPES",
    "check_gradient",
    "check_no_model",
    "check_number",
    "check_parameter",
    "check_state_kinds",
    "check_whole_number",
    "did_you_mean",
    "group_names",
    "is_number",
    "parameter_name",
    "parse_dtype",
]

#: Parameter, gradient and state dtypes that the kernels read and write.
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing clause for an error about an unknown ``name``: the closest known name, or all of them."""
    known = sorted(known)
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(str(name).lower(), folded, 1)
    return f"did you mean {folded[close[0]]!r}?" if close else f"expected one of {', '.join(known)}"


def check_number(
    name: str, value: Any, minimum: float = 0.0, below: float = math.inf, *, exclusive: bool = False
) -> Any:
    """Require ``minimum <= value < below`` (``minimum < value`` when exclusive; inf passes an infinite ``below``).

    Returns:
        ``value``, a number as Python's: see Note [Plain numbers].

    Raises:
        TypeError: ``value`` is neither a number nor a tensor.
        ValueError: out of range, NaN, or a tensor with other than one element.
    """
    value = plain(value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}; expected a number or a 1-element tensor")
    high_enough = value > minimum if exclusive else value >= minimum
    if not (high_enough and (below == math.inf or value < below)):
        bounds = f"{'>' if exclusive else '>='} {minimum:g}" if below == math.inf else f"in [{minimum:g}, {below:g})"
        raise ValueError(f"Invalid {name}: {value}; expected a number {bounds}")
    return value


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """One of :data:`SUPPORTED_DTYPES`, given itself or by name such as ``'float32'``; None stays None.

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


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number or a 1-element tensor; True and False are no numbers."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    value = plain(value)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_whole_number(name: str, value: Any, minimum: int | None = None) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is no number.
        ValueError: it is not whole, or below ``minimum``.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"Invalid {name}: {value!r}; expected a whole number")
    number = float(value)
    if not number.is_integer() or (minimum is not None and number < minimum):
        bound = "" if minimum is None else f" >= {minimum}"
        raise ValueError(f"Invalid {name}: {value!r}; expected a whole number{bound}")
    return int(number)


def group_names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters, as far as it carries them: torch's ``param_names``, else ``param_name``."""
    return list(group.get("param_names") or ([group["param_name"]] if "param_name" in group else []))


def parameter_name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """How errors call a parameter: by its name where the group carries names, and always by its place and shape."""
    names = group_names(group)
    params = group["params"]
    param = params[index]
    known = isinstance(param, Tensor) and not torch.nn.parameter.is_lazy(param)
    shape = f", shape {tuple(param.shape)}" if known else ""
    quoted = f" {names[index]!r}" if index < len(names) else ""
    return f"parameter{quoted} (param_groups[{group_index}]['params'][{index}]{shape})"


def _unsupported_kind(tensor: Tensor) -> str | None:
    """Why no kernel can work on this tensor, or None."""
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
    """Raise TypeError where a model stands in the place of parameters."""
    if isinstance(params, torch.nn.Module):
        raise TypeError(f"{place} is a model, {type(params).__name__}; expected its parameters: model.parameters()")


def check_state_kinds(name: str, state: Mapping[str, Any]) -> None:
    """Raise TypeError for state in tensors of another kind, such as quantised ones, in which no kernel can write."""
    for key, value in state.items():
        if isinstance(value, Tensor) and torch._C._dispatch_keys(value).has(torch._C.DispatchKey.Python):
            raise TypeError(
                f"state {key!r} of {name} is of type {type(value).__module__}.{type(value).__name__}, a tensor "
                "subclass with its own dispatch, such as other packages' quantised state; expected a plain tensor"
            )


def check_parameter(name: str, param: Tensor) -> None:
    """Raise TypeError unless ``param`` is a dense, real, floating-point tensor with storage of its own."""
    if torch.nn.parameter.is_lazy(param):
        return  # checked like any other when it has been materialized, at the first step
    reason = _unsupported_kind(param)
    if reason is None and torch._debug_has_internal_overlap(param) == 1:
        reason = "has elements that share memory (an expanded tensor?), so they cannot be updated one by one"
    if reason is not None:
        raise TypeError(f"{name} {reason}")


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError unless ``grad`` can drive an update of ``param``."""
    reason = _unsupported_kind(grad)
    if reason is None and grad.device != param.device:
        reason = f"is on {grad.device} but the parameter is on {param.device}"
    if reason is None and grad.shape != param.shape:
        reason = f"has shape {tuple(grad.shape)} but the parameter has shape {tuple(param.shape)}"
    if reason is not None:
        raise RuntimeError(f"gradient of {name} {reason}")
