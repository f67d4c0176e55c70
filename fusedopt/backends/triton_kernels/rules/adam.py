"""Adam and AdamW, as csrc/rules/adam.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..arithmetic import power, square_root
from ..memory import hyper

COUPLED, MAX = (tl.constexpr(1 << bit) for bit in range(2))


@triton.jit
def constants(group, step, mask):
    lr, beta1, beta2 = hyper(group, 0, mask), hyper(group, 1, mask), hyper(group, 2, mask)
    eps, decay, amsgrad = hyper(group, 3, mask), hyper(group, 4, mask), hyper(group, 5, mask)
    maximize, decoupled = hyper(group, 6, mask), hyper(group, 7, mask)
    variant = tl.where((decay != 0) & (decoupled == 0), COUPLED, 0) | tl.where(amsgrad != 0, MAX, 0)
    sign = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    keep = tl.where(decoupled != 0, 1.0 - lr * decay, 1.0)
    inv_sqrt_correction2 = 1.0 / tl.sqrt(1.0 - power(beta2, step))
    step_size = lr / (1.0 - power(beta1, step))
    return variant, (sign, decay, keep, beta1, 1.0 - beta1, beta2, 1.0 - beta2, inv_sqrt_correction2, eps, step_size)


@triton.jit
def update(c, variant, p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, has_state: tl.constexpr, has_third: tl.constexpr):
    sign, decay, keep, inv_sqrt_correction2, eps, step_size = c[0], c[1], c[2], c[7], c[8], c[9]
    g = g * sign
    coupled = variant & COUPLED != 0
    g = tl.where(coupled, g + decay * p, g)
    p = tl.where(coupled, p, p * keep)
    exp_avg = c[3] * exp_avg + c[4] * g
    exp_avg_sq = c[5] * exp_avg_sq + c[6] * g * g
    variance = exp_avg_sq
    if has_third:
        larger = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        larger = tl.where(larger, exp_avg_sq, max_exp_avg_sq)
        max_exp_avg_sq = tl.where(variant & MAX != 0, larger, max_exp_avg_sq)
        variance = tl.where(variant & MAX != 0, larger, variance)
    if p.dtype == tl.float64:
        p = p - step_size * exp_avg / (tl.sqrt(variance) * inv_sqrt_correction2 + eps)
    else:
        p = p - tl.div_rn(step_size * exp_avg, square_root(variance) * inv_sqrt_correction2 + eps)
    return p, exp_avg, exp_avg_sq, max_exp_avg_sq
