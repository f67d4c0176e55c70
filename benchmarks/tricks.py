"""What experienced users do by hand with torch's fused optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedopt.bench.cases import OPTIMIZERS, RECIPES, Case
from fusedopt.bench.contenders import CONTENDERS, TorchFused

__all__ = ["GradScaleTrick", "Graphed", "Merged"]


class Merged(TorchFused):
    """Groups with equal settings made one, by hand, as users with a group per parameter learned to do."""

    description = "torch, fused=True, groups of equal settings merged"

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        return "there is one group" if case.grouping == "one" else super().unavailable(case)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        merged: dict[str, dict[str, Any]] = {}
        for group in groups:
            settings = repr({key: value for key, value in group.items() if key != "params"})
            merged.setdefault(settings, {**group, "params": []})["params"] += group["params"]
        return super().build(list(merged.values()))


class GradScaleTrick(TorchFused):
    """Unscaling and clipping folded into ``optimizer.grad_scale``, a divisor that torch's fused kernels apply."""

    description = "torch, fused=True, scale and clip coefficient handed over as optimizer.grad_scale"

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        if not RECIPES[case.recipe].clip:
            return "without clipping it is torch-fused"
        return super().unavailable(case)

    def step(self) -> None:
        self.cast_gradients()
        scale = self.scaler._scale if self.recipe.amp else torch.ones((), device=self.case.device)
        assert scale is not None
        assert self.max_norm is not None
        grads = [param.grad for param in self.params.values() if param.grad is not None]
        norm = nn.utils.get_total_norm(grads).float() / scale
        optimizer: Any = self.optimizer
        optimizer.grad_scale = scale / (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        if self.recipe.amp:
            record = self.scaler._per_optimizer_states[id(optimizer)]
            record["found_inf_per_device"] = {norm.device: optimizer.found_inf}
            self.scaler.update()


class Graphed(TorchFused):
    """The whole stock sequence, captured once in a CUDA graph and replayed: nothing of its host time is left."""

    description = "torch, fused=True and capturable: unscaling, clipping, step and update in one CUDA graph"

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        return "CUDA graphs need a GPU" if case.device != "cuda" else super().unavailable(case)

    def __init__(self, case: Case, gradients: dict[str, Tensor]):
        super().__init__(case, gradients)
        initial = [param.detach().clone() for param in self.params.values()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # makes the state, and loads what a capture could not
                self.set_gradients()
                super().step()
        torch.cuda.current_stream().wait_stream(stream)
        self.set_gradients()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            super().step()
        # As if none of these steps had been: a momentum buffer of zeros does what none does, without dampening.
        with torch.no_grad():
            for param, value in zip(self.params.values(), initial, strict=True):
                param.copy_(value)
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        self.set_gradients()

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        capturable = {} if self.case.optimizer == "sgd" else {"capturable": True}  # SGD has no such argument
        return getattr(torch.optim, OPTIMIZERS[self.case.optimizer].name)(groups, **self.flags, **capturable)

    def step(self) -> None:
        self._graph.replay()


CONTENDERS.update({"torch-merged": Merged, "torch-grad-scale": GradScaleTrick, "torch-graphed": Graphed})
