"""What the tests are parametrized over."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import ptx_code
import pytest
import torch
from optimizers import TESTED

from fusedopt import backends
from fusedopt.backends import NativeBackend, TritonBackend
from fusedopt.backends.native import compiled_module
from fusedopt.optimizers import FUSED_OPTIMIZERS
from fusedopt.rules import Rule

#: What PTX the tests run in the interpreter: FUSEDOPT_PTX is "nvcc", "triton" or not set. See docs/ptx.md.
PTX = os.environ.get("FUSEDOPT_PTX")
# One process either interprets Triton's kernels or compiles them; it reads this when it first makes one.
if not torch.cuda.is_available() and PTX != "triton":
    os.environ["TRITON_INTERPRET"] = "1"

module = compiled_module()[0]
ISAS = module.cpu_isas() if module else []
HAS_EMULATOR = hasattr(module, "emulator")


class EmulatedBackend(NativeBackend):
    """The CUDA kernels and all that drives them, run as host code on CPU tensors; see csrc/cuda/emulator."""

    name = "emulated"
    devices = 1

    def _make_plan(self) -> Any:
        kept = self._how_state_is_kept()
        return module.StepPlan(self.rule.name, "emulated", self.devices, shards=self.shards, **kept)


class EmulatedPair(EmulatedBackend):
    """The same on two devices, to which parameters are dealt in turns."""

    name = "emulated-pair"
    devices = 2


if HAS_EMULATOR:
    for emulated in (EmulatedBackend, EmulatedPair):
        backends.BACKENDS[emulated.name] = emulated

GPU = NativeBackend.unavailable(torch.device("cuda")) is None and torch.cuda.is_available()

#: Every way a step can run here: each instruction set of the native backend, its CUDA kernels emulated and on a GPU,
#: Triton's kernels interpreted or on a GPU, and the reference.
BACKENDS = [*(f"native-{isa}" for isa in ISAS), *(EmulatedBackend.name for _ in [0] if HAS_EMULATOR)]
BACKENDS += ["native-cuda"] if GPU else []
BACKENDS += ["triton"] if TritonBackend.unavailable(torch.device("cpu")) is None else []
BACKENDS += ["triton-cuda"] if TritonBackend.unavailable(torch.device("cuda")) is None else []
BACKENDS += ["reference"]


#: PTX that is run in the place of a GPU, if it is asked for: it takes minutes.
PTX_BACKENDS: list[str] = []
if PTX == "triton":
    from triton_ptx import TritonPtxBackend

    backends.BACKENDS[TritonPtxBackend.name] = TritonPtxBackend
    PTX_BACKENDS = [TritonPtxBackend.name]
elif PTX == "nvcc" and HAS_EMULATOR:
    PTX_BACKENDS = [f"nvcc-{arch}" for arch in ptx_code.WANTED if arch in ptx_code.known_architectures()]


def on_gpu(backend: str) -> bool:
    """Whether an entry of BACKENDS runs on a GPU."""
    return backend.endswith("-cuda")


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

OPTIONS = {name: option for tested in TESTED.values() for name, option in tested.options.items()}
#: Those that stand for all, one or two of each rule.
SHORT = [name for tested in TESTED.values() for name in tested.short]
OPTIMIZERS = list(FUSED_OPTIMIZERS.values())


def _ragged(chunk: int) -> list[tuple[int, ...]]:
    small = [(), (0,), (1,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (33,), (63,), (65,), (3, 5, 7)]
    return [*small, (511,), (512,), (513,), (chunk - 1,), (chunk,), (chunk + 1,), (2, chunk + 3)]


#: Edges of every loop: empty, 0-dim, vector widths, conversion block and chunk, each with its neighbours.
RAGGED = _ragged(16384)
SMALL = [(), (0,), (1,), (17,), (3, 5, 7), (513,)]


def shapes_for(backend: str) -> list[tuple[int, ...]]:
    """Shapes with every edge that a backend has. (Interpreted, a chunk takes milliseconds.)"""
    if backend == "triton" or backend in PTX_BACKENDS:
        return _ragged(2048)
    return SMALL if backend == "reference" else RAGGED


def lacks(backend: str, rule: Rule) -> str | None:
    """Why an entry of a list cannot run a rule, or None. (Triton's kernels are a file that a rule need not have.)"""
    return TritonBackend.unavailable_for(rule) if backend.startswith("triton") else None


def backend_name(backend: str) -> str:
    """The optimizer's ``backend`` argument for an entry of a list; selects the instruction set or PTX on the way."""
    if backend in PTX_BACKENDS:
        return use_ptx(backend) if PTX == "nvcc" else backend
    name, _, isa = backend.partition("-")
    if isa and isa != "cuda":
        assert module is not None
        module.use_cpu_isa(isa)
    return name


def use_ptx(backend: str) -> str:
    """Have the emulator run nvcc's PTX until the test ends; the name of its backend."""
    assert module is not None
    module.emulator.use_ptx(ptx_code.nvcc_modules(backend.removeprefix("nvcc-")))
    return EmulatedBackend.name


def on_cpu(tensor: torch.Tensor) -> np.ndarray:
    """The values in float64."""
    return tensor.detach().cpu().double().numpy()


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """The same values on any device; the default one may be a GPU, see conftest.py."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    values = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in values]


def set_gradients(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator("cpu").manual_seed(1000 + seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator, device="cpu") * scale
        param.grad = grad.to(param.device, param.dtype)


def global_norm(params: list[torch.nn.Parameter], norm_type: float = 2.0) -> float:
    """The norm of all gradients, added up in extended precision."""
    grads = [on_cpu(param.grad).flatten() for param in params if param.grad is not None]
    if not grads:
        return 0.0
    values = np.abs(np.concatenate(grads).astype(np.longdouble))
    return float(values.max() if norm_type == INF else np.sum(values**norm_type) ** (1 / np.longdouble(norm_type)))


def bits(tensors: Any) -> list[bytes]:
    """The exact contents of tensors, NaN included."""
    # (A tensor of one element may count as contiguous with any strides, but not be viewed as bytes.)
    plain = (tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors)
    return [tensor.view(-1).view(torch.uint8).numpy().tobytes() for tensor in plain]


def bits_but_for_nan(tensors: Any) -> list[bytes]:
    """The same, with one payload for every NaN."""
    return bits(torch.where(tensor.isnan(), torch.nan, tensor) for tensor in tensors)


def whole_state(optimizer: Any, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a parameter with its step count, which is not there for every rule."""
    counts = {} if optimizer._counts is None else optimizer._counts
    return {**({"step": counts[param][0]} if param in counts else {}), **optimizer.state.get(param, {})}


def state_bits(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], bytes]:
    """The exact contents of ``optimizer.state_dict()['state']``."""
    return {
        (key, name): bits([value])[0]
        for key, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


each_backend = pytest.mark.parametrize(
    "backend",
    [
        *(pytest.param(name, marks=pytest.mark.gpu) if on_gpu(name) else name for name in BACKENDS),
        *(pytest.param(name, marks=pytest.mark.ptx) for name in PTX_BACKENDS),
    ],
)
each_option = pytest.mark.parametrize("option", OPTIONS)
each_short_option = pytest.mark.parametrize("option", SHORT)
each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

INF = math.inf
