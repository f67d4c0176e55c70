"""Tables, elements and numbers in memory. Tables are those of csrc/device/tables.h."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from ..native import compiled_module

_layout = compiled_module()[0].launching.TABLE_LAYOUT


def _field(name: str, size: int = 1) -> tl.constexpr:
    """Where a field is in its struct (or the struct's size), in units of ``size`` bytes."""
    assert _layout[name] % size == 0
    return tl.constexpr(_layout[name] // size)


def launched(function: Callable[..., None]) -> Any:
    """A kernel. It gets addresses and counts that differ from step to step, and is compiled once for all of them."""
    # Triton would compile it again for a number that is 1, for one that is a multiple of 16, and so on.
    numbers = [name for name, annotation in function.__annotations__.items() if annotation != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=numbers)


# Structs of csrc/device/tables.h are read through pointers to words (int64), halves (int32) and bytes.
GROUP_SIZE = _field("GroupRow")
GROUP_VALUE, GROUP_LIVE = _field("GroupRow.value", 8), _field("GroupRow.live", 8)
GROUP_LIVE_DTYPE = _field("GroupRow.live_dtype")
ROW_SIZE = _field("Row")
ROW_DATA, ROW_STEP, ROW_NUMEL = _field("Row.data", 8), _field("Row.step", 8), _field("Row.numel", 8)
ROW_LAYOUT, ROW_GROUP, ROW_FIRST_CHUNK = _field("Row.layout", 4), _field("Row.group", 4), _field("Row.first_chunk", 4)
ROW_DOMAIN = _field("Row.domain", 4)
ROW_DTYPE, ROW_STEP_DTYPE = _field("Row.dtype"), _field("Row.step_dtype")
ROW_STREAM, ROW_NUMBERS, ROW_FIRST_NUMBER = (
    _field("Row.stream", 4),
    _field("Row.numbers", 4),
    _field("Row.first_number", 8),
)
CHUNK_SIZE = _field("ChunkEntry", 4)
SCALARS_SIZE = _field("RowScalars")
SCALARS_VALUES, SCALARS_VARIANT = _field("RowScalars.values", 8), _field("RowScalars.variant", 4)
SCALARS_WEIGHT, SCALARS_STEP = _field("RowScalars.average_weight", 8), _field("RowScalars.step", 4)
CONTROL_MULTIPLIER, CONTROL_SKIP = _field("Control.multiplier", 8), _field("Control.skip", 4)
LAYOUT_SIZE = _field("Layout")
LAYOUT_DIMS = _field("Layout.dims", 4)
LAYOUT_SIZES, LAYOUT_STRIDES = _field("Layout.size", 8), _field("Layout.stride", 8)

# DType of csrc/tables.h, and a column that is not there.
ABSENT, F32, F64, BF16, F16 = (tl.constexpr(code) for code in (-1, 0, 1, 2, 3))
ROOT16, SIGNED8, UNSIGNED8, LOW16, LOW8 = (tl.constexpr(code) for code in (4, 5, 6, 7, 8))
# NormKind of csrc/tables.h.
NONE, ONE, TWO, INF, P = (tl.constexpr(code) for code in range(5))


@triton.jit
def pointer(address, mask, T: tl.constexpr):
    """An address as a pointer. Without a mask (None) accesses are in whole vectors, so it is a multiple of 16 then."""
    if mask is None:
        return tl.multiple_of(address.to(tl.pointer_type(T)), 16)
    else:
        return address.to(tl.pointer_type(T))


@triton.jit
def load(address, at, mask, DTYPE: tl.constexpr, T: tl.constexpr):
    """Elements number ``at`` of a column, as type ``T``."""
    if DTYPE == F32:
        x = tl.load(pointer(address, mask, tl.float32) + at, mask=mask)
    elif DTYPE == F64:
        x = tl.load(pointer(address, mask, tl.float64) + at, mask=mask)
    elif DTYPE == F16:
        x = tl.load(pointer(address, mask, tl.float16) + at, mask=mask)
    else:
        x = tl.load(pointer(address, mask, tl.uint16) + at, mask=mask).to(tl.uint32)
        x = (x << 16).to(tl.float32, bitcast=True)
    return x.to(T)


@triton.jit
def store(address, at, mask, x, DTYPE: tl.constexpr):
    """Elements number ``at`` of a column, rounded to nearest even."""
    if DTYPE == F32:
        tl.store(pointer(address, mask, tl.float32) + at, x.to(tl.float32), mask=mask)
    elif DTYPE == F64:
        tl.store(pointer(address, mask, tl.float64) + at, x.to(tl.float64), mask=mask)
    else:
        if x.dtype == tl.float64:
            x = round_to_odd(x)
        if DTYPE == F16:
            tl.store(pointer(address, mask, tl.float16) + at, x.to(tl.float16), mask=mask)
        else:
            bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            tl.store(pointer(address, mask, tl.uint16) + at, bits.to(tl.uint16), mask=mask)


@triton.jit
def round_to_odd(x):
    """float64 to float32 such that rounding once more, to 16 bits, is the same as rounding once."""
    nearest = x.to(tl.float32)
    bits = nearest.to(tl.uint32, bitcast=True)
    beyond = tl.abs(nearest).to(tl.float64) > tl.abs(x)
    odd = ((bits - beyond.to(tl.uint32)) | 1).to(tl.float32, bitcast=True)
    return tl.where((nearest.to(tl.float64) == x) | (x != x), nearest, odd)


@triton.jit
def place_of(layout, i):
    """Where the elements with canonical numbers ``i`` lie, by the Layout at an address, in elements."""
    words = layout.to(tl.pointer_type(tl.int64))
    dims = tl.load(layout.to(tl.pointer_type(tl.int32)) + LAYOUT_DIMS)
    at = tl.zeros_like(i)
    for inner in range(1, dims):
        d = dims - inner
        size = tl.load(words + LAYOUT_SIZES + d)
        at += i % size * tl.load(words + LAYOUT_STRIDES + d)
        i = i // size
    return at + i * tl.load(words + LAYOUT_STRIDES)


@triton.jit
def element(first, offset, DTYPE: tl.constexpr):
    """The address of element number ``offset`` of a flat column."""
    if DTYPE == SIGNED8 or DTYPE == UNSIGNED8 or DTYPE == LOW8:  # noqa: SIM109
        return first + offset
    else:
        return first + offset * (8 if DTYPE == F64 else (4 if DTYPE == F32 else 2))


@triton.jit
def number(address, dtype, mask):
    """One number of any dtype at each of these addresses, in float64."""
    zero = tl.zeros_like(address)
    single = load(address, zero, mask & (dtype == F32), F32, tl.float64)
    double = load(address, zero, mask & (dtype == F64), F64, tl.float64)
    brain = load(address, zero, mask & (dtype == BF16), BF16, tl.float64)
    half = load(address, zero, mask & (dtype == F16), F16, tl.float64)
    return tl.where(dtype == F32, single, tl.where(dtype == F64, double, tl.where(dtype == BF16, brain, half)))


@triton.jit
def operand(value, live, dtype):
    """A number that the host knows, or that lies at an address."""
    value = tl.full((1,), 0, tl.float64) + value
    live = tl.full((1,), 0, tl.int64) + live
    dtype = tl.full((1,), 0, tl.int32) + dtype
    return tl.sum(tl.where(live != 0, number(live, dtype, live != 0), value), axis=0)


@triton.jit
def any_address(addresses):
    """Whether one is not 0. (As numbers those from 2^63 on are negative, so that their maximum may be 0.)"""
    return tl.max((addresses != 0).to(tl.int32), axis=0) != 0


@triton.jit
def hyper(group, i: tl.constexpr, mask):
    """Hyperparameter ``i`` of the group of each row: a number in the table, or in a tensor."""
    words = group.to(tl.pointer_type(tl.int64))
    value = tl.load(words + (GROUP_VALUE + i), mask=mask, other=0).to(tl.float64, bitcast=True)
    live = tl.load(words + (GROUP_LIVE + i), mask=mask, other=0)
    if any_address(live):
        dtype = tl.load(group.to(tl.pointer_type(tl.uint8)) + (GROUP_LIVE_DTYPE + i), mask=mask, other=0)
        value = tl.where(live != 0, number(live, dtype, live != 0), value)
    return value
