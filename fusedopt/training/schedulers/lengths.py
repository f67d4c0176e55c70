"""Converts lengths in epochs, including fractions, to iterations."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

from ...messages import check_number, check_whole_number, plain, warn_caller

__all__ = ["check_steps", "in_iterations", "warn_of_fraction"]


class _Fraction(float):
    """A number of iterations that is not whole because it comes from epochs, whose length the user may not know."""


def in_iterations(name: str, epochs: Any, epoch_length: int, may_be_fraction: bool) -> Any:
    """``epochs``, a number or a list, in iterations: whole, or a fraction for :func:`check_steps`, as in MMEngine.

    Raises:
        TypeError: it is not a number.
        ValueError: a fraction of an epoch where fractions are not allowed, even if it makes whole iterations.
    """
    if isinstance(epochs, Sequence) and not isinstance(epochs, str):
        return [in_iterations(name, each, epoch_length, may_be_fraction) for each in epochs]
    epochs = plain(epochs)
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Real):
        raise TypeError(f"Invalid {name}: {epochs!r}; expected a number of epochs")
    if not may_be_fraction and not float(epochs).is_integer():
        raise ValueError(f"Invalid {name}: {epochs}; expected a whole number of epochs")
    iterations = float(epochs) * epoch_length
    # 1.1 epochs of 10 iterations are 11 iterations, although the binary product is not.
    return round(iterations) if abs(iterations - round(iterations)) <= 1e-6 else _Fraction(iterations)


def check_steps(name: str, value: Any, minimum: int) -> float:
    """``value`` as a whole number of steps, or a fraction made by :func:`in_iterations`.

    Raises:
        TypeError, ValueError: see :func:`fusedopt.messages.check_whole_number`.
    """
    if type(value) is _Fraction:
        return check_number(name, value, minimum)
    return check_whole_number(name, value, minimum)


def warn_of_fraction(what: str, step: float) -> None:
    """Warn if ``step`` is not whole and so is never reached."""
    if step % 1:
        warn_caller(f"{what} at {step:g} lies between two iterations and has no effect, as in MMEngine")
