"""The forms in which state is kept, from their formulas and in float64: what of it a step may store.

Nothing of fusedopt.rules.codes is used here. A form is a sorted table of all numbers that it has; codes are such a
table for each block, times its scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BLOCK = 64
WORD = 2**32 - 1


def _finite(bits: np.ndarray, dtype: Any) -> np.ndarray:
    values = bits.view(dtype)
    return np.unique(values[np.isfinite(values)].astype(np.float64))


def _code_values(mantissa: int, count: int) -> np.ndarray:
    codes = np.arange(count)
    return (1 + (codes % 2**mantissa) / 2**mantissa) * 2.0 ** (codes // 2**mantissa) - 1


#: All numbers of the floating-point forms, and what codes stand for in units of their scale.
TABLES = {
    torch.bfloat16: _finite(np.arange(2**16, dtype=np.uint32) << 16, np.float32),
    torch.float16: _finite(np.arange(2**16, dtype=np.uint16), np.float16),
}
SIGNED, UNSIGNED = _code_values(4, 128), _code_values(4, 256)
_BOTH_SIGNS = np.unique(np.concatenate([-SIGNED, SIGNED]))


def order_of(param: torch.Tensor) -> list[int]:
    """The dimensions of a parameter in canonical order."""
    return sorted(range(param.dim()), key=lambda d: (param.shape[d] == 1, -param.stride(d)))


def canonical(param: torch.Tensor, values: np.ndarray) -> np.ndarray:
    """Values of the parameter's shape as one run."""
    return values.transpose(order_of(param)).reshape(-1)


def codes_and_scales(stored: torch.Tensor, numel: int) -> tuple[np.ndarray, np.ndarray]:
    raw = stored.cpu().numpy()
    at = (numel + 15) // 16 * 16
    blocks = (numel + BLOCK - 1) // BLOCK
    assert raw.size == at + 2 * blocks
    assert not raw[numel:at].any()
    scales = (raw[at:].copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw[:numel], np.repeat(scales, BLOCK)[:numel]


def decoded(key: str, stored: torch.Tensor, param: torch.Tensor) -> np.ndarray:
    """What a state of a parameter stands for, of the parameter's shape; of a root, its square."""
    if not key.endswith("_codes"):
        values = stored.detach().cpu().double().numpy().copy()
        return values**2 if key.endswith("_root") else values
    codes, scales = codes_and_scales(stored, param.numel())
    signed = np.where(codes & 0x80, -1.0, 1.0) * SIGNED[codes & 0x7F]
    flat = (UNSIGNED[codes] if "_sq" in key else signed) * scales
    order = order_of(param)
    inverse = np.argsort(order) if order else []
    return flat.reshape([param.shape[d] for d in order]).transpose(inverse)


def _within(table: np.ndarray, found: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Whether each is between the neighbour below ``low`` and the one above ``high``."""
    below = table[np.clip(np.searchsorted(table, low, "right") - 1, 0, table.size - 1)]
    above = table[np.clip(np.searchsorted(table, high, "left"), 0, table.size - 1)]
    return (found >= below) & (found <= above)


def assert_neighbours(
    key: str, stored: torch.Tensor, param: torch.Tensor, exact: np.ndarray, error: np.ndarray, nearest: bool
) -> None:
    """Assert that each element is one of the two numbers of its form that are next to the exact one.

    Args:
        key: of the state, or 'param'.
        stored: what is there.
        param: the parameter.
        exact: the result in float64.
        error: what the arithmetic may have added to it, before it was rounded.
        nearest: whether it has to be the nearer of the two.
    """
    exact, error = canonical(param, exact), canonical(param, error)
    root, codes_of_squares = key.endswith("_root"), "_sq" in key and key.endswith("_codes")
    low, high = exact - error, exact + error
    if root:
        low, high = np.sqrt(np.maximum(low, 0)), np.sqrt(high)
        low, high = low * (1 - 2**-22), high * (1 + 2**-22)
    if key.endswith("_codes"):
        codes, scales = codes_and_scales(stored, param.numel())
        table = UNSIGNED if codes_of_squares else _BOTH_SIGNS
        found = UNSIGNED[codes] if codes_of_squares else np.where(codes & 0x80, -1.0, 1.0) * SIGNED[codes & 0x7F]
        blocks = np.repeat(np.maximum.reduceat(np.maximum(abs(low), abs(high)), np.arange(0, low.size, BLOCK)), BLOCK)
        most = blocks[: low.size] / table[-1]
        assert (scales <= most * (1 + 2**-6)).all(), key
        assert (scales >= most * (1 - 1e-3) - 1e-37).all(), key
        unit = np.where(scales == 0, 1, scales)
        low, high = low / unit * np.where(low > 0, 1 - 2**-20, 1 + 2**-20), high / unit
        high = high * np.where(high > 0, 1 + 2**-20, 1 - 2**-20)
        low, high = np.where(scales == 0, 0, low - 2**-22), np.where(scales == 0, 0, high + 2**-22)
    else:
        table = TABLES[stored.dtype]
        found = canonical(param, stored.detach().cpu().double().numpy())
    ok = _within(table, found, low, high)
    if nearest and not codes_of_squares and ok.all():
        middle = (low + high) / 2
        at = np.clip(np.searchsorted(table, middle), 1, table.size - 1)
        distance = np.minimum(abs(table[at] - middle), abs(table[at - 1] - middle))
        # A root that is not zero is not stored as zero, and rounding happens to 1 + x / scale: slack of a float32.
        slack = (high - low) + 2**-16 * (1 if key.endswith("_codes") else abs(table[at] - table[at - 1]))
        ok = (abs(found - middle) <= distance + slack) | (root & (found == table[table > 0][0]))
    if not ok.all():
        worst = int(np.argmin(ok))
        raise AssertionError(
            f"{key}: {np.count_nonzero(~ok)} of {ok.size} elements are no neighbours of the exact result; number "
            f"{worst} is {found[worst]!r}, expected next to [{low[worst]!r}, {high[worst]!r}]"
        )


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 in Python's integers, from the paper."""
    c, (k0, k1) = list(counter), key
    for _ in range(rounds):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(second >> 32) ^ c[1] ^ k0, second & WORD, (first >> 32) ^ c[3] ^ k1, first & WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def random_half(seed: int, stream: int, column: int, step: int, number: int) -> int:
    """16 random bits of one element."""
    counter = [(number >> 3) & WORD, number >> 35, step & WORD, (stream * 8 + column) & WORD]
    word = philox(counter, [seed & WORD, seed >> 32], 7)[number % 8 // 2]
    return word >> 16 if number % 2 else word & 0xFFFF
