"""Backends run the steps: ``native`` is compiled ahead, ``triton`` on first use, ``reference`` is plain PyTorch."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable

import torch

from ..messages import did_you_mean
from ..rules import PLAIN, Precision, Rule
from . import selftest
from .base import Backend, BackendUnavailable, StepReport, StepRequest
from .native import NativeBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "Backend",
    "BackendUnavailable",
    "NativeBackend",
    "ReferenceBackend",
    "StepReport",
    "StepRequest",
    "TritonBackend",
    "check_backend_name",
    "create_backend",
]

#: Environment variable that names the backend of all optimizers that are left to choose ('auto').
VARIABLE = "FUSEDOPT_BACKEND"

#: Backends by name, in the order in which 'auto' tries them.
BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (NativeBackend, TritonBackend, ReferenceBackend)
}


def check_backend_name(name: str) -> None:
    """Raise ValueError unless ``name`` is 'auto' or a backend."""
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"unknown backend {name!r}; {did_you_mean(name, (*BACKENDS, 'auto'))}")


@functools.cache
def _note_fallback(chosen: str, reason: str) -> None:
    """Say once that a device is not served by what would serve it best, and why. (On a CPU, the import has said so.)"""
    slow = "slow " if chosen == ReferenceBackend.name else ""
    warnings.warn(f"fusedopt: {reason}; using the {slow}{chosen} backend. This note appears once.", stacklevel=7)


def _backend_asked_for(name: str) -> tuple[str, str]:
    """The backend to use and, for messages, how it was asked for: 'auto' leaves it to the environment."""
    check_backend_name(name)
    wanted = os.environ.get(VARIABLE, "")
    if name != "auto" or not wanted:
        return name, f"backend {name!r}"
    try:
        check_backend_name(wanted)
    except ValueError as error:
        raise ValueError(f"{VARIABLE} in the environment: {error}") from None
    return wanted, f"backend {wanted!r} (from {VARIABLE} in the environment)"


def create_backend(
    name: str,
    rule: Rule,
    devices: Iterable[torch.device],
    dtypes: Iterable[torch.dtype] = (),
    present: Backend | None = None,
    precision: Precision = PLAIN,
) -> Backend:
    """The backend called ``name`` for parameters on ``devices``; 'auto' takes the first that can serve them all.

    In place of 'auto', the environment may name one for the whole process: ``FUSEDOPT_BACKEND=triton``. What runs on a
    GPU passes a self-test first, in each of ``dtypes``; see :mod:`fusedopt.backends.selftest`.

    Args:
        name: of a backend, or 'auto'.
        rule: the optimizer's maths.
        devices: where its parameters are.
        dtypes: of its parameters.
        present: the backend it has; it is returned where there is no reason for another.
        precision: in what form it keeps its state.

    Raises:
        BackendUnavailable: the named backend cannot serve; the message says why.
        ValueError: there is no backend of that name.
    """
    name, asked = _backend_asked_for(name)
    devices, dtypes = frozenset(devices), frozenset(dtypes)
    say_why = any(device.type != "cpu" for device in devices)
    passed_over: dict[str, str] = {}
    for candidate in BACKENDS.values() if name == "auto" else (BACKENDS[name],):
        reasons = [reason for device in devices if (reason := candidate.unavailable(device))]
        if not reasons and (reason := candidate.unavailable_together(devices)):
            reasons = [reason]
        if not reasons and (reason := candidate.unavailable_for(rule)):
            reasons, say_why = [reason], True
        if not reasons:
            problem, postponed = selftest.judge(candidate, rule, devices, dtypes, precision)
            if problem is not None:
                reasons, say_why = [problem], True
        if not reasons:
            if passed_over and say_why:
                # A reason that several have is given once.
                whose: dict[str, list[str]] = {}
                for who, why in passed_over.items():
                    whose.setdefault(why, []).append(who)
                told = (f"{' and '.join(who)}: {why}" for why, who in whose.items())
                _note_fallback(candidate.name, "; ".join(told))
            chosen = present if type(present) is candidate else candidate(rule, devices, precision)
            assert chosen is not None
            chosen.unproved = postponed
            if any(candidate.must_prove_itself(device) for device in devices):
                chosen.chosen_for = devices, dtypes
            return chosen
        passed_over[candidate.name] = reasons[0]
    raise BackendUnavailable(f"{asked} is not available: {passed_over[name]}")
