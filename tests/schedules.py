"""What tests of schedulers compare: optimizers with groups of their own settings, and their scheduled values."""

from __future__ import annotations

import math

import torch
from torch import nn

import fusedopt

#: Relative. Both do the same float64 operations; only the order of a few differs.
TOLERANCE = 1e-12


def parameter_groups(count):
    return [dict(params=[nn.Parameter(torch.zeros(2))], lr=0.1 * (i + 1), weight_decay=0.01 * i) for i in range(count)]


OPTIMIZERS = {
    "SGD": (lambda groups: torch.optim.SGD(groups, lr=0.3, momentum=0.8), fusedopt.FusedSGD, dict(momentum=0.8)),
    "AdamW": (lambda groups: torch.optim.AdamW(groups, lr=0.3), fusedopt.FusedAdamW, {}),
}


def values(optimizer):
    """Every scheduled value of every group, a wrapper's base settings included."""
    return [
        (group["lr"], group["weight_decay"], group.get("momentum"), group.get("betas"))
        for group in optimizer.param_groups
    ]


def assert_same(ours, theirs, when):
    for group, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        for one, other in zip(our, their, strict=True):
            if one is None or other is None:
                assert one == other
                continue
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            for mine, reference in pairs:
                assert math.isclose(mine, reference, rel_tol=TOLERANCE, abs_tol=1e-15), (
                    f"{when}, group {group}: {mine!r} instead of {reference!r}"
                )
