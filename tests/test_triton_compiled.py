"""What Triton's compiler makes of the kernels, without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import (
    _watch,  # noqa: F401  for every test here
    memory,
    without_interpreter,
)

from fusedopt.backends import TritonBackend

pytestmark = pytest.mark.skipif(
    TritonBackend.unavailable(torch.device("cpu")) is not None,
    reason=f"{TritonBackend.unavailable(torch.device('cpu'))}",
)

COMPILE = Path(__file__).parent / "triton_compile.py"
#: Targets, and whether all variants are compiled for them.
TARGETS = {("cuda", "80", "32"): False, ("cuda", "90", "32"): True, ("hip", "gfx942", "64"): False}
#: One address that the compiler keeps aside.
MOST_SPILLED = 16
#: Its exponential and logarithm are the device library's, with fused operations in them.
P_NORM = memory.P.value
SIZES = {-1: 0, 0: 4, 1: 8, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1, 7: 2, 8: 1}
COLUMNS = ("PARAM", "GRAD", "A", "B", "C", "MASTER", "AVERAGE")


@functools.cache
def compiled(target: tuple[str, str, str]) -> list[dict[str, Any]]:
    if importlib.util.find_spec(f"triton.backends.{'amd' if target[0] == 'hip' else 'nvidia'}") is None:
        pytest.skip(f"this Triton does not compile for {target[0]}")
    chosen = [] if TARGETS[target] else ["--quick"]
    return [json.loads(line) for line in without_interpreter(COMPILE, *target, *chosen).stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids="-".join)
class TestCompiled:
    def test_every_kernel_compiles_and_keeps_what_it_works_on_in_registers(self, target: tuple[str, str, str]) -> None:
        found = compiled(target)
        names = {result["name"].partition("-")[0] for result in found}
        assert names == {"map", "statistics", "total", "prepare", "update"}
        assert [result for result in found if result["spilled"] > MOST_SPILLED] == []

    def test_products_and_sums_are_not_contracted_and_nothing_is_approximate(
        self, target: tuple[str, str, str]
    ) -> None:
        found = [result for result in compiled(target) if result["constants"].get("KIND") != P_NORM]
        assert [result for result in found if result["fused"] or result["approximate"]] == []

    def test_streams_move_in_16_bytes(self, target: tuple[str, str, str]) -> None:
        """All that a thread has of a block, in as few accesses as there can be."""
        for result in compiled(target):
            constants = result["constants"]
            if result["name"].startswith("update"):
                threads = int(target[2]) * result["warps"]
                columns = [SIZES[constants[name]] * constants["BLOCK"] // threads // 16 for name in COLUMNS]
                assert result["vector_loads"] == sum(columns), result["name"]
                kept = 0 if constants["WRITE_BACK"] else columns[1]
                assert result["vector_stores"] == sum(columns) - kept, result["name"]
                if target[0] == "cuda" and constants["BLOCK"] == 8 * threads:
                    bytewise = sum(SIZES[constants[name]] == 1 for name in COLUMNS)
                    assert result["half_loads"] == bytewise, result["name"]
            elif result["name"].startswith("statistics"):
                assert result["vector_loads"] > 0, result["name"]
