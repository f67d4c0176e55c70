"""Optimizers whose state is kept in few bits, driven as backends drive a plan: so any form can be beside any other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from cases import module
from torch import Tensor, nn

from fusedopt.rules import RULES

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ADAM_KEYS, SGD_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("momentum_buffer",)
PIECES = {"float32": F32, "split": torch.int16, "split8": torch.uint8}


class Kept(NamedTuple):
    """How the state of an optimizer is kept: its rule and param group, the forms of its states, and all else."""

    rule: str = "adam"
    group: Mapping[str, Any] = MappingProxyType({})
    param: torch.dtype = F32
    forms: Sequence[str] = ("float32",) * 3
    master: str | None = None
    seed: int | None = None
    average: tuple[float, float, int, int] | None = None
    grad: torch.dtype | None = None


EIGHT, HALVES, BRAIN = ("codes",) * 3, ("float16", "root", "root"), ("bfloat16",) * 3
CASES = {
    "bfloat16": Kept(forms=BRAIN),
    "bfloat16 by chance": Kept(forms=BRAIN, seed=3),
    "float16 and roots": Kept(forms=HALVES),
    "float16 and roots by chance": Kept(forms=HALVES, seed=-5 % 2**64),
    "codes": Kept(forms=EIGHT),
    "codes by chance": Kept(forms=EIGHT, seed=(7 << 32) + 1),
    "codes, amsgrad": Kept(forms=EIGHT, group={"amsgrad": True}, seed=2),
    "codes and roots, amsgrad": Kept(forms=("codes", "root", "codes"), group={"amsgrad": True, "weight_decay": 0.1}),
    "bfloat16 weights by chance": Kept(param=BF16, seed=11),
    "float16 weights by chance": Kept(param=F16, seed=11, grad=F32),
    "float32 master": Kept(param=BF16, master="float32", grad=F32),
    "float32 master of float16": Kept(param=F16, master="float32", forms=BRAIN),
    "split": Kept(param=BF16, master="split"),
    "split8": Kept(param=BF16, master="split8", forms=EIGHT),
    "split8 by chance": Kept(param=BF16, master="split8", forms=EIGHT, seed=4, average=(0.1, 0.0, 0, 1)),
    "average": Kept(average=(0.01, 0.0, 1, 2)),
    "average with gamma": Kept(average=(0.002, 2.0, 1, 1), param=BF16, seed=0),
    "average of float16": Kept(average=(0.75, 0.0, 0, 1), param=F16),
    "average of a split": Kept(average=(0.25, 0.0, 0, 3), param=BF16, master="split", forms=HALVES),
    "float64, codes": Kept(param=F64, forms=EIGHT, seed=6, average=(0.3, 0.0, 0, 1)),
    "float64, bfloat16": Kept(param=F64, forms=BRAIN),
    "float64, float16 and roots": Kept(param=F64, forms=HALVES, seed=8),
    "sgd, codes": Kept("sgd", forms=("codes",), seed=1, param=BF16, master="split8"),
    "sgd, bfloat16": Kept("sgd", group={"nesterov": True}, forms=("bfloat16",), seed=1),
    "sgd, float16": Kept("sgd", group={"weight_decay": 0.1}, forms=("float16",), master="float32", param=BF16),
    "sgd without momentum": Kept("sgd", group={"momentum": 0.0}, forms=("float32",), param=BF16, seed=9),
}


def coded_bytes(numel: int) -> int:
    return (numel + 15) // 16 * 16 + 2 * ((numel + 63) // 64)


def parameters_of(
    kept: Kept, tensors: Sequence[Tensor]
) -> tuple[list[nn.Parameter], dict[Any, dict[str, Tensor]], Any]:
    """Parameters with these values, their state of zeros and what a plan is told of it."""
    names = ADAM_KEYS if kept.rule == "adam" else SGD_KEYS
    ends = {"codes": "_codes", "root": "_root"}
    keys = [name + ends.get(form, "") for name, form in zip(names, kept.forms, strict=True)]
    needed = {"adam": 3 if kept.group.get("amsgrad") else 2, "sgd": int(kept.group.get("momentum", 0.9) != 0)}
    master = kept.master and ("master" if kept.master == "float32" else "master_low")
    params, state = [], {}
    for tensor in tensors:
        param = nn.Parameter(tensor.to(kept.param))  # keeps strides
        mine: dict[str, Tensor] = {"step": torch.zeros(())}
        for key, form in list(zip(keys, kept.forms, strict=True))[: needed[kept.rule]]:
            if form == "codes":
                mine[key] = torch.zeros(coded_bytes(param.numel()), dtype=torch.uint8)
            else:
                mine[key] = torch.zeros_like(param, dtype=F16 if form == "root" else getattr(torch, form))
        if kept.master:
            assert master is not None
            mine[master] = (
                param.detach().to(F32) if master == "master" else torch.zeros_like(param, dtype=PIECES[kept.master])
            )
        if kept.average:
            mine["ema"] = param.detach().to(F64 if kept.param == F64 else F32)
        params.append(param)
        state[param] = mine
    chance = kept.seed is not None, kept.seed or 0
    return params, state, (keys, master, chance, kept.average)


class Twin:
    """An optimizer's tensors and its plan: of the CPU kernels, or of a launcher's."""

    def __init__(self, kept: Kept, tensors: Sequence[Tensor], launcher: Any = None, numbers: Sequence[Any] = ()):
        self.kept = kept
        self.params, self.state, precision = parameters_of(kept, tensors)
        settings = {"lr": 1e-2, **next(RULES[kept.rule].trial_settings())}
        if kept.rule == "sgd":
            settings["momentum"] = 0.9
        self.groups = [{"params": self.params, **settings, **kept.group}]
        told = (*precision, lambda groups: list(numbers) or [None] * len(self.params))
        self.plan = module.StepPlan(kept.rule, "cpu", launcher=launcher, precision=told)  # type: ignore[union-attr]

    def step(self, seed: int, bad: bool = False, clip_value: float = math.inf, place: Any = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator) * 10.0 ** (seed % 3 - 1)
            grad[grad.abs() < 0.3] *= 1e-6
            if self.kept.grad is not None:
                param.grad_dtype = None
            grad = grad.to(self.kept.grad or param.dtype)
            param.grad = place(grad) if place else grad
        if bad:
            self.params[-1].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        self.launch(bad, clip_value)

    def launch(self, check: bool = False, clip_value: float = math.inf) -> None:
        """A step with the gradients there are."""
        done = self.plan.step(self.groups, self.state, 2.0, None, check, 0.0, 0.0, False, clip_value, False)
        assert isinstance(done, tuple), done

    def contents(self) -> dict[str, bytes]:
        """All that is stored, by parameter and key."""
        found = {}
        for i, param in enumerate(self.params):
            for key, tensor in {"param": param.detach(), **self.state[param]}.items():
                found[f"{i} {key}"] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return found


def values(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(twins: Sequence[Twin]) -> None:
    cpu, other = (twin.contents() for twin in twins)
    assert [key for key in cpu if cpu[key] != other[key]] == []
