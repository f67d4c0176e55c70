"""Triton's PTX: tunings, orders, and negative controls, for test_ptx.py: to be run with FUSEDOPT_PTX=triton."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from cases import PTX, bits, parameters, set_gradients
from triton_kept import CASES, Twin, compare, values
from triton_ptx import TritonPtxBackend, driver

import fusedopt
from fusedopt.backends.triton import _TUNINGS, Launcher, Tuning
from fusedopt.rules import RULES

assert PTX == "triton", "run by test_ptx.py, in a process of its own"
SHAPES = [(7,), (2, 2051)]


def steps(backend: str, **extra: object) -> list[bytes]:
    params = parameters(SHAPES)
    optimizer = fusedopt.FusedAdamW(params, weight_decay=0.1, backend=backend, **extra)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    return bits(params)


@pytest.fixture(autouse=True)
def _as_compiled() -> Iterator[None]:
    yield
    driver.plant(None)
    driver.order = 0


def contract(text: str) -> str:
    products = dict(re.findall(r"mul\.rn\.f32\s+(%r\d+), (%r\d+, %r\d+);", text))
    return re.sub(
        r"add\.rn\.f32\s+(%r\d+), (%r\d+), (%r\d+);",
        lambda found: f"fma.rn.f32 {found[1]}, {products[found[3]]}, {found[2]};" if found[3] in products else found[0],
        text,
    )


def half_a_mask(text: str) -> str:
    return re.sub(r"(shfl\.sync\.bfly\.b32\s+[^;]*), -1;", r"\1, 65535;", text)


@pytest.mark.parametrize("tuning", _TUNINGS, ids=lambda tuning: f"{tuning.block}/{tuning.warps}")
def test_as_compiled_with_every_tuning(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonPtxBackend, "tuning", tuning)
    assert steps(TritonPtxBackend.name) == steps("native")


@pytest.mark.parametrize("tuning", [_TUNINGS[0], _TUNINGS[1], _TUNINGS[-1]], ids=str)
@pytest.mark.parametrize("case", ["split8 by chance", "codes and roots, amsgrad", "float16 and roots by chance"])
def test_columns_in_few_bits_have_the_bits_of_the_cpu_kernels(case: str, tuning: Tuning) -> None:
    kept = CASES[case]
    launchers = (None, Launcher(RULES[kept.rule], "cpu", tuning))
    twins = [Twin(kept, values([(7,), (2048 + 333,)]), launcher) for launcher in launchers]
    for step in range(2):
        for twin in twins:
            twin.step(step)
        compare(twins)


@pytest.mark.parametrize("clip", [None, {"max_norm": 0.5}], ids=["bare", "norm"])
def test_any_order_of_programs_and_warps_gives_the_same_bits(clip: dict[str, float] | None) -> None:
    expected = steps(TritonPtxBackend.name, clip_grad=clip)
    for order in (1, 2):
        driver.order = order
        assert steps(TritonPtxBackend.name, clip_grad=clip) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: re.sub(r"bar\.sync\s+0;", "", text), "since the last barrier|was never written"),
        (half_a_mask, "the member mask leaves out lanes"),
    ],
    ids=["no barrier", "half a mask"],
)
def test_a_refusal(change: Callable[[str], str], message: str) -> None:
    driver.plant(change)
    with pytest.raises(RuntimeError, match=message):
        steps(TritonPtxBackend.name, clip_grad={"max_norm": 1e9})
    assert driver.planted


def test_other_bits() -> None:
    driver.plant(contract)
    assert steps(TritonPtxBackend.name) != steps("native")
    assert driver.planted
