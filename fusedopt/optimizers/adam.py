"""FusedAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..rules import RULES, AdamHyperparameters
from .base import FusedOptimizer

__all__ = ["FusedAdam"]


class FusedAdam(FusedOptimizer):
    """Adam; arguments, defaults and state layout of ``torch.optim.Adam``.

    Args:
        params: tensors, named tensors or group dicts.
        lr: learning rate >= 0, a float or 1-element tensor.
        betas: decay rates of the two moments, in [0, 1), both floats or both 1-element tensors.
        eps: added to the denominator, >= 0.
        weight_decay: coupled (L2) weight decay >= 0, or decoupled with ``decoupled_weight_decay``.
        amsgrad: keep and use the running maximum of the second moment.
        foreach: accepted for existing configs, without effect.
        maximize: ascend instead of descend.
        capturable: accepted for existing configs, without effect.
        differentiable: must be False.
        fused: accepted for existing configs, without effect.
        decoupled_weight_decay: AdamW's weight decay.
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` or
            ``dict(type='value', clip_value=…)``; applied inside the step, to all groups together.
        write_back_grads: leave the unscaled, clipped gradients in ``.grad``.
        backend: ``'auto'``, ``'native'``, ``'triton'`` or ``'reference'``.
        state_dtype: in what the two moments are kept: ``'float32'``, ``'bfloat16'``, ``'float16'`` or ``'int8'``
            (codes in blocks of 64 that share a scale), or a dict of these by state, such as ``dict(exp_avg='int8',
            exp_avg_sq='bfloat16')``. None keeps them as torch does, in the parameter's dtype. Of the second moment,
            ``'float16'`` stores the square root, and ``'int8'`` is always rounded by chance.
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

    Formula: :class:`fusedopt.rules.Adam` and https://pytorch.org/docs/stable/generated/torch.optim.Adam.html.
    """

    rule = RULES["adam"]
    stock: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        clip_grad: Mapping[str, Any] | None = None,
        write_back_grads: bool = False,
        backend: str = "auto",
        state_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
        master: str | None = None,
        stochastic_rounding: bool | Mapping[str, int] = False,
        ema: Mapping[str, Any] | None = None,
    ):
        settings = AdamHyperparameters(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
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
