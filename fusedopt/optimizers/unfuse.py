"""unfuse(): the torch optimizer that a fused one is the twin of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..messages import local_of
from ..undo import unchanged_on_error
from .averages import refuse_while_averaged
from .base import FusedOptimizer
from .fuse import FUSED_TWINS, follow
from .known import all_fit
from .saving import as_torch_has_it, is_unreal

__all__ = ["unfuse"]


def unfuse(optimizer: FusedOptimizer) -> torch.optim.Optimizer:
    """Return the ``torch.optim`` twin of a fused optimizer: the inverse of :func:`fuse`.

    The twin takes over the state, the step hooks and the group dicts themselves, so schedulers that were attached to
    ``optimizer`` drive the twin. Do not step ``optimizer`` afterwards. ``write_back_grads`` has no meaning for the
    twin, which steps with the gradients as they are. Moments are decoded, and kept in the parameter's dtype, with which
    alone torch steps. What torch has no place for is lost: a ``master``, so that 16-bit parameters go on as they
    are (see :meth:`FusedOptimizer.master_weights`), and the average (:meth:`FusedOptimizer.averages`).

    Args:
        optimizer: exactly a FusedSGD, FusedAdam or FusedAdamW, at any point of its training. If a trainer has told it
            to clip in its next step, its gradients are clipped now.

    Raises:
        TypeError: another class, a subclass included (its ``step`` may do something else).
        ValueError: it has ``clip_grad`` or a ``grad_scale`` of its own, which the twin would ignore; or the twin
            refuses its settings. ``optimizer`` has not changed after an error.
    """
    stock = next((stock for stock, fused in FUSED_TWINS.items() if fused is type(optimizer)), None)
    if stock is None:
        names = ", ".join(fused.__name__ for fused in FUSED_TWINS.values())
        raise TypeError(f"unfuse() takes exactly one of {names}; got {type(optimizer).__name__}")
    shared = optimizer._shared
    if shared.clip is not None:
        raise ValueError(
            f"torch.optim.{stock.__name__} does not clip, and this {type(optimizer).__name__} has "
            f"clip_grad={optimizer.clip_grad}; expected clip_grad=None"
        )
    if shared.grad_scale is not None:
        raise ValueError(f"torch.optim.{stock.__name__} would ignore the grad_scale of this {type(optimizer).__name__}")
    refuse_while_averaged(optimizer, "unfuse()")
    groups = optimizer.param_groups
    state = {param: _stock_state(optimizer, group, param) for group in groups for param in group["params"]}
    layout = [(group, group["params"]) for group in groups]
    settings = {key: value for key, value in optimizer.defaults.items() if key != "decoupled_weight_decay"}
    if stock is torch.optim.Adam and optimizer.defaults.get("decoupled_weight_decay"):
        settings["decoupled_weight_decay"] = True
    if all(group.get("fused") for group in groups):  # torch's constructor decides by it who unscales
        settings["fused"] = True
    # In one group, all that torch checks of a parameter is checked, and groups are not compared one by one.
    shown = [{"params": [param for _, params in layout for param in params]}] if all_fit(groups) else groups
    with unchanged_on_error(optimizer):
        twin = stock(shown, **settings)
        if shared.next is not None:
            shared.next.clip_now()
        for group, params in layout:
            group["params"] = params
            for key, value in twin.defaults.items():
                group.setdefault(key, value)
    shared.next = None
    twin.param_groups = groups
    for param, own in state.items():
        if own:
            optimizer.state[param] = own
        else:
            optimizer.state.pop(param, None)
    twin.state = optimizer.state
    follow(optimizer, twin)
    return twin


def _stock_state(optimizer: FusedOptimizer, group: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """The state of a parameter as torch's optimizer wants it: the same tensors wherever these will do."""
    state = dict(optimizer.state.get(param, {}))
    if not state or is_unreal(optimizer, param, state):
        return {}
    if not optimizer._precision.is_plain:
        state = as_torch_has_it(optimizer, param, state)
    for column in optimizer.rule.columns:
        value = state.get(column.name)
        if isinstance(value, Tensor):
            state[column.name] = value.to(param.dtype)
        elif column.may_start_late and column.needed(group):
            state[column.name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    step = state.get("step")
    if isinstance(step, Tensor):
        on_device = group.get("capturable") or group.get("fused")
        dtype = step.dtype if step.dtype == torch.float64 and not group.get("fused") else torch.float32
        step = step.to(local_of(param).device if on_device else "cpu", dtype)
        state["step"] = step if step.ndim == 0 else step.reshape(())
    return state
