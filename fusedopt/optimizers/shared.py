"""What an optimizer shares with the objects that others build around it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backends import StepReport, StepRequest
from ..rules import NormClip, ValueClip

if TYPE_CHECKING:
    from .next_step import NextStep

__all__ = ["Shared", "handed_over", "reach_through_accelerate", "steps_fused"]


class Shared:
    """Settings and results of an optimizer that may be set or read through another object.

    Note [Objects around an optimizer]: Lightning wraps an optimizer in an object of a class that is derived from the
    optimizer's and sends to the optimizer what it does not find itself; others give theirs the optimizer's ``__dict__``
    or a copy of it. What is assigned to an attribute of such an object stays there, and the optimizer that steps would
    not know. So what may be assigned after the construction is a property, and lies in this object, which all of them
    find.

    accelerate's class shares nothing with the optimizer that it holds, and has no place where it asks for what it does
    not find itself. So :func:`reach_through_accelerate` gives that class the attributes which may be assigned.

    Attributes:
        clip: the clipping inside the step.
        next: what is asked of the next step alone, see Note [Clipping the next step]; None without.
        write_back_grads: whether to leave unscaled, clipped gradients in ``.grad``.
        takes_scale: whether a stock scaler hands its scale over; None where that is up to the parameters.
        grad_scale, found_inf: what a stock scaler hands over as attributes, or a user; None without.
        scale: that of a :class:`fusedopt.amp.GradScaler` while it steps.
        share_of: the process group whose processes each step a share of the parameters; None without.
        last_step: the report of the last step.
        averaged: whether the parameters have the values of their averages now.
    """

    __slots__ = (
        "averaged",
        "clip",
        "found_inf",
        "grad_scale",
        "last_step",
        "next",
        "scale",
        "share_of",
        "takes_scale",
        "write_back_grads",
    )

    def __init__(
        self,
        clip: NormClip | ValueClip | None = None,
        write_back_grads: bool = False,
        takes_scale: bool | None = None,
    ):
        self.clip = clip
        self.next: NextStep | None = None
        self.write_back_grads = write_back_grads
        self.takes_scale = takes_scale
        self.grad_scale: Tensor | float | None = None
        self.found_inf: Tensor | None = None
        self.scale: Tensor | None = None
        self.share_of: Any = None
        self.last_step: StepReport | None = None
        self.averaged = False

    def request(self, grad_scale: Tensor | float | None, found_inf: Tensor | None) -> StepRequest:
        """What a step with these arguments asks of a backend."""
        if grad_scale is None:
            grad_scale = self.scale
        check = grad_scale is not None and found_inf is None
        if found_inf is None and not check:
            found_inf = self.found_inf
        if (given := self.grad_scale) is not None:
            grad_scale = given if grad_scale is None else grad_scale * given
        clip = self.clip if self.next is None else self.next.clip
        return StepRequest(grad_scale, found_inf, check, clip, self.write_back_grads)


def steps_fused(optimizer: Any) -> bool:
    """Whether a step of the optimizer unscales and clips: that of a fused one, or of a group or ZeRO share of them."""
    return isinstance(getattr(optimizer, "_shared", None), Shared)


def handed_over(name: str) -> Any:
    """An attribute of an optimizer that torch's scaler sets before a step and deletes after it.

    It is there only in between: torch multiplies its scale with one that is there already, and cannot with None.
    """

    def get(optimizer: Any) -> Any:
        value = getattr(optimizer._shared, name)
        if value is None:
            raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute {name!r}")
        return value

    def put(optimizer: Any, value: Any) -> None:
        setattr(optimizer._shared, name, value)

    def remove(optimizer: Any) -> None:
        setattr(optimizer._shared, name, None)

    return property(get, put, remove)


def reach_through_accelerate() -> None:
    """Make what is assigned to accelerate's wrapper of a fused optimizer reach the optimizer, if accelerate is in use.

    See Note [Objects around an optimizer]. Around any other optimizer the wrapper's attributes stay its own.
    """
    outer = getattr(sys.modules.get("accelerate.optimizer"), "AcceleratedOptimizer", None)
    if outer is not None and "clip_grad" not in vars(outer):
        for name in ("clip_grad", "write_back_grads", "last_step"):
            setattr(outer, name, _of_what_it_holds(name))


def _of_what_it_holds(name: str) -> Any:
    def is_fused(outer: Any) -> bool:
        return steps_fused(outer.optimizer)

    def get(outer: Any) -> Any:
        if is_fused(outer):
            return getattr(outer.optimizer, name)
        if name not in vars(outer):
            raise AttributeError(f"{type(outer).__name__!r} object has no attribute {name!r}")
        return vars(outer)[name]

    def put(outer: Any, value: Any) -> None:
        if is_fused(outer):
            setattr(outer.optimizer, name, value)
        else:
            vars(outer)[name] = value

    return property(get, put)
