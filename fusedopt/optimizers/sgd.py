"""FusedSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..rules import RULES, SGDHyperparameters
from .base import FusedOptimizer

__all__ = ["FusedSGD"]


class FusedSGD(FusedOptimizer):
    """SGD with momentum; arguments, defaults and state layout of ``torch.optim.SGD``.

    Args:
        params: tensors, named tensors or group dicts.
        lr: learning rate >= 0, a float or 1-element tensor.
        momentum: momentum factor >= 0.
        dampening: dampening of the momentum.
        weight_decay: coupled (L2) weight decay >= 0.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening 0.
        maximize: ascend instead of descend.
        foreach: accepted for existing configs, without effect.
        differentiable: must be False.
        fused: accepted for existing configs, without effect.
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` or
            ``dict(type='value', clip_value=…)``; applied inside the step, to all groups together.
        write_back_grads: leave the unscaled, clipped gradients in ``.grad``.
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``.
        state_dtype: in what the momentum buffer is kept: ``'float32'``, ``'bfloat16'``, ``'float16'`` or ``'int8'``
            (codes in blocks of 64 that share a scale), or ``dict(momentum_buffer=…)``. None keeps it as torch does, in
            the parameter's dtype.
        master: what makes 16-bit parameters of the optimizer exact: ``'float32'`` (a copy in the state), ``'split'``
            (of bfloat16 ones, the 16 bits that they lack) or ``'split8'`` (8 of these). None leaves them as they are.
        stochastic_rounding: round to 16 and 8 bits by chance, without a bias: True, or ``dict(seed=…)``. The random
            bits are a function of the seed, the step and the element alone.
        ema: keep an average of the weights in the same pass: ``dict(decay=0.9998)``, or ``momentum`` for 1 - decay;
            with ``begin`` (steps before it starts), ``interval`` (steps between its updates) and ``gamma`` (larger
            weights at the start, ``gamma / (gamma + updates)``).

    Raises:
        ValueError: a setting is out of range or the parameter list is empty.
        TypeError: a setting or parameter of the wrong kind.

    Formula: :class:`fusedopt.rules.SGD` and https://pytorch.org/docs/stable/generated/torch.optim.SGD.html.
    """

    rule = RULES["sgd"]
    stock = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_grad: Mapping[str, Any] | None = None,
        write_back_grads: bool = False,
        backend: str = "auto",
        state_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
        master: str | None = None,
        stochastic_rounding: bool | Mapping[str, int] = False,
        ema: Mapping[str, Any] | None = None,
    ):
        settings = SGDHyperparameters(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(
            params,
            settings,
            clip_grad=clip_grad,
            write_back_grads=write_back_grads,
            backend=backend,
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            ema=ema,
        )
