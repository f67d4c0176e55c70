"""Random bits of elements; see Note [Random bits] in csrc/storage.h."""

from __future__ import annotations

import triton
import triton.language as tl

# As in csrc/storage.h.
ROUNDS = tl.constexpr(7)
FACTOR_0, FACTOR_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
KEY_0, KEY_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
COLUMNS = tl.constexpr(8)


@triton.jit
def wide_product(a, b: tl.constexpr):
    """The upper and the lower half of a product of two uint32."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Philox4x32 of a counter and a key, all uint32."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = wide_product(c0, FACTOR_0)
        high1, low1 = wide_product(c2, FACTOR_1)
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 = key0 + KEY_0
        key1 = key1 + KEY_1
    return c0, c1, c2, c3


@triton.jit
def random_bits(chance, COLUMN: tl.constexpr):
    """16 random bits for each element, as uint32. ``chance`` is (key, key, step, stream, eight, half): words of the key
    and of the counter, and of each element a number and which of the eight pieces that it counts is the element's.
    ``half`` is None where there is a number for each eight elements, which share the calculation."""
    key0, key1, step, stream, eight, half = chance
    column = stream * COLUMNS + COLUMN
    c0, c1, c2, c3 = philox(eight.to(tl.uint32), (eight >> 32).to(tl.uint32), step, column, key0, key1)
    if half is None:
        return tl.reshape(
            piece(c0[:, None], c1[:, None], c2[:, None], c3[:, None], tl.arange(0, 8)[None, :]), (c0.shape[0] * 8,)
        )
    else:
        return piece(c0, c1, c2, c3, half)


@triton.jit
def piece(c0, c1, c2, c3, half):
    word = tl.where(half < 4, tl.where(half < 2, c0, c1), tl.where(half < 6, c2, c3))
    return (word >> ((half & 1) * 16).to(tl.uint32)) & 0xFFFF
