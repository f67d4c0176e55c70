"""Bytes per parameter of the usual ways to keep an optimizer's state, a part of ``fusedopt info``."""

from __future__ import annotations

from typing import Any

import torch

from ..messages import aligned
from ..optimizers.memory import Memory, memory_of_recipe
from ..rules import Adam, Precision

__all__ = ["RECIPES", "memory_of_each", "recipes"]

#: The parameters' dtype and the arguments of AdamW, by name.
RECIPES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, states in bfloat16": (torch.float32, {"state_dtype": "bfloat16"}),
    "float32, states in int8": (torch.float32, {"state_dtype": "int8"}),
    "bfloat16, master in float32, states in float32": (
        torch.bfloat16,
        {"master": "float32", "state_dtype": "float32"},
    ),
    "bfloat16, master split, states in bfloat16": (torch.bfloat16, {"master": "split", "state_dtype": "bfloat16"}),
    "bfloat16, master split, states in int8": (torch.bfloat16, {"master": "split", "state_dtype": "int8"}),
    "bfloat16, master split8, states in int8": (torch.bfloat16, {"master": "split8", "state_dtype": "int8"}),
}


def memory_of_each() -> dict[str, Memory]:
    """What AdamW holds and moves by each recipe, for a large parameter."""
    rule = Adam()
    settings = rule.hyperparameters().as_defaults()
    return {
        name: memory_of_recipe(rule, Precision.parse(rule, **kept), settings, dtype)
        for name, (dtype, kept) in RECIPES.items()
    }


def recipes() -> str:
    """A table of the recipes."""
    heads = ("AdamW, bytes per parameter", "held", "gradients freed", "moved in a step", "with clipping or a check")
    rows: list[tuple[str, ...]] = [heads]
    for name, memory in memory_of_each().items():
        numbers = (memory.held, memory.held_between_steps, memory.moved_bare, memory.moved_full)
        rows.append((name, *(f"{number:.2f}" for number in numbers)))
    return aligned(rows)
