"""How elements are kept in fewer bits than they are calculated in: csrc/storage.h once more, in plain tensors.

The notes on random bits, means of squares and codes are there. Everything here is of one run of elements in canonical
order, and gives the bits that the kernels give. Unsigned numbers of 32 bits are int64 here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CODE_BLOCK",
    "FORMS",
    "RANDOM_COLUMNS",
    "RANDOM_ROUNDS",
    "SIGNED",
    "UNSIGNED",
    "Code",
    "canonical_order",
    "coded_bytes",
    "decode",
    "encode",
    "encode_again",
    "flattened",
    "join",
    "marked_order",
    "narrow",
    "order_of_codes",
    "philox",
    "random_halves",
    "scales_at",
    "split",
    "unflattened",
]

#: Elements that share a scale.
CODE_BLOCK = 64
#: Rounds of Philox, and the numbers of columns in a counter.
RANDOM_ROUNDS = 7
RANDOM_COLUMNS = 8

_WORD = 0xFFFFFFFF


class Code(NamedTuple):
    """A code of 8 bits: how many of them are the mantissa, and the largest magnitude's."""

    mantissa: int
    most: int

    @property
    def shift(self) -> int:
        """Between a code and the float32 that it is the leading bits of."""
        return 23 - self.mantissa

    @property
    def largest(self) -> float:
        """What the largest code stands for, in units of the scale."""
        return (1 + (self.most % 2**self.mantissa) / 2**self.mantissa) * 2.0 ** (self.most >> self.mantissa) - 1


#: The code of what has a sign, and that of means of squares.
SIGNED = Code(4, 127)
UNSIGNED = Code(4, 255)

#: The forms of :func:`encode`, with the dtype of what is stored.
FORMS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float16_root": torch.float16,
    "int8": torch.uint8,
    "int8_unsigned": torch.uint8,
}


def scales_at(numel: int) -> int:
    """Where the scales of ``numel`` codes begin, in bytes."""
    return (numel + 15) // 16 * 16


def coded_bytes(numel: int) -> int:
    """The bytes that ``numel`` codes take, with their scales."""
    return scales_at(numel) + 2 * ((numel + CODE_BLOCK - 1) // CODE_BLOCK)


# Canonical order


def canonical_order(param: Tensor) -> list[int]:
    """The dimensions of a parameter, sorted by its strides, largest first: see Note [Canonical order] in csrc/tables.h.

    Those of one element, whose strides mean nothing, come last.
    """
    strides = param.stride()
    return sorted(range(param.dim()), key=lambda d: (param.shape[d] == 1, -strides[d]))


def order_of_codes(param: Tensor) -> list[int]:
    """The dimensions of a parameter's local tensor that have a place in its canonical order."""
    return [d for d in canonical_order(param) if param.shape[d] != 1]


def marked_order(param: Tensor, codes: Tensor) -> list[int]:
    """The dimensions of a parameter in whose order codes are: that of its strides when they were first seen.

    See Note [The order of codes] in csrc/plan/states.cpp, which reads the mark and sets it as well.
    """
    order = order_of_codes(param)
    dims = sorted(order)
    if not hasattr(codes, "_codes_order"):
        codes._codes_order = tuple(map(dims.index, order))  # type: ignore[attr-defined]
    return [dims[rank] for rank in codes._codes_order]  # type: ignore[attr-defined]


def flattened(tensor: Tensor, order: list[int]) -> Tensor:
    """The elements of a tensor of a parameter's shape in the parameter's canonical order, 1-D."""
    return tensor.permute(order).reshape(-1)


def unflattened(flat: Tensor, order: list[int], shape: torch.Size) -> Tensor:
    """The inverse of :func:`flattened`: a view of ``flat``."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[d] for d in order]).permute(inverse)


# Random bits


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product of two words."""
    upper, lower = constant * (word >> 16), constant * (word & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _WORD


def philox(counter: tuple[Tensor, ...], key: tuple[int, int], rounds: int = RANDOM_ROUNDS) -> tuple[Tensor, ...]:
    """Philox4x32: four words of random bits for each counter of four words.

    Args:
        counter: four int64 tensors of words.
        key: two words.
        rounds: 7 pass all tests that its authors know; 10 are their margin.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(rounds):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def random_halves(seed: int, stream: int, column: int, step: int, numbers: Tensor) -> Tensor:
    """16 random bits for each element.

    Args:
        seed: the optimizer's, of 64 bits.
        stream: the parameter's number in its optimizer.
        column: 0 for the parameter or its master, from 1 for the rule's states.
        step: the number of this step for the parameter, from 1.
        numbers: of the elements in the whole parameter's canonical order, int64.
    """
    eight = numbers >> 3
    third = torch.full_like(eight, step & _WORD)
    fourth = torch.full_like(eight, (stream * RANDOM_COLUMNS + column) & _WORD)
    words = torch.stack(philox((eight & _WORD, eight >> 32, third, fourth), (seed & _WORD, seed >> 32 & _WORD)))
    half = numbers & 7
    word = words.gather(0, (half >> 1)[None])[0]
    return (word >> ((half & 1) << 4)) & 0xFFFF


# Floating point


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32).long() & _WORD


def _floats(bits: Tensor) -> Tensor:
    return _signed(bits, 32).to(torch.int32).view(torch.float32)


def _signed(bits: Tensor, width: int) -> Tensor:
    """Unsigned numbers as those of two's complement that have the same bits."""
    return torch.where(bits >= 1 << (width - 1), bits - (1 << width), bits)


def narrow(values: Tensor) -> Tensor:
    """What is rounded to 16 bits next, in float32: float64 is rounded to odd, so that it is as if rounded once."""
    if values.dtype != torch.float64:
        return values.float()
    nearest = values.float()
    bits = _bits(nearest)
    beyond = nearest.double().abs() > values.abs()
    odd = _floats((bits - beyond.long()) | 1)
    return torch.where((nearest.double() == values) | values.isnan(), nearest, odd)


def _to_bfloat16(values: Tensor, random: Tensor | None) -> Tensor:
    bits = _bits(values)
    up = 0x7FFF + ((bits >> 16) & 1) if random is None else random
    rounded = torch.where(values.isnan(), 0x7FC0, ((bits + up) & _WORD) >> 16)
    return _signed(rounded, 16).to(torch.int16).view(torch.bfloat16)


def _to_float16(values: Tensor, random: Tensor | None) -> Tensor:
    if random is None:
        return values.to(torch.float16)
    bits = _bits(values)
    sign, rest = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    normal = ((rest + (random >> 3) + 0xC8000000) & _WORD) >> 13
    # Below 2^-14 float16 has a fixed point, here with 16 further bits.
    is_small = rest < 0x38800000
    fixed = _floats(torch.where(is_small, rest, 0)) * 2.0**40
    magnitude = torch.where(is_small, (fixed.long() + random) >> 16, normal)
    magnitude = torch.where(rest >= 0x47800000, 0x7C00, magnitude)
    magnitude = torch.where(rest > 0x7F800000, 0x7E00, magnitude)
    return _signed(sign | magnitude, 16).to(torch.int16).view(torch.float16)


def _root_to_float16(roots: Tensor, random: Tensor | None) -> Tensor:
    # An infinity would stay one for ever, and its weight would never move again.
    roots = torch.where(roots.isfinite(), roots.clamp(max=65504.0), roots)
    half = _to_float16(roots, random)
    smallest = torch.ones_like(half, dtype=torch.int16).view(torch.float16)
    return torch.where((roots > 0) & (half == 0), smallest, half)


# Codes


def _encode_codes(values: Tensor, code: Code, random: Tensor | None) -> Tensor:
    numel = values.numel()
    stored = torch.zeros(coded_bytes(numel), dtype=torch.uint8, device=values.device)
    if numel == 0:
        return stored
    blocks = -(-numel // CODE_BLOCK)
    magnitudes = torch.zeros(blocks * CODE_BLOCK, device=values.device)
    magnitudes[:numel] = torch.where(values < 0, -values, values)
    most = magnitudes.view(blocks, CODE_BLOCK).amax(1)  # hands NaN on
    scale = most / torch.full_like(most, code.largest)
    scale_bits = (_bits(scale) + 0xFFFF) >> 16
    scale_bits = torch.where(scale < 2.0**-126, 0, scale_bits)
    scale_bits = torch.where(most - most != 0, 0x7FC0, scale_bits)
    scales = _floats(scale_bits << 16)
    inverse = torch.where(scale_bits == 0, 0.0, torch.ones_like(scales) / scales).repeat_interleave(CODE_BLOCK)[:numel]
    rounding: int | Tensor = 1 << (code.shift - 1) if random is None else random << (7 - code.mantissa)
    codes = ((_bits(magnitudes[:numel] * inverse + 1.0) - 0x3F800000 + rounding) & _WORD) >> code.shift
    codes = codes.clamp(max=code.most)
    if code is SIGNED:
        codes = torch.where(values < 0, codes | 0x80, codes)
    else:
        codes = torch.where((codes == 0) & (values > 0) & (inverse > 0), 1, codes)
    stored[:numel] = codes.to(torch.uint8)
    stored[scales_at(numel) :] = _signed(scale_bits, 16).to(torch.int16).view(torch.uint8)
    return stored


def _decode_codes(stored: Tensor, code: Code, numel: int) -> Tensor:
    codes = stored[:numel].long()
    scale_bits = stored[scales_at(numel) :].clone().view(torch.int16).long() & 0xFFFF
    scales = _floats(scale_bits << 16).repeat_interleave(CODE_BLOCK)[:numel]
    magnitude = codes & 0x7F if code is SIGNED else codes
    values = (_floats((magnitude << code.shift) + 0x3F800000) - 1.0) * scales
    return torch.where(codes >= 0x80, -values, values) if code is SIGNED else values


# All of them


def encode(values: Tensor, form: str, random: Tensor | None = None) -> Tensor:
    """Values in the form in which they are stored.

    Args:
        values: float32, 1-D, in canonical order; where the form is a root's, those of which the root is stored.
        form: one of :data:`FORMS`.
        random: 16 random bits for each, to round by chance; None rounds to nearest.
    """
    if form == "float32":
        return values
    if form == "bfloat16":
        return _to_bfloat16(values, random)
    if form == "float16":
        return _to_float16(values, random)
    if form == "float16_root":
        return _root_to_float16(values.sqrt(), random)
    return _encode_codes(values, SIGNED if form == "int8" else UNSIGNED, random)


def decode(stored: Tensor, form: str, numel: int) -> Tensor:
    """The float32 values of ``numel`` elements that are stored in a form; the inverse of :func:`encode`."""
    if form in ("int8", "int8_unsigned"):
        return _decode_codes(stored, SIGNED if form == "int8" else UNSIGNED, numel)
    values = stored.float()
    return values.square() if form == "float16_root" else values


def encode_again(values: Tensor, form: str) -> Tensor:
    """Values in the form in which they are stored, rounded to nearest; what :func:`decode` gave is stored as it was.

    The largest of a block that was rounded by chance may have the second largest code. Then its scale, as
    :func:`encode` chooses it, would be a smaller one, and others would be rounded a second time.

    Args:
        values: float32, 1-D, in canonical order.
        form: one of :data:`FORMS`.
    """
    stored = encode(values, form)
    if form not in ("int8", "int8_unsigned") or not values.numel():
        return stored
    code, numel = (SIGNED if form == "int8" else UNSIGNED), values.numel()
    blocks = -(-numel // CODE_BLOCK)
    padded = torch.zeros(blocks * CODE_BLOCK, device=values.device)
    padded[:numel] = values
    most = padded.abs().view(blocks, CODE_BLOCK).amax(1)
    second = Code(code.mantissa, code.most - 1).largest
    scales = (most / torch.full_like(most, second)).to(torch.bfloat16)
    spread = scales.float().repeat_interleave(CODE_BLOCK)
    inverse = torch.where(spread > 0, 1 / spread, 0)
    codes = (_bits(padded.abs() * inverse + 1.0) - 0x3F800000 + (1 << (code.shift - 1)) >> code.shift).clamp(
        0, code.most
    )
    exact = (_floats((codes << code.shift) + 0x3F800000) - 1.0) * spread == padded.abs()
    known = decode(stored, form, numel) == values
    known = torch.nn.functional.pad(known, (0, len(padded) - numel), value=True).view(blocks, CODE_BLOCK).all(1)
    again = exact.view(blocks, CODE_BLOCK).all(1) & ~known
    if code is SIGNED:
        codes = torch.where(padded.signbit(), codes | 0x80, codes)
    of_codes = again.repeat_interleave(CODE_BLOCK)[:numel]
    stored[:numel] = torch.where(of_codes, codes[:numel].to(torch.uint8), stored[:numel])
    if code is SIGNED:  # a negative zero is what a small negative number was rounded to
        stored[:numel] = torch.where((values == 0) & values.signbit(), 0x80, stored[:numel].long()).to(torch.uint8)
    place = stored[scales_at(numel) :].view(blocks, 2)
    place.copy_(torch.where(again[:, None], scales.view(torch.uint8).view(blocks, 2), place))
    return stored


def split(values: Tensor, bits: int, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A float32 in two pieces: the bfloat16 nearest to it, and the difference in units of its last place.

    Args:
        values: float32.
        bits: of the difference: 16, in int16, for all of it; 8, in uint8, for a float32 rounded to 24 bits.
        random: 16 random bits for each, to round to 24 bits by chance; None rounds to nearest.
    """
    whole = torch.where(values.isnan(), 0x7FC00000, _bits(values))
    if bits == 8:
        up = 0x7F + ((whole >> 8) & 1) if random is None else random >> 8
        whole = (whole + up) & 0xFFFFFF00
    high = _signed(((whole + 0x8000) & _WORD) >> 16, 16).to(torch.int16).view(torch.bfloat16)
    if bits == 8:
        return high, ((whole >> 8) & 0xFF).to(torch.uint8)
    return high, _signed(whole & 0xFFFF, 16).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 of the two pieces that :func:`split` made."""
    upper = (high.contiguous().view(torch.int16).long() & 0xFFFF) << 16
    lower = low.long() if low.dtype == torch.int16 else _signed(low.long(), 8) << 8
    joined = (upper + lower) & _WORD
    # Where somebody has written another bfloat16, the rest may lead across zero or to NaN.
    spoils = ((joined & 0x7FFFFFFF) > 0x7F800000) & ((upper & 0x7FFFFFFF) <= 0x7F800000)
    return _floats(torch.where(((joined ^ upper) >> 31 != 0) | spoils, upper, joined))
