"""Compiles every Triton kernel for a target, without a GPU: ``python triton_compile.py cuda 90 32 [--quick]``.

Prints one line of JSON for each: its name and variant, registers, spilled bytes, how many accesses of global memory are
16 bytes wide, and how many operations are fused or approximate. ``--quick`` leaves variants out that differ little from
others. Not to be mixed with the interpreter in one process.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_columns import ABSENT, BF16, F32, dtypes_of_columns

from fusedopt.backends import triton_kernels as kernels
from fusedopt.backends.triton import _COLUMNS, _TUNINGS
from fusedopt.backends.triton_kernels.rules import has_kernels, kernels_of
from fusedopt.backends.triton_scratch import rounds
from fusedopt.rules import RULES

#: How PTX ends the name of an access of 16 bytes.
WHOLE_VECTOR = r"\.(?:v4\.\w32|v2\.\w64)\b"
TYPES = {"tl.int64": "i64", "tl.int32": "i32", "tl.float64": "fp64"}


def variants() -> Iterator[tuple[Any, dict[str, Any], int, str]]:
    """(kernel, constants, warps, name) of what is worth compiling: each path, dtype and tuning, not every product."""
    yield kernels.map_kernel, {"BLOCK": 128}, 4, "map"
    for kind, slow in itertools.product(range(5), (False, True)):
        yield kernels.statistics_kernel, {"KIND": kind, "SLOW_DOUBLE": slow}, 4, f"statistics-{kind}-{slow}"
    for kind, several in itertools.product(range(5), (False, True)):
        yield kernels.total_kernel, {"KIND": kind, "SEVERAL": several}, 4, f"total-{kind}-{several}"
    names = [name for name in RULES if has_kernels(name)]
    for name, kind, flag in itertools.product(names, range(5), (False, True)):
        constants = {
            "CONSTANTS": kernels_of(name).constants,
            "KIND": kind,
            "CHECK": flag,
            "HAS_FOUND_INF": not flag,
            "REFUSE_NONFINITE": flag and kind != 0,
            "REPORT_DOUBLE": flag,
            "AVERAGE": flag,
            "BLOCK": 128,
        }
        yield kernels.prepare_kernel, constants, 4, f"prepare-{name}-{kind}-{flag}"
    for name, mix in ((rule, mix) for rule in names for mix in dtypes_of_columns(RULES[rule])):
        for tuning in _TUNINGS if set(mix) - {ABSENT} == {F32} and mix[2] != ABSENT else _TUNINGS[:1]:
            constants = {
                "UPDATE": kernels_of(name).update,
                **dict(zip(_COLUMNS, mix, strict=False)),
                "CHANCE": rounds(mix),
                "REVERSE": mix[2] != ABSENT,
                "WRITE_BACK": mix[2] == ABSENT or mix[1] == BF16,
                "BLOCK": tuning.block,
                "RAGGED": 64 * tuning.warps,
            }
            yield kernels.update_kernel, constants, tuning.warps, f"update-{name}-{mix}-{tuning.block}/{tuning.warps}"


def compiled(target: GPUTarget, kernel: Any, constants: dict[str, Any], warps: int) -> dict[str, Any]:
    """What the compiler says of one variant."""
    signature = {
        name: "constexpr" if name in constants else TYPES[parameter.annotation]
        for name, parameter in inspect.signature(kernel.fn).parameters.items()
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    result = triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})
    if target.backend == "hip":
        text = result.asm["amdgcn"]
        found = {name: int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        scratch = int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1])
        # What may be fused or approximate is marked so. Fused operations that are written out are those of exact square
        # roots, in some versions, and of the device library.
        code = result.asm["llir"]
        return {
            "registers": found["vgpr_count"],
            "spilled": found["vgpr_spill_count"] + scratch,
            "vector_loads": len(re.findall(r"\bglobal_load_dwordx4\b", text)),
            "vector_stores": len(re.findall(r"\bglobal_store_dwordx4\b", text)),
            "fused": len(re.findall(r"@llvm\.fmuladd|\bcontract\b", code)),
            "approximate": len(re.findall(r"call .*@llvm\.amdgcn\.rcp|\b(?:afn|arcp|fast)\b|!fpmath", code)),
        }
    ptx = result.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(result.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "spilled": stack + local,
        "vector_loads": len(re.findall(r"ld\.global\S*" + WHOLE_VECTOR, ptx)),
        "vector_stores": len(re.findall(r"st\.global\S*" + WHOLE_VECTOR, ptx)),
        "half_loads": len(re.findall(r"ld\.global\S*\.v2\.\w32\b", ptx)),
        "fused": len(re.findall(r"\bfma\.", ptx)),
        "approximate": len(re.findall(r"\b(?:sqrt\.approx|div\.full|div\.approx)", ptx)),
    }


def is_quick(name: str) -> bool:
    """Whether a variant is one of the few that say most."""
    return name.endswith((f"-{_TUNINGS[0].block}/{_TUNINGS[0].warps}", "map", "-2-True", "-4-True", "total-2"))


def main(backend: str, arch: str, warp_size: str, selection: str = "") -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    for kernel, constants, warps, name in variants():
        if selection == "--quick" and not is_quick(name):
            continue
        numbers = {key: value for key, value in constants.items() if isinstance(value, int)}
        found = compiled(target, kernel, constants, warps)
        print(json.dumps({"name": name, "warps": warps, "constants": numbers, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
