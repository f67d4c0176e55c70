"""The usual first steps of the Triton backend, so that a training run need not wait for compilation and tuning."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from ..rules import RULES
from .triton import ABSENT, DTYPES, Launcher, TritonBackend, Tuning, scratch_step

__all__ = ["WarmUp", "warm_up"]


class WarmUp(NamedTuple):
    """What the first steps of a rule and dtype took."""

    rule: str
    dtype: torch.dtype
    seconds: float
    tuning: Tuning


def warm_up(device: torch.device) -> list[WarmUp]:
    """Make a bare step and one with scaling and clipping on a device, by each rule and in two dtypes, and time them."""
    results = []
    index = device.index or 0
    for rule in RULES.values():
        if TritonBackend.unavailable_for(rule) is not None:
            continue
        states = len(rule.needed_columns(next(rule.trial_settings())))
        for dtype in (torch.float32, torch.bfloat16):
            code = DTYPES.index(dtype)
            dtypes = (code,) * (2 + states) + (ABSENT,) * (3 - states + 2) + (0,)
            begin = time.perf_counter()
            launcher = Launcher(rule, device.type)
            step = scratch_step(launcher, device, dtypes, 1)
            for clip in (False, True):
                step(clip)
            getattr(torch, device.type).synchronize(device)
            results.append(WarmUp(rule.name, dtype, time.perf_counter() - begin, launcher.tuning_for(index, dtypes)))
    return results
