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

    Args:
        params: tensors, named tensors or group dicts.
        lr: learning rate >= 0, a float or 1-element tensor.
        betas: decay rates of the two moments, in [0, 1), both floats or both 1-element tensors.
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay >= 0.
        amsgrad: keep and use the running maximum of the second moment.
        maximize: ascend instead of descend.
        foreach: accepted for existing configs, without effect.
        capturable: accepted for existing configs, without effect.
        differentiable: must be False.
        fused: accepted for existing configs, without effect.
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
        state_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
        master: str | None = None,
        stochastic_rounding: bool | Mapping[str, int] = False,
        ema: Mapping[str, Any] | None = None,
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
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            ema=ema,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # as torch: any Adam state may be loaded into AdamW
