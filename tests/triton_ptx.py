"""Triton's kernels compiled for a GPU, and their PTX run by the interpreter in csrc/ptx on CPU tensors.

A stand-in for Triton's driver: everything up to the launch is Triton's own. Not to be mixed with Triton's interpreter
in one process; FUSEDOPT_PTX=triton chooses this one for the tests, see cases.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from fusedopt.backends import TritonBackend
from fusedopt.backends.native import compiled_module
from fusedopt.backends.triton import _TUNINGS, Launcher, Tuning, _make_plan

TARGET = GPUTarget("cuda", 90, 32)
#: How an argument is packed, by its type in a kernel's signature.
FORMATS = {"i32": "<i", "i64": "<q", "fp64": "<d"}
#: Addresses of scratch memory, which Triton hands to every kernel and ours do not use.
SCRATCH = [bytes(8), bytes(8)]


class PtxDriver:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.utils = self
        self.change: Callable[[str], str] | None = None
        self.planted = False
        self.order = 0  # of programs and warps: 0 as numbered, else drawn from this seed

    def plant(self, change: Callable[[str], str] | None) -> None:
        """Apply a change to the PTX of kernels from now on; ``planted`` tells whether it has changed any."""
        self.change, self.planted = change, False

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 17, "multiprocessor_count": 132}

    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        return (1, 1, 32, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A function that launches one compiled kernel."""
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        assert path is not None
        text = Path(path).read_text()
        kinds = list(source.signature.values())
        codes: dict[Any, Any] = {}

        def code() -> Any:
            if self.change not in codes:
                changed = self.change(text) if self.change else text
                native, _ = compiled_module()
                codes[self.change] = native.ptx.Module(changed, Path(path).name), changed != text
            found, is_changed = codes[self.change]
            self.planted |= is_changed
            return found

        def run(*given: Any) -> None:
            grid, arguments = given[0], given[-len(kinds) :]
            packed = [
                struct.pack(FORMATS[kind], value)
                for kind, value in zip(kinds, arguments, strict=True)
                if kind != "constexpr"
            ]
            launch = {"blocks": grid, "warps": metadata.num_warps, "shared": metadata.shared, "order": self.order}
            code().run(metadata.name, packed + SCRATCH, **launch)

        return run


driver = PtxDriver()
triton.runtime.driver.set_active(driver)


class TritonPtxBackend(TritonBackend):
    """Takes CPU tensors to Triton's PTX."""

    name = "triton-ptx"
    tuning: Tuning = _TUNINGS[0]

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "the interpreter works on CPU tensors"

    def _make_plan(self) -> Any:
        return _make_plan(Launcher(self.rule, "cpu", self.tuning), self.shards)
