"""Elements in fewer bits than they are calculated in: rounding by chance, roots, codes and pieces; csrc/storage.h."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import square_root
from .chance import random_bits
from .memory import BF16, F16, F32, LOW8, LOW16, ROOT16, SIGNED8, UNSIGNED8, load, pointer, round_to_odd, store

CODE_BLOCK = tl.constexpr(64)
SIGNED_MANTISSA, SIGNED_MOST = tl.constexpr(4), tl.constexpr(127)
UNSIGNED_MANTISSA, UNSIGNED_MOST = tl.constexpr(4), tl.constexpr(255)


@triton.jit
def scales_of(data, numel, offset, DTYPE: tl.constexpr):
    """The address of the scales of codes from element ``offset`` on, or 0 for a column that has none."""
    if DTYPE == SIGNED8 or DTYPE == UNSIGNED8:  # noqa: SIM109
        return data + (numel + 15) // 16 * 16 + offset // CODE_BLOCK * 2
    else:
        return tl.full((), 0, tl.int64)


# Note [Eights]
# In whole vectors, what belongs to a block of codes is loaded, kept and stored once for each eight of its elements:
# about as many as a thread has, so that nothing has to be brought to the threads that need it. Elsewhere it is once for
# each element.


@triton.jit
def holders(place, N: tl.constexpr, EACH: tl.constexpr):
    """For each ``EACH`` of ``N`` elements their block of codes, counted from those at ``offset``, whether they are
    inside, and whether they are also the first of their block."""
    begin, length, mask = place
    i = tl.arange(0, N // EACH)
    block = begin // CODE_BLOCK + i // (CODE_BLOCK // EACH)
    first = i % (CODE_BLOCK // EACH) == 0
    if mask is None:
        return block, None, first
    else:
        inside = block * CODE_BLOCK < length
        return block, inside, first & inside


@triton.jit
def spread(x, TIMES: tl.constexpr):
    """Each number several times."""
    if TIMES == 1:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None], (x.shape[0], TIMES)), (x.shape[0] * TIMES,))


@triton.jit
def magnitude_of(code, MANTISSA: tl.constexpr):
    return ((code << (23 - MANTISSA)) + 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def code_of(magnitude, inverse, random, MANTISSA: tl.constexpr, MOST: tl.constexpr, CHANCE: tl.constexpr):
    bits = (magnitude * inverse + 1.0).to(tl.uint32, bitcast=True) - 0x3F800000
    if CHANCE:
        bits += random << (7 - MANTISSA)
    else:
        bits += tl.full(bits.shape, 1, tl.uint32) << (22 - MANTISSA)
    code = bits >> (23 - MANTISSA)
    return tl.where(code < MOST, code, MOST)


@triton.jit
def scale_of(magnitude, MANTISSA: tl.constexpr, MOST: tl.constexpr):
    """The scale (the bits of a bfloat16) of a block whose largest magnitude this is, and its inverse."""
    largest = magnitude_of(tl.full(magnitude.shape, MOST, tl.uint32), MANTISSA)
    scale = tl.div_rn(magnitude, largest)
    up = (scale.to(tl.uint32, bitcast=True) + 0xFFFF) >> 16
    none = scale < 1.17549435e-38  # 2^-126
    up = tl.where(none, 0, up)
    up = tl.where(magnitude - magnitude != 0, 0x7FC0, up)
    wide = tl.where(up == 0, 0x3F80, up) << 16
    inverse = tl.div_rn(tl.full(magnitude.shape, 1.0, tl.float32), wide.to(tl.float32, bitcast=True))
    return up, tl.where(up == 0, 0.0, inverse)


@triton.jit
def read(address, scales, at, place, DTYPE: tl.constexpr, T: tl.constexpr):
    """Elements number ``at`` of a column, whatever its form, as type ``T``. ``place`` is (begin, length, mask): of the
    first element and of the end in the chunk, and None where all elements are inside and aligned."""
    _, _, mask = place
    if DTYPE == SIGNED8 or DTYPE == UNSIGNED8:  # noqa: SIM109
        N: tl.constexpr = at.shape[0]
        code = tl.load(pointer(address, mask, tl.uint8) + at, mask=mask).to(tl.uint32)
        EACH: tl.constexpr = 8 if mask is None else 1
        block, inside, _ = holders(place, N, EACH)
        scale = spread(load(scales, block, inside, BF16, tl.float32), EACH)
        if DTYPE == UNSIGNED8:
            x = magnitude_of(code, UNSIGNED_MANTISSA) * scale
        else:
            bits = (magnitude_of(code & 0x7F, SIGNED_MANTISSA) * scale).to(tl.uint32, bitcast=True)
            x = (bits ^ ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
        return x.to(T)
    elif DTYPE == ROOT16:
        root = load(address, at, mask, F16, T)
        return root * root
    else:
        return load(address, at, mask, DTYPE, T)


@triton.jit
def write_codes(address, scales, at, place, values, random, DTYPE: tl.constexpr, CHANCE: tl.constexpr):
    """Code float32 numbers, each block by its own scale."""
    _, _, mask = place
    N: tl.constexpr = at.shape[0]
    MANTISSA: tl.constexpr = UNSIGNED_MANTISSA if DTYPE == UNSIGNED8 else SIGNED_MANTISSA
    MOST: tl.constexpr = UNSIGNED_MOST if DTYPE == UNSIGNED8 else SIGNED_MOST
    # As integers, floats without a sign have the order of their bits, and NaN is the largest.
    bits = (values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)
    if mask is not None:
        bits = tl.where(mask, bits, 0)
    most = tl.max(tl.reshape(bits, (N // CODE_BLOCK, CODE_BLOCK)), axis=1)
    scale, inverse = scale_of(most.to(tl.float32, bitcast=True), MANTISSA, MOST)
    EACH: tl.constexpr = 8 if mask is None else 1
    block, _, first = holders(place, N, EACH)
    scale, inverse = spread(scale, CODE_BLOCK // EACH), spread(inverse, CODE_BLOCK // EACH)
    tl.store(pointer(scales, mask, tl.uint16) + block, scale.to(tl.uint16), mask=first)
    inverse = spread(inverse, EACH)
    code = code_of(tl.abs(values), inverse, random, MANTISSA, MOST, CHANCE)
    if DTYPE == UNSIGNED8:
        code = tl.where((code == 0) & (values > 0) & (inverse > 0), 1, code)
    else:
        code = tl.where(values < 0, code | 0x80, code)
    tl.store(pointer(address, mask, tl.uint8) + at, code.to(tl.uint8), mask=mask)


@triton.jit
def half_of(x, random, DTYPE: tl.constexpr, CHANCE: tl.constexpr):
    """The bits of the bfloat16 or float16 that a number is rounded to."""
    if x.dtype == tl.float64:
        x = round_to_odd(x)
    bits = x.to(tl.uint32, bitcast=True)
    if DTYPE == BF16:
        if CHANCE:
            half = (bits + random) >> 16
        else:
            half = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, half, 0x7FC0).to(tl.uint16)
    elif CHANCE:
        sign, rest = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
        normal = (rest + (random >> 3) + 0xC8000000) >> 13
        small = rest < 0x38800000
        # Below 2^-14 float16 has a fixed point, here with 16 further bits.
        digits = ((rest & 0x7FFFFF) | 0x800000) << 2
        fixed = digits >> tl.minimum(112 - tl.where(small, rest, 0) // 0x800000, 31)
        magnitude = tl.where(small, (fixed + random) >> 16, normal)
        magnitude = tl.where(rest >= 0x47800000, 0x7C00, magnitude)
        magnitude = tl.where(rest > 0x7F800000, 0x7E00, magnitude)
        return (sign | magnitude).to(tl.uint16)
    else:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def value_of(half, DTYPE: tl.constexpr, T: tl.constexpr):
    """The number that these bits of a bfloat16 or float16 are."""
    if DTYPE == BF16:
        return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(T)
    else:
        return half.to(tl.float16, bitcast=True).to(T)


@triton.jit
def write(
    address, scales, at, place, x, chance,
    DTYPE: tl.constexpr, COLUMN: tl.constexpr, CHANCE: tl.constexpr, REREAD: tl.constexpr = False,
):  # fmt: skip
    """Store elements number ``at`` of column ``COLUMN`` in its form, to nearest or by chance. With ``REREAD`` it
    returns them as they would be read again."""
    _, _, mask = place
    EIGHT: tl.constexpr = (DTYPE == SIGNED8) | (DTYPE == UNSIGNED8)
    HALF: tl.constexpr = (DTYPE == BF16) | (DTYPE == F16) | (DTYPE == ROOT16)
    random = 0
    BY_CHANCE: tl.constexpr = DTYPE == UNSIGNED8 or (CHANCE and (EIGHT or HALF))
    if BY_CHANCE:
        random = random_bits(chance, COLUMN)
    if EIGHT:
        write_codes(address, scales, at, place, x.to(tl.float32), random, DTYPE, BY_CHANCE)
    elif DTYPE == ROOT16:
        if x.dtype == tl.float64:
            root = tl.sqrt(x)
        else:
            root = square_root(x)
        root = tl.where((root > 65504.0) & (root - root == 0), 65504.0, root)  # an infinity would stay one for ever
        half = half_of(root, random, F16, CHANCE)
        half = tl.where((root > 0) & (half == 0), 1, half).to(tl.uint16)  # not zero unless it is
        tl.store(pointer(address, mask, tl.uint16) + at, half, mask=mask)
    elif HALF and (CHANCE or REREAD):
        half = half_of(x, random, DTYPE, CHANCE)
        tl.store(pointer(address, mask, tl.uint16) + at, half, mask=mask)
        x = value_of(half, DTYPE, x.dtype)
    else:
        store(address, at, mask, x, DTYPE)
    return x


@triton.jit
def joined(high, rest):
    """The float32 of two pieces; where somebody has written another bfloat16, the rest may lead astray."""
    both = high + rest
    spoils = ((both & 0x7FFFFFFF) > 0x7F800000) & ((high & 0x7FFFFFFF) <= 0x7F800000)
    return tl.where((((both ^ high) >> 31) != 0) | spoils, high, both).to(tl.float32, bitcast=True)


@triton.jit
def read_master(p_data, m_data, p_at, m_at, mask, PARAM: tl.constexpr, MASTER: tl.constexpr):
    """The float32 that a parameter and its master are together."""
    shown = load(p_data, p_at, mask, PARAM, tl.float32)
    if MASTER == LOW16:
        rest = tl.load(pointer(m_data, mask, tl.int16) + m_at, mask=mask).to(tl.int32).to(tl.uint32, bitcast=True)
        return joined(shown.to(tl.uint32, bitcast=True), rest)
    elif MASTER == LOW8:
        rest = tl.load(pointer(m_data, mask, tl.int8) + m_at, mask=mask).to(tl.int32) * 256
        return joined(shown.to(tl.uint32, bitcast=True), rest.to(tl.uint32, bitcast=True))
    else:
        # Where the parameter is not the master's rounding, somebody has changed it, and it is what counts.
        master = load(m_data, m_at, mask, MASTER, tl.float32)
        rounded = value_of(half_of(master, 0, PARAM, False), PARAM, tl.float32)
        same = rounded.to(tl.uint32, bitcast=True) == shown.to(tl.uint32, bitcast=True)
        return tl.where(same, master, shown)


@triton.jit
def write_master(
    p_data, m_data, p_at, m_at, mask, x, chance, PARAM: tl.constexpr, MASTER: tl.constexpr, CHANCE: tl.constexpr
):
    """Store a float32 in a parameter and its master; returns it as it would be read again."""
    if MASTER == F32:
        store(p_data, p_at, mask, x, PARAM)
        store(m_data, m_at, mask, x, MASTER)
    else:
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        if MASTER == LOW8:
            if CHANCE:
                bits = (bits + (random_bits(chance, 0) >> 8)) & 0xFFFFFF00
            else:
                bits = (bits + 0x7F + ((bits >> 8) & 1)) & 0xFFFFFF00
            tl.store(pointer(m_data, mask, tl.uint8) + m_at, (bits >> 8).to(tl.uint8), mask=mask)
        else:
            tl.store(pointer(m_data, mask, tl.uint16) + m_at, bits.to(tl.uint16), mask=mask)
        high = ((bits + 0x8000) >> 16).to(tl.uint16)
        tl.store(pointer(p_data, mask, tl.uint16) + p_at, high, mask=mask)
        x = bits.to(tl.float32, bitcast=True)
    return x


@triton.jit
def add_to_average(address, at, mask, x, weight, DTYPE: tl.constexpr):
    """Take what the weights are now into their average."""
    T: tl.constexpr = x.dtype
    average = load(address, at, mask, DTYPE, T)
    small = average + weight * (x - average)
    average = tl.where(weight < 0.5, small, x - (x - average) * (1 - weight))
    average = tl.where(weight == 1, x, average)
    store(address, at, mask, average, DTYPE)
