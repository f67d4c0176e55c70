"""The chunk map, and the statistics pass with what adds up its results."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    BF16,
    CHUNK_SIZE,
    F16,
    F32,
    F64,
    INF,
    LAYOUT_SIZE,
    ONE,
    ROW_DOMAIN,
    ROW_DTYPE,
    ROW_FIRST_CHUNK,
    ROW_LAYOUT,
    ROW_NUMEL,
    ROW_SIZE,
    TWO,
    P,
    element,
    launched,
    load,
    place_of,
)

# Below this, a sum of squares in float32 may have lost small ones to underflow.
UNDERFLOW = tl.constexpr(1e-24)

# Lanes of a statistics pass, and of what adds up its results. The order of additions depends on them, so that they are
# no matter of tuning: the norm has the same bits in every run.
SUM_BLOCK = tl.constexpr(1024)
# Elements that are first added up in float32, where float64 is slow.
FLOAT_RUN = tl.constexpr(8)


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
def add_up(found, count, KIND: tl.constexpr, rows=0, chunks=0, domain=0, SEVERAL: tl.constexpr = False):
    """The sum (or the maximum) of ``count`` pairs as :func:`statistics_kernel` leaves them, in a fixed order.

    With ``SEVERAL``, that of the chunks of one domain. Whether an element is not finite is told of all.
    """
    pairs = found.to(tl.pointer_type(tl.float64))
    lane = tl.arange(0, SUM_BLOCK)
    acc = tl.zeros((SUM_BLOCK,), tl.int64 if KIND == INF else tl.float64)
    bad = tl.zeros((SUM_BLOCK,), tl.float64)
    for begin in range(0, count, SUM_BLOCK):
        i = begin + lane
        counts = i < count
        if SEVERAL:
            row = tl.load(chunks.to(tl.pointer_type(tl.int32)) + i.to(tl.int64) * CHUNK_SIZE, mask=counts, other=0)
            start = rows + row.to(tl.int64) * ROW_SIZE
            mine = tl.load(start.to(tl.pointer_type(tl.int32)) + ROW_DOMAIN, mask=counts, other=0)
            counts = counts & (mine == domain)
        sums = tl.load(pairs + 2 * i, mask=counts, other=0)
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
def total_kernel(
    found: tl.int64,
    count: tl.int32,
    rows: tl.int64,
    chunks: tl.int64,
    totals: tl.int64,
    KIND: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    """In a first half: make one pair of all that was found in domain ``program_id``."""
    domain = tl.program_id(0)
    value, bad = add_up(found, count, KIND, rows, chunks, domain, SEVERAL)
    mine = totals.to(tl.pointer_type(tl.float64)) + 2 * domain
    tl.store(mine, value)
    tl.store(mine + 1, bad)
