"""Checks of numbers, with errors that name the setting, the value and what was expected."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .plain import plain

__all__ = ["check_betas", "check_flag", "check_number", "check_whole_number", "is_number"]


def check_number(
    name: str, value: Any, minimum: float = 0.0, below: float = math.inf, *, exclusive: bool = False
) -> Any:
    """Require ``minimum <= value < below`` (``minimum < value`` when exclusive; inf passes an infinite ``below``).

    Returns:
        ``value``, as a Python number or a tensor: see Note [Plain numbers].

    Raises:
        TypeError: ``value`` is neither a number nor a tensor.
        ValueError: out of range, NaN, or a tensor that does not have exactly one element.
    """
    value = plain(value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if value.is_complex() or value.layout != torch.strided:
            raise TypeError(f"Invalid {name}: {value!r}; expected a number or a dense tensor of a real one")
    elif type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"Invalid {name}: {value!r}; expected a number or a 1-element tensor")
    high_enough = value > minimum if exclusive else value >= minimum
    if not (high_enough and (below == math.inf or value < below)):
        bounds = f"in {'(' if exclusive else '['}{minimum:g}, {below:g})"
        if below == math.inf:
            bounds = f"{'>' if exclusive else '>='} {minimum:g}"
        raise ValueError(f"Invalid {name}: {value}; expected a number {bounds}")
    return value


def check_betas(betas: Any) -> None:
    """Require two decay rates in [0, 1).

    Raises:
        TypeError: one is neither a number nor a tensor.
        ValueError: there are not two of them, or one is out of range.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; expected two numbers in [0, 1)")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, below=1.0)


def check_flag(name: str, value: Any) -> bool:
    """``value``, which must be True or False.

    Raises:
        TypeError: it is not. Text such as ``'no'``, which counts as true in Python, is not either.
    """
    value = plain(value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_whole_number(name: str, value: Any, minimum: int | None = None) -> int:
    """``value`` as an int.

    Raises:
        TypeError: it is not a number.
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


def as_float(value: Any) -> float | None:
    """A number, or the only element of an array or tensor, as a float; None for anything else."""
    size = value.numel() if isinstance(value, Tensor) else getattr(value, "size", None)
    number = plain(value.item() if size == 1 and hasattr(value, "item") else value)
    return float(number) if isinstance(number, numbers.Real) else None


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number or a 1-element tensor; True and False do not count."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.layout == torch.strided
    value = plain(value)
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
