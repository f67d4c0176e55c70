"""Backends run the steps: ``native`` is compiled ahead, ``triton`` on first use, ``reference`` is plain PyTorch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable

import torch

from ..rules import Rule, did_you_mean
from .base import Backend, BackendUnavailable, StepReport, StepRequest
from .native import NativeBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

__all__ = [
    "BACKENDS",
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
    """Say once that a device is served slowly, and why. (On a CPU, importing fusedopt has said so.)"""
    warnings.warn(f"fusedopt: {reason}; using the slow {chosen} backend. This note appears once.", stacklevel=7)


def create_backend(name: str, rule: Rule, devices: Iterable[torch.device]) -> Backend:
    """The backend called ``name`` for parameters on ``devices``; 'auto' takes the first that can serve them all.

    Raises:
        BackendUnavailable: the named backend cannot serve; the message says why.
    """
    check_backend_name(name)
    devices = set(devices)
    passed_over: list[str] = []
    for candidate in BACKENDS.values() if name == "auto" else (BACKENDS[name],):
        reasons = [reason for device in devices if (reason := candidate.unavailable(device))]
        if not reasons and (reason := candidate.unavailable_together(devices)):
            reasons = [reason]
        if not reasons:
            if passed_over and any(device.type != "cpu" for device in devices):
                _note_fallback(candidate.name, passed_over[0])
            return candidate(rule, devices)
        passed_over += reasons
    raise BackendUnavailable(f"backend {name!r} is not available: {reasons[0]}")
