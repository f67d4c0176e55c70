"""SGD with momentum, as csrc/rules/sgd.h."""

from __future__ import annotations

import triton
import triton.language as tl

from ..memory import hyper

DECAY, MOMENTUM, FIRST, NESTEROV = (tl.constexpr(1 << bit) for bit in range(4))


@triton.jit
def constants(group, step, mask):
    lr, momentum, dampening = hyper(group, 0, mask), hyper(group, 1, mask), hyper(group, 2, mask)
    decay, nesterov, maximize = hyper(group, 3, mask), hyper(group, 4, mask), hyper(group, 5, mask)
    variant = tl.where(momentum != 0, MOMENTUM, 0) | tl.where(decay != 0, DECAY, 0)
    variant = variant | tl.where(step == 1, FIRST, 0) | tl.where(nesterov != 0, NESTEROV, 0)
    sign = tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)
    return variant, (sign, decay, momentum, 1.0 - dampening, lr)


@triton.jit
def update(c, variant, p, g, buffer, unused1, unused2, has_state: tl.constexpr, has_third: tl.constexpr):
    sign, decay, momentum, keep, lr = c[0], c[1], c[2], c[3], c[4]
    g = g * sign
    g = tl.where(variant & DECAY != 0, g + decay * p, g)
    if has_state:
        moving = tl.where(variant & FIRST != 0, g, momentum * buffer + keep * g)
        ahead = tl.where(variant & NESTEROV != 0, g + momentum * moving, moving)
        buffer = tl.where(variant & MOMENTUM != 0, moving, buffer)
        g = tl.where(variant & MOMENTUM != 0, ahead, g)
    return p - lr * g, buffer, unused1, unused2
