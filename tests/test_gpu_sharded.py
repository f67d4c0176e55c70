"""Sharded steps on a device: two processes with a part of each parameter, on a CPU, or both on one GPU.

gloo carries the few numbers between the halves from GPU to GPU, so one is enough. Gradients are set: no collective of a
model is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import sharded_cases
import torch
from cases import GPU
from torch import nn

import fusedopt

pytestmark = sharded_cases.MARKS

SHAPES = [(5, 3), (1,), (4099,), (2, 2), (7,)]
STEPS, OVERFLOW = 4, 2


def values(step: int) -> list[torch.Tensor]:
    """Whole parameters (step 0) or gradients, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def parts(device: str, tensors: list[torch.Tensor]) -> list[Any]:
    """The last is plain; the others are dealt out along their first dimension, so one process has nothing of some."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(device, (2,))
    dealt_out = [distribute_tensor(each.to(device), mesh, [Shard(0)], src_data_rank=None) for each in tensors[:-1]]
    return [*dealt_out, tensors[-1].to(device)]


def train(params: list[Any], optimizer: Any, device: str, gradients: Any, poisoned: bool) -> dict[str, Any]:
    scaler = fusedopt.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
    outcome: dict[str, Any] = {"norms": [], "skipped": [], "scales": []}
    for step in range(1, STEPS + 1):
        scale = float(scaler.scale(torch.ones((), device=device)))
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad * scale
        if step == OVERFLOW and poisoned:
            local = params[2].grad
            getattr(local, "_local_tensor", local)[-1] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        outcome["norms"].append(float(optimizer.last_step.grad_norm))
        outcome["skipped"].append(bool(optimizer.last_step.found_inf))
        outcome["scales"].append(scaler.get_scale())
    whole = [getattr(param.detach(), "full_tensor", lambda each=param: each.detach())() for param in params]
    return {**outcome, "parameters": [each.cpu() for each in whole]}


def optimizer_of(params: list[Any], grouped: bool) -> Any:
    if not grouped:
        return fusedopt.FusedAdamW(params, lr=0.1, clip_grad=dict(max_norm=1.0))
    return fusedopt.ClipGroup([fusedopt.FusedAdamW(part, lr=0.1) for part in (params[:3], params[3:])], max_norm=1.0)


def shards(rank: int, device: str, grouped: bool) -> dict[str, Any]:
    params = [nn.Parameter(each) for each in parts(device, values(0))]
    optimizer = optimizer_of(params, grouped)
    return train(params, optimizer, device, lambda step: parts(device, values(step)), poisoned=rank == 1)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_step_as_one(device, tmp_path):
    if device == "cuda" and not GPU:
        pytest.skip("no GPU")
    scenarios: dict[str, Any] = {f"{grouped}": (shards, (device, grouped)) for grouped in (False, True)}
    outcomes = sharded_cases.run(scenarios, 2, tmp_path)
    params = [nn.Parameter(each) for each in values(0)]
    expected = train(params, optimizer_of(params, grouped=False), "cpu", values, poisoned=True)
    assert expected["skipped"] == [step == OVERFLOW for step in range(1, STEPS + 1)]
    for scenario in scenarios:
        for outcome in outcomes[scenario]:
            assert outcome["skipped"] == expected["skipped"]
            assert outcome["scales"] == expected["scales"] == [4.0, 2.0, 2.0, 2.0]
            torch.testing.assert_close(outcome["norms"], expected["norms"], rtol=1e-6, atol=0, equal_nan=True)
            torch.testing.assert_close(outcome["parameters"], expected["parameters"], rtol=1e-5, atol=1e-6)
