"""Triton's kernels on columns in few bits: the bits are those of the CPU kernels, in every form and layout.

A plan is driven as backends drive it, so that each form can be put beside any other.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_cases import (
    CPU,
    RULES,
    Watched,
    _watch,  # noqa: F401  for every test here
    settings_of,
    tl,
    triton,
)
from triton_kept import CASES, Kept, Twin, compare, values

from fusedopt.backends import TritonBackend
from fusedopt.backends.triton import ABSENT

pytestmark = pytest.mark.skipif(TritonBackend.unavailable(CPU) is not None, reason=f"{TritonBackend.unavailable(CPU)}")

chance: Any = importlib.import_module("fusedopt.backends.triton_kernels.chance")
#: Less than a vector, whole blocks of codes, and more than a chunk.
SIZES = [(1,), (64,), (107,), (2048 + 333,)]
#: What others have between them.
SLOW = {"bfloat16", "codes and roots, amsgrad", "float32 master of float16", "float64, bfloat16", "average"}
SLOW |= {"float64, float16 and roots", "average of float16", "codes, amsgrad", "sgd without momentum", "sgd, float16"}


def pair(kept: Kept, shapes: Sequence[tuple[int, ...]], numbers: Sequence[Any] = ()) -> list[Twin]:
    """The CPU kernels' and Triton's."""
    launcher = Watched(RULES[kept.rule], "cpu")
    return [Twin(kept, values(shapes), of, numbers) for of in (None, launcher)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_the_bits_are_those_of_the_cpu_kernels(case: str) -> None:
    """And a step that is skipped leaves all as it is."""
    twins = pair(CASES[case], SIZES)
    for step in range(2):
        for twin in twins:
            twin.step(step)
        compare(twins)
    before = twins[1].contents()
    for twin in twins:
        twin.step(5, bad=True)
    assert twins[1].contents() == before
    for twin in twins:
        twin.step(6, clip_value=0.5)
    compare(twins)


def strided(tensor: Tensor) -> Tensor:
    """The same values with a gap after each."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


@pytest.mark.parametrize("case", ["codes by chance", "split8 by chance", "float16 and roots by chance"])
def test_any_layout_and_alignment_gives_the_same_bits(case: str) -> None:
    """Numbers are those of the parameter's canonical order, wherever its columns' elements lie."""
    kept = CASES[case]
    shapes = [(3, 50), (5, 9, 4), (2052,)]

    def change(tensor: Tensor, how: int) -> Tensor:
        if tensor.dim() > 1 and how == 0:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if how == 1:
            return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].view(tensor.shape)  # misaligned
        return strided(tensor) if how == 2 else tensor

    def place(first: int, grad: Tensor) -> Tensor:
        return change(grad, (first + grad.dim()) % 4)

    for first in range(2):
        twins = pair(kept, shapes)
        for twin in twins:
            for i, param in enumerate(twin.params):
                mine = twin.state[param]
                for n, key in enumerate(mine):
                    if mine[key].dim() and not key.endswith("_codes"):
                        mine[key] = change(mine[key], (first + i + n) % 4)
            for step in range(2):
                twin.step(step, place=functools.partial(place, first))
        compare(twins)


def test_elements_of_a_part_have_their_numbers_in_the_whole() -> None:
    """Consecutive ones from a multiple of 8 and from another number, a column of a matrix, and beyond 32 bits."""
    kept = CASES["codes by chance"]
    numbers = [(16384, [], []), (13, [], []), (3, [32, 64], [200, 1]), ((1 << 40) + 8, [2048], [1]), None]
    shapes = [(2048,)] * len(numbers)
    twins = pair(kept, shapes, numbers)
    whole = Twin(kept, values(shapes))
    for twin in (*twins, whole):
        twin.step(0)
    compare(twins)
    found, other = (twin.contents() for twin in (whole, twins[1]))
    assert [found[f"{i} exp_avg_codes"] == other[f"{i} exp_avg_codes"] for i in range(5)] == [False] * 4 + [True]


@pytest.mark.parametrize("case", ["codes", "float16 and roots", "split8 by chance"])
def test_numbers_that_are_not_finite_and_the_smallest_give_the_same_bits(case: str) -> None:
    """NaN is looked for, not compared: which one it is, is the processor's."""
    twins = pair(CASES[case], [(300,)])
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-38, 3e-30, 1e19, -3e38, 1e-20])
    for step in range(3):
        for twin in twins:
            grad = torch.zeros(300)
            grad[: len(odd)] = odd
            grad[100:108] = torch.tensor([1e-12, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e9])
            if step == 1:
                grad[200], grad[299] = math.nan, -math.inf
            twin.params[0].grad = grad.to(twin.params[0].dtype)
            twin.launch()
            for tensor in (twin.params[0].data, *twin.state[twin.params[0]].values()):
                if tensor.is_floating_point():
                    tensor.nan_to_num_(7.0, 8.0, 9.0)
        compare(twins)


def test_a_parameter_that_somebody_has_changed_counts_more_than_its_master() -> None:
    twins = pair(CASES["float32 master"], [(300,)])
    for step in range(2):
        for twin in twins:
            twin.step(step)
            with torch.no_grad():
                twin.params[0][5:290:3] += 0.25
                twin.step(step + 2)
        compare(twins)


def test_columns_that_are_kept_as_they_are_leave_the_kernel_as_it_is() -> None:
    """Whatever is asked for, where there is nothing to round."""
    twin = pair(Kept(seed=1), [(64,)])[1]
    twin.step(0)
    assert [[launch[name] for name in ("MASTER", "AVERAGE", "CHANCE")] for launch in settings_of("update")] == [
        [ABSENT, ABSENT, False]
    ]


@triton.jit
def philox_kernel(out: Any, word: Any) -> None:
    given = (tl.full((1,), 0, tl.int64) + word).to(tl.uint32)
    c0, c1, c2, c3 = chance.philox(given, given, given, given, given, given)
    lane = tl.arange(0, 1)
    tl.store(out + lane, c0)
    tl.store(out + 1 + lane, c1)
    tl.store(out + 2 + lane, c2)
    tl.store(out + 3 + lane, c3)


def test_random_bits_are_those_of_a_known_generator() -> None:
    """Answers of its authors."""
    known = {0: "5f6fb709 0d893f64 4f121f81 4f730a48", 2**32 - 1: "5207ddc2 45165e59 4d8ee751 8c52f662"}
    for word, answer in known.items():
        out = torch.zeros(4, dtype=torch.int64)
        with np.errstate(all="ignore"):
            philox_kernel[(1,)](out, word)
        assert [f"{x:08x}" for x in out.tolist()] == answer.split()
