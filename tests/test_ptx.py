"""The PTX that nvcc and Triton make of the kernels, run on the CPU: a selection. `make test-ptx` runs all.

The interpreter is in csrc/ptx, docs/ptx.md explains it. The negative controls change the PTX as a fault of a compiler
or a slip in the source would: each has to be noticed.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptx_code
import pytest
import torch
from cases import (
    HAS_EMULATOR,
    INF,
    OPTIONS,
    bits,
    each_dtype,
    global_norm,
    module,
    parameters,
    set_gradients,
    state_bits,
)

from fusedopt.backends.triton import _triton_problem

emulator: Any = getattr(module, "emulator", None)
ptx: Any = getattr(module, "ptx", None)

needs_interpreter = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")
#: Each loop and its neighbours, and rows of one and of several chunks.
SHAPES = [(), (0,), (7,), (33,), (3, 5, 7), (513,), (2048,), (2, 2051)]


def needs_nvcc(arch: str) -> None:
    if ptx_code.NVCC is None:
        pytest.skip("nvcc is not on PATH")
    if arch not in ptx_code.known_architectures():
        pytest.skip(f"this nvcc does not know sm_{arch}, or the kernels' sources are not here")


def steps(
    option: str, backend: str, dtype: torch.dtype = torch.float32, count: int = 2, **extra: Any
) -> tuple[Any, list[bytes], Any]:
    """An optimizer after steps without and with a scale in turns, the bits of its parameters and those of its state."""
    cls, settings = OPTIONS[option]
    params = parameters(SHAPES, dtype)
    optimizer = cls(params, **copy.deepcopy(settings), **extra, backend=backend)
    for step in range(count):
        scale = [1.0, 4.0][step % 2]
        set_gradients(params, step, scale)
        optimizer.step(grad_scale=None if scale == 1 else scale)
    return optimizer, bits(params), state_bits(optimizer)


@needs_interpreter
@pytest.mark.slow
class TestNvcc:
    @each_dtype
    @pytest.mark.parametrize("option", ["sgd-nesterov", "adam-amsgrad", "adamw"])
    @pytest.mark.parametrize("arch", ptx_code.WANTED)
    def test_steps_have_the_bits_of_the_cpu_kernels(self, arch: str, option: str, dtype: torch.dtype) -> None:
        needs_nvcc(arch)
        emulator.use_ptx(ptx_code.nvcc_modules(arch))
        assert steps(option, "emulated", dtype)[1:] == steps(option, "native", dtype)[1:]

    @pytest.mark.parametrize("order", [0, 1])
    @pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
    @pytest.mark.parametrize("arch", ptx_code.WANTED)
    def test_norms_are_those_of_the_emulation(self, arch: str, norm_type: float, order: int) -> None:
        """Same sources, same order of additions, whatever order blocks and warps run in."""
        needs_nvcc(arch)
        clip = {"clip_grad": {"max_norm": 0.5, "norm_type": norm_type}}
        host = steps("adamw", "emulated", **clip)
        emulator.configure(order=order)
        emulator.use_ptx(ptx_code.nvcc_modules(arch))
        found = steps("adamw", "emulated", **clip)
        params = [param for group in found[0].param_groups for param in group["params"]]
        assert float(found[0].last_step.grad_norm) == pytest.approx(global_norm(params, norm_type) / 4, rel=1e-6)
        if norm_type != 3.0:  # whose powers the C library and CUDA's round otherwise
            assert bits([found[0].last_step.grad_norm]) == bits([host[0].last_step.grad_norm])
            assert found[1:] == host[1:]

    @pytest.mark.parametrize("arch", ptx_code.WANTED)
    def test_an_overflow_skips_the_step(self, arch: str) -> None:
        needs_nvcc(arch)
        emulator.use_ptx(ptx_code.nvcc_modules(arch))
        optimizer, before, state = steps("adamw", "emulated")
        params = optimizer.param_groups[0]["params"]
        params[-1].grad[1, 2050] = INF
        optimizer.step(grad_scale=4.0)
        assert (bits(params), state_bits(optimizer)) == (before, state)
        assert optimizer.last_step.found_inf == 1


# --- Negative controls -----------------------------------------------------------------------------------------------


def without(pattern: str, count: int = 0) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, "", text, count=count)


def half_a_mask(text: str) -> str:
    """The member masks of the update's reductions name half of the lanes."""
    for mask in re.findall(r"redux\.sync\.or\.b32\s+%r\d+, %r\d+, (%r\d+);", text):
        text = re.sub(rf"(mov\.[ub]32\s+{mask}), -1;", r"\1, 65535;", text)
    return text


def contract(text: str) -> str:
    """Products and sums become one operation, as with --fmad=true."""
    products = dict(re.findall(r"mul\.rn\.f32\s+(%f\d+), (%f\d+, %f\d+);", text))
    fused = r"add\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);"

    def replace(found: re.Match[str]) -> str:
        to, a, b = found.groups()
        return f"fma.rn.f32 {to}, {products[b]}, {a};" if b in products else found[0]

    return re.sub(fused, replace, text)


def next_slot(text: str) -> str:
    """Constants of a rule are read from their neighbours' place."""
    return re.sub(
        r"(ld\.shared\.f32\s+%f\d+, \[\w+\+)(\d+)\]", lambda found: f"{found[1]}{int(found[2]) + 4}]", text, count=0
    )


#: (name, source, change, what is said; None when the bits tell)
CONTROLS: list[tuple[str, str, Callable[[str], str], str | None]] = [
    ("partials through the L1", "statistics", lambda text: text.replace("ld.global.cg", "ld.global"), "the L1 cache"),
    ("a relaxed ticket", "statistics", lambda text: text.replace("atom.acq_rel.gpu", "atom"), "has not released it"),
    ("no wait", "update", without(r"griddepcontrol\.wait;"), "before the kernel before is through"),
    ("no first barrier", "update", without(r"bar\.sync\s+0;", 1), "since the last barrier|was never written"),
    ("no barrier", "update", without(r"bar\.sync\s+0;"), "since the last barrier|was never written"),
    ("half a mask", "update", half_a_mask, "the member mask leaves out lanes"),
    ("contracted", "update", contract, None),
    ("the wrong slot", "update", next_slot, None),
]


RULES = ("adamw", "sgd-nesterov")


def every_kernel() -> None:
    for option in RULES:
        steps(option, "emulated")
        steps(option, "emulated", clip_grad={"max_norm": 1e9})


@needs_interpreter
@pytest.mark.slow
@pytest.mark.parametrize(("name", "source", "change", "message"), CONTROLS, ids=[control[0] for control in CONTROLS])
def test_a_planted_fault_is_noticed(name: str, source: str, change: Callable[[str], str], message: str | None) -> None:
    needs_nvcc("90")
    texts = {other: path.read_text() for other, path in ptx_code.compile_all("90").items()}
    changed = change(texts[source])
    assert changed != texts[source], "the fault could not be planted"
    texts[source] = changed
    emulator.use_ptx([ptx.Module(text, f"{other}-{name}.ptx") for other, text in texts.items()])
    if message is None:
        assert any(steps(option, "emulated")[1:] != steps(option, "native")[1:] for option in RULES)
    else:
        with pytest.raises(RuntimeError, match=message):
            every_kernel()


# --- Triton ----------------------------------------------------------------------------------------------------------


def in_a_process_of_its_own(*arguments: str) -> None:
    """Triton's compiler and its interpreter do not go together in one process."""
    environment = {**os.environ, "FUSEDOPT_PTX": "triton"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


needs_triton = pytest.mark.skipif(_triton_problem() is not None, reason=str(_triton_problem()))


@needs_interpreter
@needs_triton
@pytest.mark.slow
def test_triton_s_code_passes_the_tests_of_a_backend() -> None:
    options = " or ".join(f"follows_the_formula[{option}-" for option in ("sgd-nesterov", "adam-amsgrad", "adamw"))
    in_a_process_of_its_own(
        *("-m", "ptx", "-k", f"({options} or inside_the_step) and (float32 or bfloat16)", "tests/test_steps.py")
    )


@needs_interpreter
@needs_triton
@pytest.mark.slow
def test_triton_s_tunings_and_faults_planted_in_its_code() -> None:
    in_a_process_of_its_own("tests/triton_ptx_controls.py")
