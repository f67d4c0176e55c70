"""fuse(): the fused twin of an existing torch optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ..undo import unchanged_on_error
from .adamw import FusedAdamW
from .base import FusedOptimizer
from .loading import check_state, converted_state, take_steps_out

__all__ = ["FUSED_TWINS", "follow", "fuse"]

#: The fused twin of each torch class: filled in by the package, from the ``stock`` of each optimizer.
FUSED_TWINS: dict[type[torch.optim.Optimizer], type[FusedOptimizer]] = {}


def fuse(
    optimizer: torch.optim.Optimizer,
    *,
    clip_grad: Mapping[str, Any] | None = None,
    write_back_grads: bool = False,
    backend: str = "auto",
    state_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
    master: str | None = None,
    stochastic_rounding: bool | Mapping[str, int] = False,
    ema: Mapping[str, Any] | None = None,
) -> FusedOptimizer:
    """Return the fused twin of a ``torch.optim`` optimizer: of an SGD, Adam or AdamW.

    The twin takes over the state, the step hooks and the very group dicts, so schedulers that were attached to
    ``optimizer`` drive the twin. State is converted to the form in which the twin keeps it. Do not step
    ``optimizer`` afterwards.

    Args:
        optimizer: exactly of one of the classes in ``FUSED_TWINS``, at any point of its training.
        clip_grad: see :class:`FusedAdam`.
        write_back_grads: see :class:`FusedAdam`.
        backend: see :class:`FusedAdam`.
        state_dtype, master, stochastic_rounding, ema: see :class:`FusedAdam`.

    Raises:
        TypeError: another class, a subclass included (its ``step`` may do something else).
        TypeError, ValueError: as for :class:`FusedAdam`.
        ValueError: its state of a parameter is half there. ``optimizer`` has not changed after an error.
    """
    twin_class = FUSED_TWINS.get(type(optimizer))
    if twin_class is None:
        names = ", ".join(f"torch.optim.{cls.__name__}" for cls in FUSED_TWINS)
        raise TypeError(f"fuse() takes exactly one of {names}; got {type(optimizer).__name__}")
    check_state(twin_class.rule, optimizer.param_groups, optimizer.state)
    layout = [(group, group["params"]) for group in optimizer.param_groups]
    defaults = {key: value for key, value in optimizer.defaults.items() if key not in ("fused", "foreach")}
    if twin_class is FusedAdamW:
        del defaults["decoupled_weight_decay"]  # no argument there: always True
    with unchanged_on_error(optimizer):
        twin = twin_class(
            optimizer.param_groups,
            **defaults,
            clip_grad=clip_grad,
            write_back_grads=write_back_grads,
            backend=backend,
            state_dtype=state_dtype,
            master=master,
            stochastic_rounding=stochastic_rounding,
            ema=ema,
        )
        for group, params in layout:
            group["params"] = params
        state = converted_state(twin.rule, twin._precision, optimizer.param_groups, optimizer.state)
        twin.param_groups = optimizer.param_groups
        optimizer.state.update(state)
        twin.state = optimizer.state
        if twin_class.rule.hides_step:
            twin._take_counts(take_steps_out(twin_class.rule, twin.state))
        follow(optimizer, twin)
        return twin


def follow(optimizer: torch.optim.Optimizer, twin: torch.optim.Optimizer) -> None:
    """Attach to ``twin`` what is attached to ``optimizer``: hooks, and schedulers, which write to its groups.

    ``load_state_dict`` gives the twin other group dicts. The schedulers still hold ``optimizer``, so it gets these too.
    """
    twin._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    twin._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
    twin._optimizer_load_state_dict_post_hooks = optimizer._optimizer_load_state_dict_post_hooks
    former = weakref.ref(optimizer, lambda _: handle.remove())

    def hand_groups_on(loaded: torch.optim.Optimizer) -> None:
        if (held := former()) is not None:
            held.param_groups = loaded.param_groups

    handle = twin.register_load_state_dict_post_hook(hand_groups_on)
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        # The twin's steps are not seen by a scheduler that watches optimizer.step; spare its warning.
        optimizer._opt_called = True  # type: ignore[attr-defined]
