"""Launches steps through Triton's compiler and a driver that runs nothing: ``triton_dry.py cuda 90 32 [rounds]``.

So all of a launch but the GPU is at work: signatures, options, the cache of compiled kernels. Prints one line of JSON
for each case: the kernels launched by each of three steps, how often each was loaded, and with ``rounds`` the median
time of a step on the host in microseconds. Not to be mixed with the interpreter in one process.
"""

from __future__ import annotations

import collections
import json
import statistics
import sys
import time
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import fusedopt
from fusedopt import backends
from fusedopt.backends import TritonBackend
from fusedopt.backends.triton import _TUNINGS, Launcher, _make_plan

launched: list[str] = []
loaded: collections.Counter[str] = collections.Counter()


class DryDriver:
    """What Triton asks of a driver."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 16}

    def load_binary(self, *binary: Any) -> tuple[int, ...]:
        return (1, 1, 32, 0, 1024)  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        loaded[metadata.name] += 1
        return lambda *arguments: launched.append(metadata.name)


class DryBackend(TritonBackend):
    name = "dry"

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None

    def _make_plan(self) -> Any:
        return _make_plan(Launcher(self.rule, "cpu", _TUNINGS[0]))


def main(backend: str, arch: str, warp_size: str, rounds: str = "0") -> None:
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp_size))
    triton.runtime.driver.set_active(DryDriver(target))
    backends.BACKENDS[DryBackend.name] = DryBackend
    for clip, many in ((False, False), (False, True), (True, False), (True, True)):
        loaded.clear()
        params = [torch.nn.Parameter(torch.zeros(64)) for _ in range(400)]
        groups: Any = [{"params": [param], "lr": 0.1 + i % 5} for i, param in enumerate(params)] if many else params
        optimizer = fusedopt.FusedAdamW(groups, clip_grad={"max_norm": 1.0} if clip else None, backend="dry")

        scale = torch.ones(()) if clip else None
        steps = []
        for count in (1, 16, 400):  # so many gradients
            for param in params[:count]:
                param.grad = torch.zeros(64)
            launched.clear()
            optimizer.step(grad_scale=scale)
            steps.append(list(launched))
        case = {"clip": clip, "groups": len(optimizer.param_groups), "steps": steps, "loaded": dict(loaded)}
        times = []
        for _ in range(int(rounds)):
            begin = time.perf_counter()
            optimizer.step(grad_scale=scale)
            times.append(time.perf_counter() - begin)
        if times:
            case["host_us"] = round(1e6 * statistics.median(times), 1)
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
