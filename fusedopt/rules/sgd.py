"""SGD with momentum: hyperparameters, state and reference maths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..messages import check_number
from .rule import Hyperparameters, Rule, StateColumn, scalar

__all__ = ["SGD", "SGDHyperparameters"]


@dataclass(frozen=True)
class SGDHyperparameters(Hyperparameters):
    """Settings of ``torch.optim.SGD``."""

    filled_in = (*Hyperparameters.filled_in, "nesterov")

    lr: float | Tensor = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False
    maximize: bool = False
    foreach: bool | None = None
    differentiable: bool = False
    fused: bool | None = None

    def __post_init__(self) -> None:
        self._make_plain()
        check_number("lr", self.lr)
        check_number("momentum", self.momentum)
        check_number("dampening", self.dampening, minimum=-math.inf)
        check_number("weight_decay", self.weight_decay)
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        self.check_flags()


def _may_be_used(momentum: float | Tensor) -> bool:
    """Whether it is not zero, for all that is known without waiting for a device."""
    return isinstance(momentum, Tensor) or momentum != 0


class SGD(Rule):
    r"""Stochastic gradient descent with momentum, as ``torch.optim.SGD``.

    .. math::
        g &\leftarrow g + \lambda p \\
        b &\leftarrow g \text{ on a parameter's first step, else } \mu b + (1-\tau) g \\
        p &\leftarrow p - \gamma\,(g + \mu b \text{ with nesterov, } b \text{ with momentum, else } g)

    The first step is counted per parameter, so that one unfrozen later starts with ``b = g``. torch keeps no step
    count for SGD; ours is hidden, see Note [Hidden counts].
    """

    name = "sgd"
    hyperparameters = SGDHyperparameters
    columns = (StateColumn("momentum_buffer", needed=lambda group: _may_be_used(group["momentum"])),)
    hides_step = True
    trials = (
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "maximize": True},
    )

    def update(
        self, group: Mapping[str, Any], param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int
    ) -> None:
        lr, weight_decay = scalar(group["lr"]), scalar(group["weight_decay"])
        momentum, dampening = scalar(group["momentum"]), scalar(group["dampening"])
        if group["maximize"]:
            grad = -grad
        if weight_decay != 0:
            grad = grad + weight_decay * param
        if momentum != 0:
            buffer = state["momentum_buffer"]
            if step == 1:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_((1 - dampening) * grad)
            grad = grad + momentum * buffer if group["nesterov"] else buffer
        param.sub_(lr * grad)
