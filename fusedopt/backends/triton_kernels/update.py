"""The update pass."""

from __future__ import annotations

import triton
import triton.language as tl

from .forms import add_to_average, read, read_master, scales_of, write, write_master
from .memory import (
    ABSENT,
    CHUNK_SIZE,
    CONTROL_MULTIPLIER,
    CONTROL_SKIP,
    F64,
    LAYOUT_SIZE,
    ROW_DATA,
    ROW_FIRST_NUMBER,
    ROW_LAYOUT,
    ROW_NUMBERS,
    ROW_NUMEL,
    ROW_SIZE,
    ROW_STREAM,
    SCALARS_SIZE,
    SCALARS_STEP,
    SCALARS_VALUES,
    SCALARS_VARIANT,
    SCALARS_WEIGHT,
    UNSIGNED8,
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
    data, scales, at, place, chance, constants, variant, multiplier, bound, weight,
    UPDATE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    MASTER: tl.constexpr, AVERAGE: tl.constexpr, CHANCE: tl.constexpr, WRITE_BACK: tl.constexpr,
):  # fmt: skip
    """Unscale, clip and apply the rule to a block of elements: parameter, gradient, states ``a``, ``b``, ``c``, master
    and average."""
    T: tl.constexpr = tl.float64 if PARAM == F64 else tl.float32
    p_data, g_data, a_data, b_data, c_data, m_data, e_data = data
    p_at, g_at, a_at, b_at, c_at, m_at, e_at = at
    a_scales, b_scales, c_scales = scales
    _, _, mask = place
    if MASTER == ABSENT:
        p = load(p_data, p_at, mask, PARAM, T)
    else:
        p = read_master(p_data, m_data, p_at, m_at, mask, PARAM, MASTER)
    g = load(g_data, g_at, mask, GRAD, T)
    a = read(a_data, a_scales, a_at, place, A, T) if A != ABSENT else p
    b = read(b_data, b_scales, b_at, place, B, T) if B != ABSENT else p
    c = read(c_data, c_scales, c_at, place, C, T) if C != ABSENT else p
    g = g * multiplier
    g = tl.where(-bound > g, -bound, g)  # NaN stays NaN
    g = tl.where(bound < g, bound, g)
    if WRITE_BACK:
        store(g_data, g_at, mask, g, GRAD)
    p, a, b, c = UPDATE(constants, variant, p, g, a, b, c, A != ABSENT, C != ABSENT)
    if MASTER == ABSENT:
        p = write(p_data, 0, p_at, place, p, chance, PARAM, 0, CHANCE, AVERAGE != ABSENT)
    else:
        p = write_master(p_data, m_data, p_at, m_at, mask, p, chance, PARAM, MASTER, CHANCE)
    if A != ABSENT:
        write(a_data, a_scales, a_at, place, a, chance, A, 1, CHANCE)
    if B != ABSENT:
        write(b_data, b_scales, b_at, place, b, chance, B, 2, CHANCE)
    if C != ABSENT:
        write(c_data, c_scales, c_at, place, c, chance, C, 3, CHANCE)
    if AVERAGE != ABSENT:
        if weight != 0:
            add_to_average(e_data, e_at, mask, p, weight, AVERAGE)


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
    seed: tl.int64,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C: tl.constexpr,
    MASTER: tl.constexpr,
    AVERAGE: tl.constexpr,
    CHANCE: tl.constexpr,
    REVERSE: tl.constexpr,
    WRITE_BACK: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Update a chunk of a row whose columns have these forms: ``BLOCK`` elements at a time in whole vectors, or
    ``RAGGED`` where columns are not aligned, or not flat, or end. ``REVERSE``: the last chunk first. ``CHANCE``:
    all that is rounded is rounded by chance."""
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
    weight = tl.full((), 0, T)
    if AVERAGE != ABSENT:
        weight = tl.load(known.to(tl.pointer_type(tl.float64)) + SCALARS_WEIGHT).to(T)

    p_data, p_layout = column(row, 0, layouts, PARAM)
    g_layout = tl.load(row.to(tl.pointer_type(tl.int32)) + (ROW_LAYOUT + 1)).to(tl.int64)
    g_layout = tl.where(g_layout < 0, 0, layouts + g_layout * LAYOUT_SIZE)
    a_data, a_layout = column(row, 2, layouts, A)
    b_data, b_layout = column(row, 3, layouts, B)
    c_data, c_layout = column(row, 4, layouts, C)
    m_data, m_layout = column(row, 5, layouts, MASTER)
    e_data, e_layout = column(row, 6, layouts, AVERAGE)
    scales = (
        scales_of(a_data, numel, offset, A),
        scales_of(b_data, numel, offset, B),
        scales_of(c_data, numel, offset, C),
    )

    flat = (p_layout | g_layout | a_layout | b_layout | c_layout | m_layout | e_layout) == 0
    DRAWS: tl.constexpr = CHANCE or A == UNSIGNED8 or B == UNSIGNED8 or C == UNSIGNED8
    if DRAWS:
        words = row.to(tl.pointer_type(tl.uint32))
        step = tl.load(known.to(tl.pointer_type(tl.uint32)) + SCALARS_STEP)
        stream = tl.load(words + ROW_STREAM)
        keys = (tl.full((), 0, tl.int64) + seed).to(tl.uint64)
        key0, key1 = keys.to(tl.uint32), (keys >> 32).to(tl.uint32)
        numbers = tl.load(row.to(tl.pointer_type(tl.int32)) + ROW_NUMBERS).to(tl.int64)
        numbers = tl.where(numbers < 0, 0, layouts + numbers * LAYOUT_SIZE)
        number = tl.load(row.to(tl.pointer_type(tl.int64)) + ROW_FIRST_NUMBER)
        flat = flat & (numbers == 0) & ((number + offset) % 8 == 0)

    lane = tl.arange(0, BLOCK)
    done = 0
    if flat & ((p_data | g_data | a_data | b_data | c_data | m_data | e_data) % 16 == 0):
        done = length // BLOCK * BLOCK
        starts = (
            element(p_data, offset, PARAM),
            element(g_data, offset, GRAD),
            element(a_data, offset, A),
            element(b_data, offset, B),
            element(c_data, offset, C),
            element(m_data, offset, MASTER),
            element(e_data, offset, AVERAGE),
        )
        for begin in range(0, done, BLOCK):
            at = begin + lane
            if DRAWS:
                chance = (key0, key1, step, stream, ((number + offset + begin) >> 3) + tl.arange(0, BLOCK // 8), None)
            else:
                chance = None
            update_block(
                starts, scales, (at, at, at, at, at, at, at), (begin, length, None), chance,
                constants, variant, multiplier, bound, weight,
                UPDATE, PARAM, GRAD, A, B, C, MASTER, AVERAGE, CHANCE, WRITE_BACK,
            )  # fmt: skip
    lane = tl.arange(0, RAGGED)
    for begin in range(done, length, RAGGED):
        at = offset + begin + lane
        p_at, g_at, a_at, b_at, c_at, m_at, e_at = at, at, at, at, at, at, at
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
        if m_layout != 0:
            m_at = place_of(m_layout, at)
        if e_layout != 0:
            e_at = place_of(e_layout, at)
        if DRAWS:
            n = at
            if numbers != 0:
                n = place_of(numbers, at)
            n += number
            chance = (key0, key1, step, stream, n >> 3, n & 7)
        else:
            chance = None
        update_block(
            (p_data, g_data, a_data, b_data, c_data, m_data, e_data), scales,
            (p_at, g_at, a_at, b_at, c_at, m_at, e_at), (begin, length, begin + lane < length), chance,
            constants, variant, multiplier, bound, weight,
            UPDATE, PARAM, GRAD, A, B, C, MASTER, AVERAGE, CHANCE, WRITE_BACK,
        )  # fmt: skip
