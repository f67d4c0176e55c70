"""What is measured: a workload, its parameter groups, an optimizer, a recipe, dtypes and a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..optimizers import FUSED_TWINS
from .workloads import GROUPINGS, WORKLOADS, Shapes, groups, numel

__all__ = ["DTYPES", "OPTIMIZERS", "RECIPES", "SCALE", "Case", "OptimizerSpec", "Recipe"]

#: The loss scale of the recipes with AMP.
SCALE = 1024.0


@dataclass(frozen=True)
class Recipe:
    """What a step has to do besides the update.

    Args:
        amp: unscale gradients that were scaled by a GradScaler.
        clip: clip the global norm.
        accumulate: micro-batches per step; each one after the first is added to the gradients, as backward does.
    """

    amp: bool = False
    clip: bool = False
    accumulate: int = 1


RECIPES: dict[str, Recipe] = {
    "bare": Recipe(),
    "clip": Recipe(clip=True),
    "amp": Recipe(amp=True),
    "amp-clip": Recipe(amp=True, clip=True),
    "amp-clip-accumulate": Recipe(amp=True, clip=True, accumulate=4),
}


@dataclass(frozen=True)
class OptimizerSpec:
    """A torch optimizer with its settings; ``states`` is its number of state tensors per parameter."""

    name: str
    settings: Mapping[str, Any]
    states: int


#: Settings for whatever an optimizer has of them. eps and weight decay are larger than usual, so that the check of the
#: results notices a missing unscaling, clipping or decay: with a small eps a step of Adam hardly depends on the size of
#: the gradients.
_SETTINGS = {"lr": 0.01, "momentum": 0.9, "eps": 0.1, "weight_decay": 0.05}


def _spec(stock: type[torch.optim.Optimizer], **extra: Any) -> OptimizerSpec:
    rule = FUSED_TWINS[stock].rule
    defaults = rule.hyperparameters().as_defaults()
    settings = {key: value for key, value in _SETTINGS.items() if key in defaults} | extra
    return OptimizerSpec(stock.__name__, settings, len(rule.needed_columns(defaults | settings)))


#: Each optimizer of torch's that has a fused twin, and what is a case of its own.
OPTIMIZERS: dict[str, OptimizerSpec] = {
    **{stock.__name__.lower(): _spec(stock) for stock in FUSED_TWINS},
    "amsgrad": _spec(torch.optim.AdamW, amsgrad=True),
}

#: (dtype of parameters and state, dtype of gradients), by name.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-grads": (torch.float32, torch.bfloat16),
    "fp16-grads": (torch.float32, torch.float16),
}


@dataclass(frozen=True)
class Case:
    """One workload with one recipe, on which contenders are compared.

    Args:
        workload: a key of ``WORKLOADS``, or any name together with ``custom``.
        grouping: one of ``GROUPINGS``. Unless it is ``'one'``, parameters with fewer than two dimensions do not decay.
        optimizer: a key of ``OPTIMIZERS``.
        recipe: a key of ``RECIPES``.
        dtype: a key of ``DTYPES``.
        device: device of the parameters, ``'cpu'`` or ``'cuda'``.
        warm: run an untimed step right before each timed one, instead of flushing the caches.
        custom: shapes of a workload that is not in ``WORKLOADS``.

    Raises:
        ValueError: an unknown key; the message names it and lists the known ones.
    """

    workload: str
    grouping: str = "one"
    optimizer: str = "adamw"
    recipe: str = "amp-clip"
    dtype: str = "fp32"
    device: str = "cpu"
    warm: bool = False
    custom: Callable[[], Shapes] | None = None

    def __post_init__(self) -> None:
        for field, known in {
            "workload": [self.workload] if self.custom else list(WORKLOADS),
            "grouping": list(GROUPINGS),
            "optimizer": list(OPTIMIZERS),
            "recipe": list(RECIPES),
            "dtype": list(DTYPES),
            "device": ["cpu", "cuda"],
        }.items():
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"{field} is {value!r}; expected one of {', '.join(known)}")

    @property
    def name(self) -> str:
        """As in ``vit-b/each/adamw/amp-clip``; the defaults fp32, CPU and cold caches are left out."""
        parts = [self.workload, self.grouping, self.optimizer, self.recipe]
        parts += [part for part, usual in ((self.dtype, "fp32"), (self.device, "cpu")) if part != usual]
        return "/".join([*parts, "warm"] if self.warm else parts)

    @cached_property
    def shapes(self) -> Shapes:
        """The parameter shapes by name."""
        return self.custom() if self.custom else WORKLOADS[self.workload].shapes()

    @cached_property
    def groups(self) -> list[list[str]]:
        """The names in each parameter group."""
        return groups(self.shapes, self.grouping)

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return numel(self.shapes)

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes that two passes over the gradients move per element, each array once per pass that needs it."""
        param, grad = (dtype.itemsize for dtype in DTYPES[self.dtype])
        recipe = RECIPES[self.recipe]
        statistics = grad if recipe.amp or recipe.clip else 0
        accumulated = 3 * grad * (recipe.accumulate - 1)
        return 2 * param * (1 + OPTIMIZERS[self.optimizer].states) + grad + statistics + accumulated

    @property
    def max_norm(self) -> float:
        """The norm to clip to: about a third of the gradients' norm, so that clipping recipes do clip."""
        return 0.5 * self.parameters**0.5

    def settings(self, group: list[str]) -> dict[str, Any]:
        """The optimizer settings of one of ``groups``."""
        settings = dict(OPTIMIZERS[self.optimizer].settings)
        if self.grouping != "one" and len(self.shapes[group[0]]) < 2:
            settings["weight_decay"] = 0.0
        return settings
