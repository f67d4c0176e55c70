"""Clipping that a trainer asks of the next step alone, and the norm that the step finds."""

from __future__ import annotations

import contextlib
import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..backends import StepReport, StepRequest
from ..backends.base import report_dtype
from ..backends.conclusions import conclude
from ..rules import NormClip, ValueClip, clip_coefficient

if TYPE_CHECKING:
    from .base import FusedOptimizer

__all__ = ["NextStep", "NormOfStep", "clip_next_step", "clip_now"]

# Note [Clipping the next step]
# A trainer clips when it is told to, and then steps: accelerator.clip_grad_norm_(...), Lightning's clip_gradients(...).
# Clipping in the step, the first of these only notes what the second has to do. Between them the gradients are not yet
# what they would be: not clipped, and not unscaled. What somebody could notice of that is this:
#
# - The norm that was returned. Read after the step, it is what the step found. Read before, it is found then, in a pass
#   of its own, with which the step is spared another.
# - Clipping for the second time: the first is done then, on the gradients.
# - No step: zero_grad() of the optimizer drops what was asked for.
# - Gradients that were written to or replaced, as by another backward pass: the step raises. It looks at the first and
#   the last one. To look at all of them would take longer than the step.


class NextStep:
    """What is asked of an optimizer's next step alone.

    Args:
        optimizer: whose step it is.
        clip: the clipping.
        scale: what its gradients are divided by in the step, as far as that is known: a 0-dim tensor, or None.
    """

    def __init__(self, optimizer: FusedOptimizer, clip: NormClip | ValueClip, scale: Tensor | None):
        self.optimizer = weakref.ref(optimizer)
        self.clip = clip
        self.scale = scale
        self.norm: Tensor | None = None
        self._shown: weakref.ref[NormOfStep] | None = None
        self._seen = [(weakref.ref(grad), grad._version) for grad in outermost_gradients(optimizer)]

    def still_wanted(self) -> bool:
        """Whether the gradients are those that were to be clipped.

        Raises:
            RuntimeError: some are and others are not, or somebody has written to them.
        """
        optimizer = self.optimizer()
        grads = outermost_gradients(optimizer)
        if not grads or not self._seen:
            return len(grads) == len(self._seen)
        same = [seen() is grad for (seen, _), grad in zip(self._seen, grads, strict=True)]
        if not any(same):
            return False
        if not all(same):
            raise RuntimeError(self._of_others())
        if any(grad._version != version for (_, version), grad in zip(self._seen, grads, strict=True)):
            raise RuntimeError(
                f"{type(optimizer).__name__} is to clip gradients that somebody has written to since it was told to, "
                "so they would be clipped to something else; expected the step right after the clipping, and every "
                "backward pass before it"
            )
        return True

    def check_gradients(self) -> bool:
        """Before the step: whether there are gradients to clip.

        Raises:
            RuntimeError: they are not those that were to be clipped, or somebody has written to them.
        """
        if self.still_wanted():
            return True
        if outermost_gradients(self.optimizer()):
            raise RuntimeError(self._of_others())
        return False

    def _of_others(self) -> str:
        return (
            f"{type(self.optimizer()).__name__} was told to clip other gradients than it has now; expected the step "
            "right after the clipping, or zero_grad() of the optimizer where no step follows on it"
        )

    def find_norm(self) -> Tensor:
        """The norm before the step. Raises RuntimeError where that cannot be."""
        if self.norm is None:
            optimizer = self.optimizer()
            if optimizer is None or not self.still_wanted():
                raise RuntimeError(
                    "the norm of these gradients was not found before they were thrown away; expected a step, or a "
                    "look at the norm, first"
                )
            if optimizer._shards.domains is not None:
                raise RuntimeError(
                    "the norm of gradients that have parts in other processes is found in the step; expected a step "
                    "before anybody looks at it"
                )
            assert isinstance(self.clip, NormClip)
            clip = replace(self.clip, error_if_nonfinite=False)  # an error of the step, and none if a scaler skips it
            request = StepRequest(self.scale, clip=clip)
            totals = optimizer._served("begin", request)
            try:
                pairs = optimizer._shards.added_up(totals, optimizer._device, request.norm_type)
                norm = conclude(request, pairs, optimizer._device).norm
            finally:
                optimizer._chosen_backend().abandon()
            assert norm is not None
            self.norm = norm.to(report_dtype(optimizer.param_groups))
        return self.norm

    def unscaled(self) -> None:
        """The gradients were divided by the scale, by somebody who had asked ``still_wanted()`` before."""
        self.scale = None
        self._seen = [(weakref.ref(grad), grad._version) for grad in outermost_gradients(self.optimizer())]

    def clip_now(self) -> None:
        """Do to the gradients what the step was to do to them, but do not divide them by the scale."""
        optimizer = self.optimizer()
        if optimizer is None or not self.still_wanted():
            return
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        if isinstance(self.clip, ValueClip):
            bound = self.clip.clip_value * (1.0 if self.scale is None else float(self.scale))
            for param in params:
                overflow = None if self.scale is None else param.grad.isinf()  # for the scaler to find
                param.grad.clamp_(-bound, bound)
                if overflow is not None:
                    param.grad.masked_fill_(overflow, math.inf)
        else:
            norm = self.find_norm()
            if self.clip.error_if_nonfinite and self.scale is None and not norm.isfinite():
                raise RuntimeError(f"The total norm of the gradients is {float(norm)}, so they cannot be clipped to it")
            coefficient = clip_coefficient(norm, self.clip.max_norm)
            for param in params:
                param.grad.mul_(coefficient.to(param.grad.device))

    def stepped(self, report: StepReport) -> None:
        """The step was made."""
        if self.norm is None:
            self.norm = report.grad_norm
        if self._shown is not None and (shown := self._shown()) is not None:
            shown.found()

    def dropped(self) -> None:
        """There will be no step. Who has the norm may yet look at it, so it is found while that is possible."""
        if self._shown is not None and self._shown() is not None:
            with contextlib.suppress(RuntimeError):  # raised again by the look
                self.find_norm()

    def shown(self) -> NormOfStep:
        """The norm, for whoever told the optimizer to clip."""
        optimizer = self.optimizer()
        norm = torch.full((), math.nan, device=None if optimizer is None else optimizer._device).as_subclass(NormOfStep)
        norm._of = self
        self._shown = weakref.ref(norm)
        return norm


def first_gradient(optimizer: Any) -> Tensor | None:
    """The gradient of the first parameter that has one."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                return param.grad
    return None


def outermost_gradients(optimizer: Any) -> tuple[Tensor, ...]:
    """The first and the last gradient, which may be the same; () without any, or without an optimizer."""
    first = None if optimizer is None else first_gradient(optimizer)
    if first is None:
        return ()
    for group in reversed(optimizer.param_groups):
        for param in reversed(group["params"]):
            if param.grad is not None:
                return first, param.grad
    return first, first


class NormOfStep(Tensor):
    """The norm that the next step finds: a 0-dim tensor for whoever does something with it.

    Once found, it is a plain tensor. Until then its memory is NaN, which is what those see who do not ask a subclass:
    collectives, and ``torch.tensor(norm)``.
    """

    _of: NextStep

    def found(self) -> Tensor:
        """The norm. This becomes a plain tensor; the report of the step has its own."""
        found = self._of.find_norm().clone()
        with torch._C.DisableTorchFunctionSubclass():
            self.data = found
        self._of._shown = None
        del self._of
        self.__class__ = Tensor  # type: ignore[assignment]  # some go by the name of the class, such as wandb
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(NormOfStep, lambda norm: norm.found(), (args, kwargs or {}))
        return func(*args, **kwargs)


def clip_now(optimizer: FusedOptimizer) -> None:
    """Clip what the next step was to clip, if it is any, before somebody else reads or writes these gradients."""
    shared = optimizer._shared
    if shared.next is not None:
        shared.next.clip_now()
        shared.next = None


def clip_next_step(optimizer: FusedOptimizer, clip: NormClip | ValueClip, scale: Tensor | None = None) -> Tensor | None:
    """Clip in the next step of the optimizer, and only there: see Note [Clipping the next step].

    Args:
        optimizer: a fused one without ``clip_grad`` of its own.
        clip: as validated by :func:`fusedopt.rules.parse_clip_grad`.
        scale: what a loss scaler multiplied the gradients with, if they are not unscaled yet.

    Returns:
        The norm of the unscaled gradients before clipping, which is known after the step; None for clipping by value.

    Raises:
        ValueError: the optimizer has ``clip_grad`` of its own.
        RuntimeError: clipped before without a step, and gradients were written to since.
    """
    shared = optimizer._shared
    if shared.clip is not None:
        raise ValueError(
            f"the trainer clips, and {type(optimizer).__name__} has clip_grad={optimizer.clip_grad} of its own; "
            "expected one of both"
        )
    clip_now(optimizer)
    step = shared.next = NextStep(optimizer, clip, scale)
    return step.shown() if isinstance(clip, NormClip) else None
