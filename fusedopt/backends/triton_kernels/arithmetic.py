"""What rules need and Triton does not have to the last digit."""

from __future__ import annotations

import triton
import triton.language as tl


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
def square_root(x):
    """The float32 root, rounded to nearest."""
    # Small numbers are lifted and the root is lowered, both exactly: Triton 3.6 has a sequence for AMD that begins with
    # 1 / sqrt(x), which is not made for them.
    small = x < 1.262177448e-29  # 2^-96
    root = tl.sqrt_rn(tl.where(small, x * 4294967296.0, x))
    return tl.where(small, root * 1.52587890625e-05, root)
