"""The optimizers that are compared, and the recipes in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fusedopt
from fusedopt.amp import GradScaler

from .workloads import Shapes

MAX_NORM = 1.0
SCALE = 1024.0
SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "weight_decay": 0.05},
    "SGD": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
}
STOCK: dict[str, dict[str, Any]] = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch default": {},
}


@dataclass(frozen=True)
class Recipe:
    """What a training asks of a step.

    Args:
        name: shown in the table.
        amp: gradients come scaled, from a GradScaler.
        clip: the global norm is clipped.
    """

    name: str
    amp: bool
    clip: bool

    def bytes_per_parameter(self, optimizer: str) -> int:
        """Bytes that fusedopt's two passes move per float32 parameter: each array once per pass that needs it."""
        update = {"AdamW": 28, "SGD": 20}[optimizer]
        return update + (4 if self.amp or self.clip else 0)


AMP_CLIP = Recipe("AMP + clip", amp=True, clip=True)
BARE = Recipe("bare step", amp=False, clip=False)


class Contender:
    """One optimizer on parameters of its own, with what a training does to its gradients after backward."""

    def __init__(self, name: str, optimizer: str, recipe: Recipe, shapes: Shapes, group_per_parameter: bool):
        generator = torch.Generator().manual_seed(0)
        self.name = name
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        scale = SCALE if recipe.amp else 1.0
        self._gradients = [torch.randn(shape, generator=generator) * scale for shape in shapes]
        for param, gradient in zip(self.params, self._gradients, strict=True):
            param.grad = gradient.clone()
        groups = [{"params": [param]} for param in self.params] if group_per_parameter else self.params
        self._stock = name != "fusedopt"
        settings = SETTINGS[optimizer]
        if self._stock:
            self.optimizer = getattr(torch.optim, optimizer)(groups, **settings, **STOCK[name])
            self._scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=recipe.amp)
        else:
            clip = {"max_norm": MAX_NORM} if recipe.clip else None
            self.optimizer = getattr(fusedopt, f"Fused{optimizer}")(groups, **settings, clip_grad=clip)
            self._scaler = GradScaler("cpu", init_scale=SCALE, enabled=recipe.amp)
        self._scaler.scale(torch.zeros(()))
        self.step: Callable[[], None] = self._step_amp if recipe.amp else self._step_plain
        self._clip = recipe.clip and self._stock

    def restore_gradients(self) -> None:
        """Undo what a stock step writes into the gradients."""
        if self._stock:
            torch._foreach_copy_([param.grad for param in self.params], self._gradients)

    def _step_amp(self) -> None:
        if self._clip:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _step_plain(self) -> None:
        if self._clip:
            nn.utils.clip_grad_norm_(self.params, MAX_NORM)
        self.optimizer.step()
