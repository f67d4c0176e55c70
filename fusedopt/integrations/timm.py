"""fusedopt in timm: optimizers by name, and a ``NativeScaler`` that unscales and clips inside the step.

Importing this registers ``fusedoptadamw``, ``fusedoptadam``, ``fusedoptsgd`` (with Nesterov momentum, as timm's
``sgd``) and ``fusedoptmomentum`` (without, as timm's ``momentum``) for ``timm.optim.create_optimizer_v2``. In timm,
``fusedadamw``, ``fusedadam`` and ``fusedsgd`` are the optimizers of apex.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as optimizer_module

from ..amp import GradScaler
from ..messages import warn_caller
from ..messages.extras import require
from ..optimizers import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from ..optimizers.next_step import clip_next_step
from ..rules import NormClip, ValueClip
from .scalers import give_scaler_back, take_scaler

__all__ = ["FusedNativeScaler", "fuse", "register", "unfuse", "unregister"]

_factory = require("timm.optim._optim_factory", "timm")
_utils = require("timm.utils", "timm")

_SGD = {"opt_class": FusedSGD, "has_eps": False, "has_momentum": True}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fusedoptadamw": {"opt_class": FusedAdamW, "has_betas": True},
    "fusedoptadam": {"opt_class": FusedAdam, "has_betas": True},
    "fusedoptsgd": {**_SGD, "defaults": {"nesterov": True}},
    "fusedoptmomentum": {**_SGD, "defaults": {"nesterov": False}},
}
_KINDS: dict[str, type[NormClip] | type[ValueClip]] = {"norm": NormClip, "value": ValueClip}


def register() -> None:
    """Register the optimizers in timm; importing this module does it. An entry of somebody else's is kept.

    Warns:
        UserWarning: a name belongs to an optimizer that is not one of these.
    """
    registry = _factory.default_registry
    for name, about in _OPTIMIZERS.items():
        if name not in registry.list_optimizers():
            description = f"fusedopt's {about['opt_class'].__name__}, with unscaling and clipping inside the step"
            registry.register(_factory.OptimInfo(name=name, description=description, **about))
        elif not _is_ours(name):
            there = registry.get_optimizer_info(name).opt_class
            warn_caller(f"{name!r} in timm is {there!r}, and is kept; expected no such name")


def unregister() -> None:
    """Undo :func:`register`: timm no longer knows the names. Existing optimizers stay as they are."""
    for name in _OPTIMIZERS:
        if name in _factory.default_registry.list_optimizers() and _is_ours(name):
            del _factory.default_registry._optimizers[name]


def _is_ours(name: str) -> bool:
    return _factory.default_registry.get_optimizer_info(name).opt_class is _OPTIMIZERS[name]["opt_class"]


class FusedNativeScaler(_utils.NativeScaler):  # type: ignore[name-defined]
    """timm's ``NativeScaler``, which leaves unscaling and clipping to the step of a fused optimizer.

    :func:`fuse` makes it of an existing one. It does what timm's does wherever the step cannot do it:
    for any other optimizer, also Lookahead around a fused one; for ``clip_mode='agc'``; for a ``clip_grad`` that is not
    above 0; if ``parameters`` with gradients are not exactly those of the optimizer; and if the optimizer has hooks
    before the step, which see unscaled and clipped gradients.

    Args:
        device: type of the device that the loss is on.
    """

    def __call__(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Iterable[Tensor] | Tensor | None = None,
        create_graph: bool = False,
        need_update: bool = True,
    ) -> None:
        """Scale the loss, do the backward pass, and step, as ``timm.utils.NativeScaler``.

        Args:
            loss: the loss, not scaled.
            optimizer: any optimizer.
            clip_grad: bound of the gradients, or None.
            clip_mode: ``'norm'``, ``'value'`` or ``'agc'``.
            parameters: what to clip.
            create_graph: make the backward pass differentiable.
            need_update: False if more gradients are to be added before the step.

        Raises:
            ValueError: the fused optimizer has ``clip_grad`` of its own.
            AssertionError: ``clip_grad`` without ``parameters``, or an unknown ``clip_mode``.
        """
        if parameters is not None and not isinstance(parameters, (Tensor, Sequence)):
            parameters = list(parameters)
        scaler = self._scaler
        scaler.scale(loss).backward(create_graph=create_graph)
        if not need_update:
            return
        if clip_grad is not None:
            assert parameters is not None, "timm's scaler clips `parameters`, and got clip_grad without them"
            self._clip(optimizer, clip_grad, clip_mode, parameters)
        elif _shows_gradients(optimizer):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    def _clip(self, optimizer: Any, bound: float, mode: str, parameters: Sequence[Tensor] | Tensor) -> None:
        scaler = self._scaler
        if (
            isinstance(optimizer, FusedOptimizer)
            and isinstance(scaler, GradScaler)
            and mode in _KINDS
            and bound > 0
            and not _shows_gradients(optimizer)
            and _are_those_of(optimizer, parameters)
        ):
            clip_next_step(optimizer, _KINDS[mode](bound))  # the step follows at once, and knows the scale
        else:
            scaler.unscale_(optimizer)
            _utils.dispatch_clip_grad(parameters, bound, mode=mode)


def _shows_gradients(optimizer: Any) -> bool:
    """Whether somebody may look at the gradients before a fused step."""
    hooks = optimizer_module._global_optimizer_pre_hooks
    return isinstance(optimizer, FusedOptimizer) and bool(hooks or optimizer._optimizer_step_pre_hooks)


def _are_those_of(optimizer: FusedOptimizer, parameters: Sequence[Tensor] | Tensor) -> bool:
    """Whether the parameters with a gradient are exactly those of the optimizer."""
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    clipped = [id(param) for param in given if param.grad is not None]
    stepped = [id(param) for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
    return sorted(clipped) == sorted(stepped)


def fuse(scaler: Any) -> Any:
    """Make a ``timm.utils.NativeScaler`` unscale and clip inside the step of a fused optimizer.

    The scaler stays the same object, with the same state and state dict. Calling this again changes nothing.

    Args:
        scaler: of exactly that class, at any point of its training.

    Returns:
        the scaler, now a :class:`FusedNativeScaler`.

    Raises:
        TypeError: anything else, such as the None that stands for no loss scaling.
    """
    if type(scaler) is not FusedNativeScaler:
        if type(scaler) is not _utils.NativeScaler:
            hint = "; without a loss scaler, give the optimizer clip_grad=..." if scaler is None else ""
            raise TypeError(f"fuse() takes a timm.utils.NativeScaler, got {type(scaler).__name__}{hint}")
        take_scaler(scaler._scaler)
        scaler.__class__ = FusedNativeScaler
    return scaler


def unfuse(scaler: Any) -> Any:
    """Undo :func:`fuse`.

    Args:
        scaler: any; one that was not fused is left alone.

    Returns:
        the scaler.
    """
    if type(scaler) is FusedNativeScaler:
        give_scaler_back(scaler._scaler)
        scaler.__class__ = _utils.NativeScaler
    return scaler


register()
