"""Between the passes: what the statistics say, and the constants and step counts of the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    CONTROL_MULTIPLIER,
    CONTROL_SKIP,
    F32,
    F64,
    GROUP_SIZE,
    NONE,
    ROW_GROUP,
    ROW_SIZE,
    ROW_STEP,
    ROW_STEP_DTYPE,
    SCALARS_SIZE,
    SCALARS_STEP,
    SCALARS_VALUES,
    SCALARS_VARIANT,
    SCALARS_WEIGHT,
    TWO,
    P,
    launched,
    number,
    operand,
    store,
)
from .statistics import add_up

# Added to the norm before dividing by it; the clipping rule of fusedopt/rules/clipping.py.
CLIP_EPS = tl.constexpr(1e-6)
LARGEST_DOUBLE = tl.constexpr(1.7976931348623157e308)


@triton.jit
def average_weight(momentum, gamma, begin, interval, step):
    """The weight of the new value in the average of the weights, as csrc/tables.h."""
    updates = step.to(tl.int64) - 1 - begin
    gamma = tl.full((), 0, tl.float64) + gamma
    annealed = tl.where(gamma > 0, gamma / (gamma + updates.to(tl.float64)), 0.0)
    weight = tl.where(annealed > momentum, annealed, momentum)
    # (A quotient that comes out even is exact. Whole numbers have no division on a GPU.)
    turns = (updates.to(tl.float64) / (tl.full((), 0, tl.int64) + interval).to(tl.float64)).to(tl.int64)
    weight = tl.where(turns * interval != updates, 0.0, weight)
    return tl.where(updates <= 0, 1.0, weight)


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
    momentum: tl.float64,
    gamma: tl.float64,
    average_begin: tl.int64,
    average_interval: tl.int64,
    CONSTANTS: tl.constexpr,
    KIND: tl.constexpr,
    CHECK: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    REFUSE_NONFINITE: tl.constexpr,
    REPORT_DOUBLE: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw the conclusions: norm, clip coefficient and whether to skip; then constants and step counts of the rows.

    Every program does the first part for itself, which waits for nobody, and the second for ``BLOCK`` rows. A bare step
    (no norm, no check) has nothing to add up. ``AVERAGE``: there is an average of the weights.
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
        tl.store(out.to(tl.pointer_type(tl.uint32)) + SCALARS_STEP, step.to(tl.int64).to(tl.uint32), mask=mask)
        if AVERAGE:
            weight = average_weight(momentum, gamma, average_begin, average_interval, step)
            tl.store(out.to(tl.pointer_type(tl.float64)) + SCALARS_WEIGHT, weight, mask=mask)
        count: tl.constexpr = len(constants)
        for i in tl.static_range(count):
            tl.store(out.to(tl.pointer_type(tl.float64)) + (SCALARS_VALUES + i), constants[i], mask=mask)
        zero = tl.zeros_like(counter)
        store(counter, zero, (counter != 0) & (dtype == F32), step, F32)
        store(counter, zero, (counter != 0) & (dtype == F64), step, F64)
