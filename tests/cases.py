"""What the tests are parametrized over."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt.backends.native import load_native_module

module = load_native_module()[0]
ISAS = module.cpu_isas() if module else []

#: Every way a step can run here: each instruction set of the native backend, and the reference.
BACKENDS = [*(f"native-{isa}" for isa in ISAS), "reference"]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

OPTIONS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (fusedopt.FusedSGD, {"lr": 0.1}),
    "sgd-decay": (fusedopt.FusedSGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd-momentum": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd-dampening": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    "sgd-nesterov": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-maximize": (fusedopt.FusedSGD, {"lr": 0.1, "momentum": 0.9, "maximize": True, "weight_decay": 0.1}),
    "adam": (fusedopt.FusedAdam, {"lr": 0.01}),
    "adam-decay": (fusedopt.FusedAdam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": (fusedopt.FusedAdam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adam-decoupled": (fusedopt.FusedAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-beta0": (fusedopt.FusedAdam, {"lr": 0.01, "betas": (0.0, 0.999), "eps": 1e-6}),
    "adamw": (fusedopt.FusedAdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw-amsgrad-maximize": (fusedopt.FusedAdamW, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    "adamw-tensor-lr": (fusedopt.FusedAdamW, {"lr": torch.tensor(0.01), "weight_decay": 0.1}),
    "adamw-tensor-betas": (fusedopt.FusedAdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99))}),
}

_CHUNK = 16384

#: Edges of every loop: empty, 0-dim, vector widths, conversion block and chunk, each with its neighbours.
RAGGED = [(), (0,), (1,), (7,), (8,), (9,), (15,), (16,), (17,), (31,), (33,), (63,), (65,), (3, 5, 7), (511,), (512,)]
RAGGED += [(513,), (_CHUNK - 1,), (_CHUNK,), (_CHUNK + 1,), (2, _CHUNK + 3)]
SMALL = [(), (0,), (1,), (17,), (3, 5, 7), (513,)]


def backend_name(backend: str) -> str:
    """The optimizer's ``backend`` argument for an entry of BACKENDS; selects the instruction set on the way."""
    name, _, isa = backend.partition("-")
    if isa:
        assert module is not None
        module.use_cpu_isa(isa)
    return name


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def global_norm(params: list[torch.nn.Parameter], norm_type: float = 2.0) -> float:
    """The norm of all gradients, added up in extended precision."""
    grads = [param.grad.detach().double().flatten() for param in params if param.grad is not None]
    if not grads:
        return 0.0
    values = np.abs(torch.cat(grads).numpy().astype(np.longdouble))
    return float(values.max() if norm_type == INF else np.sum(values**norm_type) ** (1 / np.longdouble(norm_type)))


def bits(tensors: Any) -> list[bytes]:
    """The exact contents of tensors, NaN included."""
    return [tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors]


def state_bits(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], bytes]:
    """The exact contents of ``optimizer.state_dict()['state']``."""
    return {
        (key, name): bits([value])[0]
        for key, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_option = pytest.mark.parametrize("option", OPTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

INF = math.inf
