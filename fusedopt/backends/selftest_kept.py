"""What the self-test compares where state is kept in fewer bits; see :mod:`fusedopt.backends.selftest`.

The reference calculates in float32 there, as the kernels do, and rounds with the same random bits. Between two such
results lie a few roundings of the arithmetic, which now and then move a stored number to the neighbouring one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..rules import Average, Precision, compute_dtype
from ..rules.bounds import error_bound
from ..rules.codes import join, scales_at

__all__ = ["difference", "on_trial"]

#: Of the numbers of a column, how many may be neighbours of the expected ones. Other random bits would move a third.
_MOST_NEIGHBOURS = 1 / 8
#: What is averaged in a trial: each step, and by so much that nothing else looks like it.
_AVERAGE = Average(momentum=0.25)
_SEED = 1
_16_BITS = (torch.bfloat16, torch.float16)


def on_trial(precision: Precision) -> Precision:
    """The precision that a self-test runs with: the same forms, a seed, and an average that shows much in few steps."""
    return replace(
        precision,
        seed=None if precision.seed is None else _SEED,
        average=None if precision.average is None else _AVERAGE,
    )


def difference(
    precision: Precision,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    roundings: int,
) -> str | None:
    """The first column of one parameter that is not as it should be, or None.

    Args:
        precision: in what form state is kept.
        before: the parameter and its state before the step, by name: flat, float64, on the CPU.
        after: the same after it.
        expected: what the reference made of ``before``.
        dtypes: in which these columns are stored.
        roundings: of the arithmetic; 0 where nothing may have changed.
    """
    if missing := [name for name in expected if name not in after]:
        return f"{missing[0]} is missing"
    was = {name: before.get(name, torch.zeros_like(want)) for name, want in expected.items()}
    numel = expected["param"].numel()
    for name, want in expected.items():
        found, dtype = after[name], dtypes[name]
        if not roundings or name == "step":
            problem = _apart(name, found, want, torch.zeros_like(want))
        elif name == "master_low":
            problem = _low_apart(after, expected, was, dtype, roundings)
        elif name == "param" and "master_low" in expected:
            continue
        elif name.endswith("_codes"):
            problem = _codes_apart(name, found, want, numel)
        elif name == "ema":
            problem = _average_apart(precision, was, after, dtypes)
        elif dtype in _16_BITS:
            problem = _neighbours(name, _ordered(found.to(dtype)), _ordered(want.to(dtype)), found, want)
        else:
            problem = _apart(name, found, want, _bound(was[name], want, dtype, roundings))
        if problem is not None:
            return problem
    return None


def _bound(was: Tensor, want: Tensor, dtype: torch.dtype, roundings: int) -> Tensor:
    """The one of :mod:`fusedopt.rules.bounds` for two that have rounded; nothing cancels in a self-test."""
    return 2 * error_bound(want, 2 * was.abs() + want.abs(), dtype, dtype, roundings)


def _apart(name: str, found: Tensor, want: Tensor, bound: Tensor) -> str | None:
    same = ((found - want).abs() <= bound) | (found == want) | (found.isnan() & want.isnan())
    if bool(same.all()):
        return None
    worst = int(torch.where(same, -1.0, (found - want).abs().nan_to_num(torch.inf)).argmax())
    return f"{name} is {found[worst].item():.10g}, expected {want[worst].item():.10g}"


def _ordered(stored: Tensor) -> Tensor:
    """Whole numbers for 16-bit floating point, in the order of the values: neighbours are one apart."""
    bits = stored.view(torch.int16).to(torch.int64)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _neighbours(name: str, found: Tensor, want: Tensor, shown: Tensor, expected: Tensor) -> str | None:
    """Whether two of stored numbers are further apart than neighbours, or too many of them are not the same."""
    distance = (found - want).abs()
    if bool((distance > 1).any()):
        worst = int(distance.argmax())
        return f"{name} is {shown[worst].item():.10g}, expected {expected[worst].item():.10g}"
    others = int((distance > 0).sum())
    if others > max(_MOST_NEIGHBOURS * distance.numel(), 2):
        return f"{name}: {others} of {distance.numel()} were rounded otherwise than expected"
    return None


def _codes_apart(name: str, found: Tensor, want: Tensor, numel: int) -> str | None:
    """Codes and the scales of their blocks."""
    codes, scales = ([each[:numel] for each in (found, want)], [each[scales_at(numel) :] for each in (found, want)])
    padding = found[numel : scales_at(numel)]
    if bool(padding.any()):
        return f"{name} is {padding.max().item():.10g} after its last code, expected 0"
    read = [_ordered(each.to(torch.uint8).view(torch.bfloat16)) for each in scales]
    if (problem := _neighbours(f"{name}, a scale,", *read, *map(Tensor.double, read))) is not None:
        return problem
    # What has a sign has it in the highest bit; of means of squares, codes go on there, so both are looked at.
    whole = [each.to(torch.int64) for each in codes]
    if "_sq" not in name:
        whole = [torch.where(each >= 0x80, -(each & 0x7F), each) for each in whole]
    return _neighbours(name, *whole, *codes)


def _joined(columns: Mapping[str, Tensor], low: torch.dtype) -> Tensor:
    """The float32 that a bfloat16 parameter is with its further bits."""
    return join(columns["param"].to(torch.bfloat16), columns["master_low"].to(low)).double()


def _low_apart(
    after: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    was: Mapping[str, Tensor],
    dtype: torch.dtype,
    roundings: int,
) -> str | None:
    """A parameter with its further bits."""
    found, want, old = (_joined(columns, dtype) for columns in (after, expected, was))
    bound = _bound(old, want, torch.float32, roundings)
    name = "param with master_low"
    if dtype != torch.uint8:
        return _apart(name, found, want, bound)
    others = int((found != want).sum())
    if others > max(_MOST_NEIGHBOURS * want.numel(), 2):
        return f"{name}: {others} of {want.numel()} were rounded otherwise than expected"
    return _apart(name, found, want, bound + 2.0**-15 * want.abs())


def _average_apart(
    precision: Precision, was: Mapping[str, Tensor], after: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> str | None:
    """The average: of what is stored, whatever that is."""
    assert precision.average is not None
    value = _joined(after, dtypes["master_low"]) if "master_low" in after else after.get("master", after["param"])
    weight = precision.average.weight(int(after["step"][0]))
    want = was["ema"] + weight * (value - was["ema"])
    return _apart("ema", after["ema"], want, _bound(was["ema"], want, compute_dtype(after["ema"].to(dtypes["ema"])), 2))
