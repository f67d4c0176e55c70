"""The Triton kernels: the two passes over the plan's tables, and a small kernel between them.

A step launches, over all parameter groups at once,

1. :func:`statistics_kernel`, when there is something to find out: each program adds up the gradients of one chunk,
2. :func:`prepare_kernel`: adds up what the programs found, and derives from it and from the hyperparameters all the
   numbers that the update needs: one multiplier and whether to skip, and the rule's constants of every parameter,
3. :func:`update_kernel`: each program updates one chunk. One launch for each combination of dtypes.

Tables are those of csrc/device/tables.h: the plan fills them in, and kernels are given addresses. The arithmetic is
that of csrc/rules, operation by operation, without contraction and with IEEE division and square root, so that results
have the bits of the other backends.

Everything here runs under Triton's interpreter too, which decides what it may use: the interpreter truncates to
bfloat16, has no exact fused multiply-add and none of the device libraries, and its maximum passes over NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .native import compiled_module

__all__ = ["RULES", "map_kernel", "prepare_kernel", "statistics_kernel", "total_kernel", "update_kernel"]

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
ROW_DTYPE, ROW_STEP_DTYPE = _field("Row.dtype"), _field("Row.step_dtype")
CHUNK_SIZE = _field("ChunkEntry", 4)
SCALARS_SIZE = _field("RowScalars")
SCALARS_VALUES, SCALARS_VARIANT = _field("RowScalars.values", 8), _field("RowScalars.variant", 4)
CONTROL_MULTIPLIER, CONTROL_SKIP = _field("Control.multiplier", 8), _field("Control.skip", 4)
LAYOUT_SIZE = _field("Layout")
LAYOUT_DIMS = _field("Layout.dims", 4)
LAYOUT_SIZES, LAYOUT_STRIDES = _field("Layout.size", 8), _field("Layout.stride", 8)

# DType of csrc/tables.h, and a column that is not there.
ABSENT, F32, F64, BF16, F16 = (tl.constexpr(code) for code in (-1, 0, 1, 2, 3))
# NormKind of csrc/tables.h.
NONE, ONE, TWO, INF, P = (tl.constexpr(code) for code in range(5))

# Added to the norm before dividing by it; the clipping rule of fusedopt/rules/clipping.py.
CLIP_EPS = tl.constexpr(1e-6)
LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)
# Below this, a sum of squares in float32 may have lost small ones to underflow.
UNDERFLOW = tl.constexpr(1e-24)

# Lanes of a statistics pass, and of what adds up its results. The order of additions depends on them, so that they are
# no matter of tuning: the norm has the same bits in every run.
SUM_BLOCK = tl.constexpr(1024)
# Elements that are first added up in float32, where float64 is slow.
FLOAT_RUN = tl.constexpr(8)


# ---------------------------------------------------------------------------------------------------------------------
# Elements and numbers in memory


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


# ---------------------------------------------------------------------------------------------------------------------
# Rules: the constants of a step from the hyperparameters, and the update. The formulas are those of fusedopt/rules.


@triton.jit
def multiply(a, a_rest, b, b_rest):
    """The product of two numbers of twice the digits of float64, each given as a sum."""
    split = 134217729.0  # 2^27 + 1: halves the digits, so that the products of halves are exact
    a_high = split * a - (split * a - a)
    b_high = split * b - (split * b - b)
    a_low, b_low = a - a_high, b - b_high
    product = a * b
    rest = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    rest += a * b_rest + a_rest * b
    total = product + rest
    return total, rest - (total - product)


@triton.jit
def power(base, exponent):
    """``base ** exponent`` for whole exponents, correct to the last digit (an error in it would show in 1 - beta^t)."""
    n = exponent.to(tl.int64)
    result, result_rest = tl.full(base.shape, 1.0, tl.float64), tl.zeros_like(base)
    square, square_rest = base, tl.zeros_like(base)
    while tl.max(n, axis=0) > 0:
        high, low = multiply(result, result_rest, square, square_rest)
        result = tl.where(n & 1 == 1, high, result)
        result_rest = tl.where(n & 1 == 1, low, result_rest)
        square, square_rest = multiply(square, square_rest, square, square_rest)
        n = n >> 1
    return result


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


# Variants of SGD.
SGD_DECAY, SGD_MOMENTUM, SGD_FIRST, SGD_NESTEROV = (tl.constexpr(1 << bit) for bit in range(4))


@triton.jit
def sgd_constants(group, step, mask):
    lr, momentum, dampening = hyper(group, 0, mask), hyper(group, 1, mask), hyper(group, 2, mask)
    decay, nesterov, maximize = hyper(group, 3, mask), hyper(group, 4, mask), hyper(group, 5, mask)
    variant = tl.where(momentum != 0, SGD_MOMENTUM, 0) | tl.where(decay != 0, SGD_DECAY, 0)
    variant = variant | tl.where(step == 1, SGD_FIRST, 0) | tl.where(nesterov != 0, SGD_NESTEROV, 0)
    sign = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    return variant, (sign, decay, momentum, 1.0 - dampening, lr)


@triton.jit
def sgd_update(c, variant, p, g, buffer, unused1, unused2, has_state: tl.constexpr, has_third: tl.constexpr):
    sign, decay, momentum, keep, lr = c[0], c[1], c[2], c[3], c[4]
    g = g * sign
    g = tl.where(variant & SGD_DECAY != 0, g + decay * p, g)
    if has_state:
        moving = tl.where(variant & SGD_FIRST != 0, g, momentum * buffer + keep * g)
        ahead = tl.where(variant & SGD_NESTEROV != 0, g + momentum * moving, moving)
        buffer = tl.where(variant & SGD_MOMENTUM != 0, moving, buffer)
        g = tl.where(variant & SGD_MOMENTUM != 0, ahead, g)
    return p - lr * g, buffer, unused1, unused2


# Variants of Adam.
ADAM_COUPLED, ADAM_MAX = (tl.constexpr(1 << bit) for bit in range(2))


@triton.jit
def adam_constants(group, step, mask):
    lr, beta1, beta2 = hyper(group, 0, mask), hyper(group, 1, mask), hyper(group, 2, mask)
    eps, decay, amsgrad = hyper(group, 3, mask), hyper(group, 4, mask), hyper(group, 5, mask)
    maximize, decoupled = hyper(group, 6, mask), hyper(group, 7, mask)
    variant = tl.where((decay != 0) & (decoupled == 0), ADAM_COUPLED, 0) | tl.where(amsgrad != 0, ADAM_MAX, 0)
    sign = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    keep = tl.where(decoupled != 0, 1.0 - lr * decay, 1.0)
    inv_sqrt_correction2 = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    step_size = lr / (1.0 - power(beta1, step))
    return variant, (sign, decay, keep, beta1, 1.0 - beta1, beta2, 1.0 - beta2, inv_sqrt_correction2, eps, step_size)


@triton.jit
def square_root(x):
    """The float32 root, rounded to nearest."""
    # Small numbers are lifted and the root is lowered, both exactly: Triton 3.6 has a sequence for AMD that begins with
    # 1 / sqrt(x), which is not made for them.
    small = x < 1.262177448e-29  # 2^-96
    root = tl.sqrt_rn(tl.where(small, x * 4294967296.0, x))
    return tl.where(small, root * 1.52587890625e-05, root)


@triton.jit
def adam_update(
    c, variant, p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, has_state: tl.constexpr, has_third: tl.constexpr
):
    sign, decay, keep, inv_sqrt_correction2, eps, step_size = c[0], c[1], c[2], c[7], c[8], c[9]
    g = g * sign
    coupled = variant & ADAM_COUPLED != 0
    g = tl.where(coupled, g + decay * p, g)
    p = tl.where(coupled, p, p * keep)
    exp_avg = c[3] * exp_avg + c[4] * g
    exp_avg_sq = c[5] * exp_avg_sq + c[6] * g * g
    variance = exp_avg_sq
    if has_third:
        larger = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        larger = tl.where(larger, exp_avg_sq, max_exp_avg_sq)
        max_exp_avg_sq = tl.where(variant & ADAM_MAX != 0, larger, max_exp_avg_sq)
        variance = tl.where(variant & ADAM_MAX != 0, larger, variance)
    if p.dtype == tl.float64:
        p = p - step_size * exp_avg / (tl.sqrt(variance) * inv_sqrt_correction2 + eps)
    else:
        p = p - tl.div_rn(step_size * exp_avg, square_root(variance) * inv_sqrt_correction2 + eps)
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq


class RuleKernels(NamedTuple):
    """What the kernels take of a rule: ``constants(group, step, mask)`` and ``update(...)`` of a block of elements."""

    constants: Any
    update: Any
    constant_count: int
    #: Hyperparameters, other than the usual ones, with which the rule keeps so many columns of state.
    settings: dict[int, dict[str, Any]]


#: By the names of fusedopt.rules.
RULES = {
    "sgd": RuleKernels(sgd_constants, sgd_update, 5, {0: {}, 1: {"momentum": 0.9}}),
    "adam": RuleKernels(adam_constants, adam_update, 10, {2: {}, 3: {"amsgrad": True}}),
}


# ---------------------------------------------------------------------------------------------------------------------
# The chunk map


@launched
def map_kernel(rows: tl.int64, chunks: tl.int64, chunk_elements: tl.int64, BLOCK: tl.constexpr):
    """Tell each chunk of row ``program_id`` which it is."""
    row = tl.program_id(0)
    start = rows + row.to(tl.int64) * ROW_SIZE
    numel = tl.load(start.to(tl.pointer_type(tl.int64)) + ROW_NUMEL)
    first = tl.load(start.to(tl.pointer_type(tl.int32)) + ROW_FIRST_CHUNK).to(tl.int64)
    count = ((numel + chunk_elements - 1) // chunk_elements).to(tl.int32)
    entries = chunks.to(tl.pointer_type(tl.int32)) + first * CHUNK_SIZE
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        tl.store(entries + i * CHUNK_SIZE, tl.zeros_like(i) + row, mask=i < count)
        tl.store(entries + i * CHUNK_SIZE + 1, i, mask=i < count)


# ---------------------------------------------------------------------------------------------------------------------
# The statistics pass


@triton.jit
def add_elements(acc, bad, x, p, KIND: tl.constexpr, SHORT: tl.constexpr):
    """Add a block to the sums of its lanes; with ``SHORT``, a few elements at a time in float32 first."""
    bad = bad | (x - x != 0).to(tl.int32)
    if SHORT:
        x = x * x if KIND == TWO else tl.abs(x)
        acc += tl.sum(tl.reshape(x, (SUM_BLOCK // FLOAT_RUN, FLOAT_RUN)), axis=1).to(tl.float64)
    elif KIND == TWO:
        wide = x.to(tl.float64)
        acc += wide * wide
    elif KIND == ONE:
        acc += tl.abs(x.to(tl.float64))
    elif KIND == P:
        acc += tl.exp(p * tl.log(tl.abs(x.to(tl.float64))))
    elif KIND == INF:  # of numbers above zero, the bits are in the order of the values, and those of NaN come last
        acc = tl.maximum(acc, tl.abs(x.to(tl.float64)).to(tl.int64, bitcast=True))
    return acc, bad


@triton.jit
def add_chunk(first, layout, offset, length, p, DTYPE: tl.constexpr, KIND: tl.constexpr, SHORT: tl.constexpr):
    """The sum over one chunk of a gradient, or its largest magnitude, and whether an element is not finite."""
    T: tl.constexpr = tl.float64 if DTYPE == F64 else tl.float32
    lanes: tl.constexpr = SUM_BLOCK // FLOAT_RUN if SHORT else SUM_BLOCK
    acc = tl.zeros((lanes,), tl.int64 if KIND == INF else tl.float64)
    bad = tl.zeros((SUM_BLOCK,), tl.int32)
    lane = tl.arange(0, SUM_BLOCK)
    done = 0
    if (layout == 0) & (first % 16 == 0):
        done = length // SUM_BLOCK * SUM_BLOCK
        for begin in tl.range(0, done, SUM_BLOCK, loop_unroll_factor=4):
            x = load(element(first, offset, DTYPE), begin + lane, None, DTYPE, T)
            acc, bad = add_elements(acc, bad, x, p, KIND, SHORT)
    for begin in range(done, length, SUM_BLOCK):
        mask = begin + lane < length
        at = offset + begin + lane
        if layout != 0:
            at = place_of(layout, at)
        x = tl.where(mask, load(first, at, mask, DTYPE, T), 0.0)  # zeros add nothing to any norm
        acc, bad = add_elements(acc, bad, x, p, KIND, SHORT)
    if KIND == INF:
        total = tl.max(acc, axis=0).to(tl.float64, bitcast=True)
    else:
        total = tl.sum(acc, axis=0)
    return total, tl.max(bad, axis=0)


@triton.jit
def add_narrow_chunk(
    first, layout, offset, length, p, DTYPE: tl.constexpr, KIND: tl.constexpr, SLOW_DOUBLE: tl.constexpr
):
    """:func:`add_chunk` of at most 32-bit elements; on devices where float64 is slow, with it only where it matters."""
    SHORT: tl.constexpr = SLOW_DOUBLE and (KIND == ONE or KIND == TWO)  # noqa: SIM109
    total, bad = add_chunk(first, layout, offset, length, p, DTYPE, KIND, SHORT)
    if SHORT:
        if (total - total != 0) | ((total < UNDERFLOW) & (KIND == TWO)):
            total, bad = add_chunk(first, layout, offset, length, p, DTYPE, KIND, False)
    return total, bad


@launched
def statistics_kernel(
    grads: tl.int64,
    rows: tl.int64,
    layouts: tl.int64,
    chunks: tl.int64,
    partials: tl.int64,
    chunk_elements: tl.int64,
    p: tl.float64,
    KIND: tl.constexpr,
    SLOW_DOUBLE: tl.constexpr,
):
    """Leave of chunk ``program_id``: its sum, and 1 where an element is not finite."""
    chunk = tl.program_id(0).to(tl.int64)
    entry = chunks.to(tl.pointer_type(tl.int32)) + chunk * CHUNK_SIZE
    r, index = tl.load(entry), tl.load(entry + 1)
    first = tl.load(grads.to(tl.pointer_type(tl.int64)) + r)
    total = tl.full((), 0, tl.float64)
    bad = tl.full((), 0, tl.int32)
    if first != 0:
        row = rows + r.to(tl.int64) * ROW_SIZE
        numel = tl.load(row.to(tl.pointer_type(tl.int64)) + ROW_NUMEL)
        layout_index = tl.load(row.to(tl.pointer_type(tl.int32)) + (ROW_LAYOUT + 1)).to(tl.int64)
        layout = tl.where(layout_index < 0, 0, layouts + layout_index * LAYOUT_SIZE)
        dtype = tl.load(row.to(tl.pointer_type(tl.uint8)) + (ROW_DTYPE + 1))
        offset = index.to(tl.int64) * chunk_elements
        length = tl.minimum(numel - offset, chunk_elements).to(tl.int32)
        if dtype == F32:
            total, bad = add_narrow_chunk(first, layout, offset, length, p, F32, KIND, SLOW_DOUBLE)
        elif dtype == F64:
            total, bad = add_chunk(first, layout, offset, length, p, F64, KIND, False)
        elif dtype == BF16:
            total, bad = add_narrow_chunk(first, layout, offset, length, p, BF16, KIND, SLOW_DOUBLE)
        else:
            total, bad = add_narrow_chunk(first, layout, offset, length, p, F16, KIND, SLOW_DOUBLE)
    found = partials.to(tl.pointer_type(tl.float64)) + 2 * chunk
    tl.store(found, total)
    tl.store(found + 1, bad.to(tl.float64))


@triton.jit
def add_up(found, count, KIND: tl.constexpr):
    """The sum (or the maximum) of ``count`` pairs as :func:`statistics_kernel` leaves them, in a fixed order."""
    pairs = found.to(tl.pointer_type(tl.float64))
    lane = tl.arange(0, SUM_BLOCK)
    acc = tl.zeros((SUM_BLOCK,), tl.int64 if KIND == INF else tl.float64)
    bad = tl.zeros((SUM_BLOCK,), tl.float64)
    for begin in range(0, count, SUM_BLOCK):
        i = begin + lane
        sums = tl.load(pairs + 2 * i, mask=i < count, other=0)
        if KIND == INF:
            acc = tl.maximum(acc, sums.to(tl.int64, bitcast=True))
        else:
            acc += sums
        bad += tl.load(pairs + 2 * i + 1, mask=i < count, other=0)
    if KIND == INF:
        total = tl.max(acc, axis=0).to(tl.float64, bitcast=True)
    else:
        total = tl.sum(acc, axis=0)
    return total, tl.sum(bad, axis=0)


@launched
def total_kernel(found: tl.int64, count: tl.int32, total: tl.int64, KIND: tl.constexpr):
    """With several devices: make one pair of all that one of them found."""
    value, bad = add_up(found, count, KIND)
    tl.store(total.to(tl.pointer_type(tl.float64)), value)
    tl.store(total.to(tl.pointer_type(tl.float64)) + 1, bad)


@launched
def prepare_kernel(
    grads: tl.int64,
    rows: tl.int64,
    groups: tl.int64,
    scalars: tl.int64,
    control: tl.int64,
    row_count: tl.int32,
    found: tl.int64,
    found_count: tl.int32,
    p: tl.float64,
    scale: tl.float64,
    scale_live: tl.int64,
    scale_dtype: tl.int32,
    found_inf: tl.float64,
    found_inf_live: tl.int64,
    found_inf_dtype: tl.int32,
    max_norm: tl.float64,
    max_norm_live: tl.int64,
    max_norm_dtype: tl.int32,
    report_scalars: tl.int64,
    report_found_inf: tl.int64,
    CONSTANTS: tl.constexpr,
    CONSTANT_COUNT: tl.constexpr,
    KIND: tl.constexpr,
    CHECK: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    REFUSE_NONFINITE: tl.constexpr,
    REPORT_DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the conclusions: norm, clip coefficient and whether to skip; then constants and step counts of the rows.

    Every program does the first part for itself, which waits for nobody, and the second for ``BLOCK`` rows. A bare step
    (no norm, no check) has nothing to add up.
    """
    inverse_scale = 1.0 / operand(scale, scale_live, scale_dtype)
    coefficient = tl.full((), 1.0, tl.float64)
    skip = tl.full((), 0, tl.int32)
    if HAS_FOUND_INF:
        skip = (operand(found_inf, found_inf_live, found_inf_dtype) != 0).to(tl.int32)
    leader = tl.program_id(0) == 0
    if KIND != NONE or CHECK:
        norm, bad = add_up(found, found_count, KIND)
        if CHECK:
            skip = (bad != 0).to(tl.int32)
        if KIND != NONE:
            if KIND == TWO:
                norm = tl.sqrt(norm)
            elif KIND == P:
                norm = tl.exp(tl.log(norm) / p)
            norm = norm * inverse_scale
            bound = operand(max_norm, max_norm_live, max_norm_dtype)
            clipped = bound / (norm + CLIP_EPS)
            clipped = tl.where(clipped > 1.0, 1.0, clipped)
            # An infinite bound only reports. NaN stays NaN either way.
            coefficient = tl.where(bound > LARGEST_DOUBLE, tl.where(norm != norm, norm, 1.0), clipped)
            if leader:
                if REPORT_DOUBLE:
                    tl.store(report_scalars.to(tl.pointer_type(tl.float64)), norm)
                    tl.store(report_scalars.to(tl.pointer_type(tl.float64)) + 1, coefficient)
                elif report_scalars != 0:
                    tl.store(report_scalars.to(tl.pointer_type(tl.float32)), norm.to(tl.float32))
                    tl.store(report_scalars.to(tl.pointer_type(tl.float32)) + 1, coefficient.to(tl.float32))
    if leader:
        if report_found_inf != 0:
            tl.store(report_found_inf.to(tl.pointer_type(tl.float32)), skip.to(tl.float32))
    if REFUSE_NONFINITE:
        skip = skip | (norm - norm != 0).to(tl.int32)
    if leader:
        tl.store(control.to(tl.pointer_type(tl.float64)) + CONTROL_MULTIPLIER, inverse_scale * coefficient)
        tl.store(control.to(tl.pointer_type(tl.int32)) + CONTROL_SKIP, skip)

    if skip == 0:
        r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = r < row_count
        mask = inside & (tl.load(grads.to(tl.pointer_type(tl.int64)) + r, mask=inside, other=0) != 0)
        row = rows + r.to(tl.int64) * ROW_SIZE
        counter = tl.load(row.to(tl.pointer_type(tl.int64)) + ROW_STEP, mask=mask, other=0)
        dtype = tl.load(row.to(tl.pointer_type(tl.uint8)) + ROW_STEP_DTYPE, mask=mask, other=0)
        step = number(counter, dtype, counter != 0) + 1
        step = tl.where(counter != 0, step, 1.0)
        group = tl.load(row.to(tl.pointer_type(tl.int32)) + ROW_GROUP, mask=mask, other=0)
        variant, constants = CONSTANTS(groups + group.to(tl.int64) * GROUP_SIZE, step, mask)
        out = scalars + r.to(tl.int64) * SCALARS_SIZE
        tl.store(out.to(tl.pointer_type(tl.int32)) + SCALARS_VARIANT, variant, mask=mask)
        for i in tl.static_range(CONSTANT_COUNT):
            tl.store(out.to(tl.pointer_type(tl.float64)) + (SCALARS_VALUES + i), constants[i], mask=mask)
        zero = tl.zeros_like(counter)
        store(counter, zero, (counter != 0) & (dtype == F32), step, F32)
        store(counter, zero, (counter != 0) & (dtype == F64), step, F64)


# ---------------------------------------------------------------------------------------------------------------------
# The update pass


@triton.jit
def column(row, c: tl.constexpr, layouts, DTYPE: tl.constexpr):
    """Address and layout (0 when flat) of column ``c`` of a row; zeros when it is not there."""
    if DTYPE == ABSENT:
        return tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    else:
        data = tl.load(row.to(tl.pointer_type(tl.int64)) + (ROW_DATA + c))
        layout = tl.load(row.to(tl.pointer_type(tl.int32)) + (ROW_LAYOUT + c)).to(tl.int64)
        return data, tl.where(layout < 0, 0, layouts + layout * LAYOUT_SIZE)


@triton.jit
def update_block(
    p_data, g_data, a_data, b_data, c_data,
    p_at, g_at, a_at, b_at, c_at, mask,
    constants, variant, multiplier, bound,
    UPDATE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    WRITE_BACK: tl.constexpr,
):  # fmt: skip
    """Unscale, clip and apply the rule to a block of elements: parameter, gradient and states ``a``, ``b``, ``c``."""
    T: tl.constexpr = tl.float64 if PARAM == F64 else tl.float32
    p = load(p_data, p_at, mask, PARAM, T)
    g = load(g_data, g_at, mask, GRAD, T)
    a = load(a_data, a_at, mask, A, T) if A != ABSENT else p
    b = load(b_data, b_at, mask, B, T) if B != ABSENT else p
    c = load(c_data, c_at, mask, C, T) if C != ABSENT else p
    g = g * multiplier
    g = tl.where(-bound > g, -bound, g)  # NaN stays NaN
    g = tl.where(bound < g, bound, g)
    if WRITE_BACK:
        store(g_data, g_at, mask, g, GRAD)
    p, a, b, c = UPDATE(constants, variant, p, g, a, b, c, A != ABSENT, C != ABSENT)
    store(p_data, p_at, mask, p, PARAM)
    if A != ABSENT:
        store(a_data, a_at, mask, a, A)
    if B != ABSENT:
        store(b_data, b_at, mask, b, B)
    if C != ABSENT:
        store(c_data, c_at, mask, c, C)


@launched
def update_kernel(
    grads: tl.int64,
    rows: tl.int64,
    layouts: tl.int64,
    chunks: tl.int64,
    scalars: tl.int64,
    control: tl.int64,
    chunk_elements: tl.int64,
    first_chunk: tl.int64,
    clip_value: tl.float64,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Update a chunk of a row whose columns have these dtypes: ``BLOCK`` elements at a time in whole vectors, or
    ``RAGGED`` where columns are not aligned, or not flat, or end. ``REVERSE``: the last chunk first."""
    if tl.load(control.to(tl.pointer_type(tl.int32)) + CONTROL_SKIP) != 0:
        return
    chunk = first_chunk + (tl.num_programs(0) - 1 - tl.program_id(0) if REVERSE else tl.program_id(0))
    entry = chunks.to(tl.pointer_type(tl.int32)) + chunk * CHUNK_SIZE
    r, index = tl.load(entry), tl.load(entry + 1)
    g_data = tl.load(grads.to(tl.pointer_type(tl.int64)) + r)
    if g_data == 0:
        return
    T: tl.constexpr = tl.float64 if PARAM == F64 else tl.float32
    row = rows + r.to(tl.int64) * ROW_SIZE
    offset = index.to(tl.int64) * chunk_elements
    numel = tl.load(row.to(tl.pointer_type(tl.int64)) + ROW_NUMEL)
    length = tl.minimum(numel - offset, chunk_elements).to(tl.int32)
    known = scalars + r.to(tl.int64) * SCALARS_SIZE
    variant = tl.load(known.to(tl.pointer_type(tl.int32)) + SCALARS_VARIANT)
    values = known.to(tl.pointer_type(tl.float64)) + SCALARS_VALUES
    constants = (
        tl.load(values).to(T),
        tl.load(values + 1).to(T),
        tl.load(values + 2).to(T),
        tl.load(values + 3).to(T),
        tl.load(values + 4).to(T),
        tl.load(values + 5).to(T),
        tl.load(values + 6).to(T),
        tl.load(values + 7).to(T),
        tl.load(values + 8).to(T),
        tl.load(values + 9).to(T),
    )
    multiplier = tl.load(control.to(tl.pointer_type(tl.float64)) + CONTROL_MULTIPLIER).to(T)
    bound = (tl.full((), 0, tl.float64) + clip_value).to(T)

    p_data, p_layout = column(row, 0, layouts, PARAM)
    g_layout = tl.load(row.to(tl.pointer_type(tl.int32)) + (ROW_LAYOUT + 1)).to(tl.int64)
    g_layout = tl.where(g_layout < 0, 0, layouts + g_layout * LAYOUT_SIZE)
    a_data, a_layout = column(row, 2, layouts, A)
    b_data, b_layout = column(row, 3, layouts, B)
    c_data, c_layout = column(row, 4, layouts, C)

    lane = tl.arange(0, BLOCK)
    done = 0
    flat = (p_layout | g_layout | a_layout | b_layout | c_layout) == 0
    if flat & ((p_data | g_data | a_data | b_data | c_data) % 16 == 0):
        done = length // BLOCK * BLOCK
        p_start, g_start = element(p_data, offset, PARAM), element(g_data, offset, GRAD)
        a_start, b_start = element(a_data, offset, A), element(b_data, offset, B)
        c_start = element(c_data, offset, C)
        for begin in range(0, done, BLOCK):
            at = begin + lane
            update_block(
                p_start, g_start, a_start, b_start, c_start, at, at, at, at, at, None,
                constants, variant, multiplier, bound, UPDATE, PARAM, GRAD, A, B, C, WRITE_BACK,
            )  # fmt: skip
    lane = tl.arange(0, RAGGED)
    for begin in range(done, length, RAGGED):
        at = offset + begin + lane
        p_at, g_at, a_at, b_at, c_at = at, at, at, at, at
        if p_layout != 0:
            p_at = place_of(p_layout, at)
        if g_layout != 0:
            g_at = place_of(g_layout, at)
        if a_layout != 0:
            a_at = place_of(a_layout, at)
        if b_layout != 0:
            b_at = place_of(b_layout, at)
        if c_layout != 0:
            c_at = place_of(c_layout, at)
        update_block(
            p_data, g_data, a_data, b_data, c_data, p_at, g_at, a_at, b_at, c_at, begin + lane < length,
            constants, variant, multiplier, bound, UPDATE, PARAM, GRAD, A, B, C, WRITE_BACK,
        )  # fmt: skip
