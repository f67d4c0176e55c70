"""An optimizer for each parameter, as a loop has them that steps in the backward pass."""

from __future__ import annotations

from typing import Any

import torch

from fusedopt.bench.cases import RECIPES, Case
from fusedopt.bench.contenders import CONTENDERS, OURS, RIVAL, Contender, ForLoop, Fused, Stock, TorchFused

__all__ = ["IN_BACKWARD", "OneEach"]


class OneEach(Contender):
    """A mixin, placed before a contender: an optimizer of its own for each parameter, stepped one after the other.

    The backward pass itself is not part of it.
    """

    @classmethod
    def unavailable(cls, case: Case) -> str | None:
        recipe = RECIPES[case.recipe]
        alone = recipe.amp or recipe.clip or recipe.accumulate > 1
        return super().unavailable(case) or ("in a backward pass one gradient is known at a time" if alone else None)

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.optimizers = [super(OneEach, self).build([{**g, "params": [p]}]) for g in groups for p in g["params"]]
        return self.optimizers[0]

    def step(self) -> None:
        if isinstance(self, Stock):
            self.cast_gradients()
        for optimizer in self.optimizers:
            optimizer.step()


def _each(kind: type[Contender]) -> type[Contender]:
    about = {"description": f"{kind.description}; an optimizer for each parameter"}
    return type(f"{kind.__name__}InBackward", (OneEach, kind), about)


#: An optimizer for each parameter, by the name of the one that has them all.
IN_BACKWARD = {name: f"{name}-in-backward" for name in (OURS, RIVAL, "torch-for-loop")}

CONTENDERS.update(
    {IN_BACKWARD[name]: _each(kind) for name, kind in ((OURS, Fused), (RIVAL, TorchFused), ("torch-for-loop", ForLoop))}
)
