"""Who takes part in benchmarks/sharded.py: optimizers of DTensors, optimizers that share their work, and two halves.

Every process makes its own; they need a process group.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fusedopt
from fusedopt.bench.contenders import Contender, Foreach, Fused, TorchFused, initial_tensors
from fusedopt.rules import clip_coefficient

from .averaging import model_of
from .peers import DeepSpeed

__all__ = [
    "CollectiveClock",
    "DeepSpeedOffloaded",
    "ForeachOffloaded",
    "FormerZero",
    "Fused",
    "FusedOffloaded",
    "FusedOnShards",
    "Halves",
    "TorchFusedOffloaded",
    "TorchFusedOnShards",
    "WithoutExchange",
    "Zero",
    "deal",
]


@functools.cache
def mesh() -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def deal(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients as FSDP2 leaves them after a backward pass: dealt out along their first dimension."""
    shard = functools.partial(distribute_tensor, device_mesh=mesh(), placements=[Shard(0)], src_data_rank=None)
    return {name: shard(gradient) for name, gradient in gradients.items()}


class OnShards(Contender):
    """The parameters of a model under ``fully_shard``."""

    policy: ClassVar[OffloadPolicy] = OffloadPolicy()

    def make_params(self) -> dict[str, nn.Parameter]:
        self.model = model_of(self.case.shapes)
        with torch.no_grad():
            for name, value, _ in initial_tensors(self.case):
                self.model.get_parameter(name).copy_(value)
        fully_shard(self.model, mesh=mesh(), offload_policy=self.policy)
        return {name: self.model.get_parameter(name) for name in self.case.shapes}

    def set_gradients(self, factor: float = 1.0) -> None:
        for param, grad in zip(self.params.values(), self._grads, strict=True):
            param.grad = grad
        ours, originals = ([grad.to_local() for grad in grads] for grads in (self._grads, self._originals))
        torch._foreach_copy_(ours, originals)  # which DTensors do not have
        torch._foreach_mul_(ours, factor)

    def whole(self, name: str) -> Tensor:
        param = super().whole(name)
        assert isinstance(param, DTensor)
        return param.full_tensor()


class FusedOnShards(OnShards, Fused):
    """Ours."""


class TorchFusedOnShards(OnShards, TorchFused):
    """torch's fused kernels."""


class Offloaded(OnShards):
    """As :class:`OnShards`, with the parameters kept on the CPU. Without a GPU there is no memory to pin."""

    policy = CPUOffloadPolicy(pin_memory=False)


class FusedOffloaded(Offloaded, Fused):
    """Ours."""


class TorchFusedOffloaded(Offloaded, TorchFused):
    """torch's fused kernels."""


class ForeachOffloaded(Offloaded, Foreach):
    """torch's multi-tensor operations, which are its default."""


class DeepSpeedOffloaded(Offloaded, DeepSpeed):
    """DeepSpeed's kernel takes addresses, so it gets the local parts; torch clips the DTensors that they belong to."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return super().build([{**group, "params": list(map(self._local, group["params"]))} for group in groups])

    @staticmethod
    def _local(param: Any) -> nn.Parameter:
        local = nn.Parameter(param.detach().to_local())
        local.grad = param.grad.to_local()
        return local


class Zero(Fused):
    """Ours: one statistics pass over the share, one collective, the update, the exchange."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return fusedopt.ZeroRedundancyOptimizer(groups, "FusedAdamW", clip_grad=self.clip_grad)


class FormerZero(Fused):
    """What fusedopt.ZeroRedundancyOptimizer did before steps had two halves.

    The scaler unscaled all gradients in every process and read its flag on the host, the norm was found in float64 by
    torch, and the fused step of the share multiplied by the coefficient.
    """

    writes_gradients = True

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes seconds to import

        assert self.max_norm is not None
        max_norm = self.max_norm

        class Former(ZeroRedundancyOptimizer):
            def step(self, closure: Any = None, **settings: Any) -> Any:
                params = [param for group in self.optim.param_groups for param in group["params"]]
                norms = [torch.linalg.vector_norm(param.grad.double()) for param in params if param.grad.numel()]
                share = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.double)
                shares = [torch.empty_like(share) for _ in range(self.world_size)]
                dist.all_gather(shares, share, group=self.process_group)
                coefficient = clip_coefficient(torch.linalg.vector_norm(torch.stack(shares)), max_norm)
                settings.update(grad_scale=coefficient.reciprocal(), found_inf=torch.zeros(()))
                return super().step(closure, **settings)

        optimizer = Former(groups, fusedopt.FusedAdamW)
        # The optimizer of a share knows that by now, and would ask the others.
        optimizer.optim._shared.share_of = None
        optimizer.optim._backend = None
        return optimizer

    def make_scaler(self) -> torch.amp.GradScaler:  # type: ignore[override]
        return Contender.make_scaler(self)


class WithoutExchange:
    """Steps of a contender of ZeRO's, without the exchange of the parameters that follows on each."""

    def __init__(self, contender: Contender):
        self._contender = contender

    def __call__(self) -> None:
        optimizer = self._contender.optimizer
        optimizer._sync_params = lambda: None  # type: ignore[attr-defined]
        try:
            self._contender()
        finally:
            del optimizer._sync_params  # type: ignore[attr-defined]


class Halves(Fused):
    """The same step through its two halves, by a ClipGroup of one optimizer."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        assert self.max_norm is not None
        group = fusedopt.ClipGroup([fusedopt.FusedAdamW(groups)], max_norm=self.max_norm)
        return group  # type: ignore[return-value]


class CollectiveClock:
    """Seconds that a step spends in the collectives by which it adds up over processes, noted for each call.

    Attributes:
        seconds: of each call that there was.
    """

    def __init__(self, step: Callable[[], object]):
        self._step = step
        self.seconds: list[float] = []

    def __call__(self) -> None:
        spent = 0.0
        all_reduce = dist.all_reduce

        def timed(*arguments: Any, **settings: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = all_reduce(*arguments, **settings)
            spent += time.perf_counter() - start
            return result

        dist.all_reduce = timed
        try:
            self._step()
        finally:
            dist.all_reduce = all_reduce
        self.seconds.append(spent)
