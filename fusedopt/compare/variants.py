"""The optimizers that are compared, made from the one that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..optimizers import FUSED_TWINS
from ..training.registry import OPTIMIZERS

__all__ = ["move_one_weight", "stock_and_fused", "torch_way", "why_no_torch_fused", "with_torch_fused"]


def stock_and_fused(cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``optim_wrapper`` config with the stock and with the fused optimizer, whichever of the two it names.

    Raises:
        KeyError: it names none.
        ValueError: there is no fused twin.
    """
    settings = dict(cfg["optimizer"])
    if "type" not in settings:
        raise KeyError("no `optim_wrapper.optimizer.type`; expected the name of an optimizer, such as 'AdamW'")
    named = settings["type"]
    optimizer_class: Any = OPTIMIZERS.resolve(named)
    stock_of = {fused: stock for stock, fused in FUSED_TWINS.items()}
    stock_class = stock_of.get(optimizer_class, optimizer_class)
    if stock_class not in FUSED_TWINS:
        known = ", ".join(name for pair in FUSED_TWINS.items() for name in (pair[0].__name__, pair[1].__name__))
        raise ValueError(f"optimizer {named!r} has no fused twin to compare with; expected one of {known}")
    without_effect = ("foreach", "fused")  # on the twin, which would say so
    twin_settings = {key: value for key, value in settings.items() if key not in without_effect}
    fused = {**cfg, "optimizer": {**twin_settings, "type": FUSED_TWINS[stock_class]}}
    # What only a fused optimizer takes: the stock one is clipped by the wrapper instead.
    clip_grad = settings.pop("clip_grad", None)
    for name in ("backend", "write_back_grads"):
        settings.pop(name, None)
    stock = {**cfg, "optimizer": {**settings, "type": stock_class}}
    if clip_grad is not None:
        stock["clip_grad"] = clip_grad
    return stock, fused


def with_torch_fused(stock: Mapping[str, Any]) -> dict[str, Any]:
    """The stock ``optim_wrapper`` config with ``fused=True``."""
    settings = {key: value for key, value in stock["optimizer"].items() if key != "foreach"}
    return {**stock, "optimizer": {**settings, "fused": True}}


def torch_way(optimizer: Optimizer) -> str:
    """How torch runs a step of one of its optimizers: ``'for-loop'``, ``'foreach'`` or ``'fused'``."""
    group = optimizer.param_groups[0]
    if group.get("fused"):
        return "fused"
    foreach = group.get("foreach")
    if foreach is None:  # torch's default: not on a CPU, nor for what the foreach functions cannot do
        tensor_lr = isinstance(group["lr"], torch.Tensor) and not group.get("capturable")
        plain = tensor_lr or group.get("differentiable") or group.get("fused") is False
        foreach = not plain and all(param.device.type != "cpu" for param in group["params"])
    return "foreach" if foreach else "for-loop"


def why_no_torch_fused(optimizer: Optimizer) -> str | None:
    """Why a stock optimizer has no counterpart with ``fused=True``, or None; a step on one element tells."""
    if torch_way(optimizer) == "fused":
        return "the config's own optimizer is torch's fused one"
    group = optimizer.param_groups[0]
    settings = {key: value for key, value in group.items() if key not in ("params", "fused", "foreach", "param_names")}
    kinds = {(param.device, param.dtype) for group in optimizer.param_groups for param in group["params"]}
    for device, dtype in sorted(kinds, key=str):
        param = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        param.grad = torch.ones_like(param)
        try:
            type(optimizer)([{**settings, "params": [param]}], fused=True).step()  # type: ignore[call-arg]
        except Exception as error:  # torch raises errors of many kinds here
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            return f"torch's {type(optimizer).__name__}(fused=True) does not step {dtype} on {device.type}: {reason}"
    return None


def move_one_weight(model: nn.Module) -> tuple[str, float, float]:
    """Move one weight of a model up by one ulp: the first one that is not zero of those that are trained.

    A zero is left alone: its neighbour is so small that the first addition would lose it.

    Returns:
        The parameter's name, and the weight before and after. ``('', 0.0, 0.0)`` where every weight is zero.
    """
    for name, param in model.named_parameters():
        if param.requires_grad and len(places := param.detach().nonzero()):
            place = tuple(places[0].tolist())
            with torch.no_grad():
                before = param[place].clone()
                param[place] = torch.nextafter(before, torch.full_like(before, torch.inf))
            return name, before.item(), param[place].item()
    return "", 0.0, 0.0
