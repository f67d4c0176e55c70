"""Adam and AdamW: hyperparameters, state and reference maths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..messages import check_betas, check_number
from .rule import Hyperparameters, Rule, StateColumn, scalar

__all__ = ["Adam", "AdamHyperparameters"]


@dataclass(frozen=True)
class AdamHyperparameters(Hyperparameters):
    """Settings of ``torch.optim.Adam``; ``decoupled_weight_decay=True`` makes it AdamW."""

    filled_in = (*Hyperparameters.filled_in, "amsgrad", "decoupled_weight_decay")

    lr: float | Tensor = 1e-3
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.0
    amsgrad: bool = False
    maximize: bool = False
    foreach: bool | None = None
    capturable: bool = False
    differentiable: bool = False
    fused: bool | None = None
    decoupled_weight_decay: bool = False

    def __post_init__(self) -> None:
        self._make_plain()
        check_number("lr", self.lr)
        check_number("eps", self.eps)
        check_number("weight_decay", self.weight_decay)
        check_betas(self.betas)
        if isinstance(self.betas[0], Tensor) != isinstance(self.betas[1], Tensor):
            raise ValueError("betas must be either both floats or both Tensors")
        self.check_flags()


class Adam(Rule):
    r"""Adam (Kingma & Ba, 2015) with AMSGrad, and AdamW (Loshchilov & Hutter, 2019), as ``torch.optim.Adam``.

    .. math::
        p &\leftarrow p\,(1 - \gamma\lambda) \text{ if decoupled, else } g \leftarrow g + \lambda p \\
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2 \\
        p &\leftarrow p - \frac{\gamma}{1-\beta_1^t} \cdot \frac{m}{\sqrt{v}/\sqrt{1-\beta_2^t} + \epsilon}

    with the running maximum of ``v`` in place of ``v`` under ``amsgrad``.
    """

    name = "adam"
    hyperparameters = AdamHyperparameters
    columns = (
        StateColumn("exp_avg"),
        StateColumn("exp_avg_sq", squares=True),
        StateColumn(
            "max_exp_avg_sq",
            needed=lambda group: bool(group["amsgrad"]),
            may_start_late=True,
            squares=True,
            only_grows=True,
        ),
    )
    trials = (
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.1, "amsgrad": True, "maximize": True},
    )

    def update(
        self, group: Mapping[str, Any], param: Tensor, grad: Tensor, state: Mapping[str, Tensor], step: int
    ) -> None:
        lr, weight_decay = scalar(group["lr"]), scalar(group["weight_decay"])
        beta1, beta2 = (scalar(beta) for beta in group["betas"])
        if group["maximize"]:
            grad = -grad
        if weight_decay != 0:
            if group["decoupled_weight_decay"]:
                param.mul_(1 - lr * weight_decay)
            else:
                grad = grad + weight_decay * param
        exp_avg = state["exp_avg"].mul_(beta1).add_((1 - beta1) * grad)
        variance = state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)
        if group["amsgrad"]:
            # torch.maximum hands NaN on, as torch's Adam does.
            variance = state["max_exp_avg_sq"].copy_(variance.maximum(state["max_exp_avg_sq"]))
        denom = variance.sqrt().mul_(1 / math.sqrt(1 - beta2**step)).add_(group["eps"])
        param.sub_((lr / (1 - beta1**step)) * exp_avg / denom)
