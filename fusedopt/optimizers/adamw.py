"""FusedAdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import FusedAdam

__all__ = ["FusedAdamW"]


class FusedAdamW(FusedAdam):
    """Adam with decoupled weight decay; arguments, defaults and state layout of ``torch.optim.AdamW``.

    Args, Raises: as :class:`FusedAdam`, with ``weight_decay`` 0.01 by default and always decoupled.

    Formula: :class:`fusedopt.rules.Adam` and https://pytorch.org/docs/stable/generated/torch.optim.AdamW.html.
    """

    stock = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_grad: Mapping[str, Any] | None = None,
        write_back_grads: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            clip_grad=clip_grad,
            write_back_grads=write_back_grads,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # as torch: any Adam state may be loaded into AdamW
