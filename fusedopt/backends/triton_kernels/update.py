"""The update pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    ABSENT,
    CHUNK_SIZE,
    CONTROL_MULTIPLIER,
    CONTROL_SKIP,
    F64,
    LAYOUT_SIZE,
    ROW_DATA,
    ROW_LAYOUT,
    ROW_NUMEL,
    ROW_SIZE,
    SCALARS_SIZE,
    SCALARS_VALUES,
    SCALARS_VARIANT,
    element,
    launched,
    load,
    place_of,
    store,
)


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
