"""accelerate: unscaling and clipping by an ``Accelerator`` become part of the step of its fused optimizers.

    accelerator = fuse(Accelerator(mixed_precision="fp16"))
    model, optimizer = accelerator.prepare(model, fusedopt.FusedAdamW(model.parameters()))

Nothing else of the training loop changes. See docs/trainers.md.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState

from ..messages.extras import require
from ..optimizers import FusedOptimizer
from ..optimizers.next_step import clip_next_step, clip_now, first_gradient
from ..rules import NormClip, ValueClip
from .replaced import replace_methods, restore_methods
from .scalers import give_scaler_back, scale_of_gradients, take_scaler

__all__ = ["FusedAcceleratedOptimizer", "fuse", "unfuse"]

_accelerate: Any = require("accelerate", "accelerate")
_optimizer: Any = require("accelerate.optimizer", "accelerate")

#: Where each process has whole gradients when it clips. FSDP2 comes on top: the step asks the other processes there.
_SERVED = tuple(_accelerate.DistributedType(name) for name in ("NO", "MULTI_CPU", "MULTI_GPU"))

_PARAMS = operator.itemgetter("params")


def fuse(accelerator: Any) -> Any:
    """Let the steps of the accelerator's fused optimizers unscale and clip.

    Call it before or after ``prepare``, once or more often. ``accelerator.clip_grad_norm_`` and ``clip_grad_value_``
    then only note what the next step has to do, if the parameters with gradients are exactly those of one prepared
    fused optimizer; anything else, such as a part of them, is clipped as accelerate does it. The norm that is returned
    is known after the step; reading it before costs a pass over the gradients. ``step_was_skipped`` is right after an
    overflow, so that prepared schedulers wait.

    Args:
        accelerator: an ``accelerate.Accelerator``; its optimizers that are not fused are left alone.

    Returns:
        The accelerator.

    Raises:
        TypeError: it is no Accelerator.
    """
    if not isinstance(accelerator, _accelerate.Accelerator):
        raise TypeError(f"fuse() takes an accelerate.Accelerator; got {type(accelerator).__name__}")
    replaced = _replaced(accelerator)
    if replaced is None:
        replaced = accelerator._fusedopt = _Replaced(accelerator)
    replaced.adopt()
    return accelerator


def unfuse(accelerator: Any) -> Any:
    """Undo :func:`fuse`. Gradients that are to be clipped in the next step are clipped now.

    Args:
        accelerator: an ``accelerate.Accelerator``, fused or not.

    Returns:
        The accelerator.
    """
    replaced = _replaced(accelerator)
    if replaced is not None:
        replaced.undo()
        del accelerator._fusedopt
    return accelerator


def _replaced(accelerator: Any) -> _Replaced | None:
    return vars(accelerator).get("_fusedopt")


class FusedAcceleratedOptimizer(_optimizer.AcceleratedOptimizer):
    """``AcceleratedOptimizer`` around a fused optimizer, whose step is called after an overflow, too, and skips itself.

    accelerate takes a step that was called for one that was made. It also updates the loss scale in the step of each
    optimizer, and with that the scaler forgets which of the others it has unscaled.

    Args:
        optimizer: the fused optimizer.
        device_placement: see ``AcceleratedOptimizer``.
        scaler: the loss scaler of the accelerator, or None.
    """

    #: What the scaler knew when the accelerator unscaled the gradients, and which these were.
    _unscaled: tuple[Any, weakref.ref[Tensor], int] | None = None

    def step(self, closure: Any = None) -> None:
        """As ``AcceleratedOptimizer.step``."""
        # A scheduler keeps this function, and calls it when the class is accelerate's again.
        known = self.__dict__.pop("_unscaled", None) if self.gradient_state.sync_gradients else None
        if known is not None:
            record, seen, version = known
            grad = first_gradient(self.optimizer)
            unchanged = grad is not None and grad is seen() and grad._version == version
            if unchanged and record["stage"] is OptState.UNSCALED:
                self.scaler._per_optimizer_states.setdefault(id(self.optimizer), record)
        _optimizer.AcceleratedOptimizer.step(self, closure)

    def zero_grad(self, set_to_none: Any = None) -> None:
        """As ``AcceleratedOptimizer.zero_grad``."""
        self.__dict__.pop("_unscaled", None)
        super().zero_grad(set_to_none)

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped because of an overflow. On a GPU this waits for the step."""
        if self._is_overflow or self.scaler is None or not isinstance(self.optimizer, FusedOptimizer):
            return bool(self._is_overflow)
        report = self.optimizer.last_step
        return report is not None and report.found_inf is not None and bool(report.found_inf)


class _Replaced:
    """What stands in the place of an accelerator's methods, and how to undo that."""

    _METHODS = ("clip_grad_norm_", "clip_grad_value_", "unscale_gradients", "prepare_optimizer")

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.active = True
        self._touched: list[Any] | None = None  # while accelerate clips: the fused optimizers with such parameters
        self._stock = {name: getattr(accelerator, name) for name in self._METHODS}
        self._adopted: weakref.WeakSet[Any] = weakref.WeakSet()
        self._scalers: weakref.WeakSet[Any] = weakref.WeakSet()
        replace_methods(accelerator, {name: getattr(self, name) for name in self._METHODS})

    def adopt(self) -> None:
        """Take over the scaler and the optimizers that are there."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            take_scaler(scaler)
            self._scalers.add(scaler)
        for outer in self.accelerator._optimizers:
            if type(outer) is _optimizer.AcceleratedOptimizer and isinstance(outer.optimizer, FusedOptimizer):
                outer.__class__ = FusedAcceleratedOptimizer
                self._adopted.add(outer)

    def undo(self) -> None:
        self._clip_now(self.accelerator._optimizers)
        self.active = False  # whoever has replaced our methods by others that call them gets the stock ones now
        restore_methods(self.accelerator)
        for outer in self._adopted:
            if type(outer) is FusedAcceleratedOptimizer:
                outer.__class__ = _optimizer.AcceleratedOptimizer
        for scaler in self._scalers:
            give_scaler_back(scaler)

    # ---- the methods

    def prepare_optimizer(self, optimizer: Any, device_placement: Any = None) -> Any:
        """As ``Accelerator.prepare_optimizer``."""
        outer = self._stock["prepare_optimizer"](optimizer, device_placement)
        if self.active:
            self.adopt()
        return outer

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """As ``Accelerator.unscale_gradients``. Gradients that are to be clipped in the next step are clipped now."""
        if optimizer is None:
            optimizer = self.accelerator._optimizers
            if self._touched is not None:  # called by accelerate's own clipping, which would unscale all of them
                optimizer = [each for each in optimizer if not isinstance(inner(each), FusedOptimizer)]
                optimizer += self._touched
        elif not isinstance(optimizer, (list, tuple)):
            optimizer = [optimizer]
        self._clip_now(optimizer)
        self._stock["unscale_gradients"](optimizer)
        self._note_unscaled(optimizer)

    def clip_grad_norm_(self, parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:
        """As ``Accelerator.clip_grad_norm_``; with ``max_norm=inf`` it only reports the norm."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizer = self._owner(parameters)
        clip = None if optimizer is None else _norm_clip(max_norm, norm_type)
        if optimizer is None or clip is None or (optimizer.clip_grad is not None and clip.max_norm == math.inf):
            return self._clip_stock("clip_grad_norm_", parameters, max_norm, norm_type)
        return clip_next_step(optimizer, clip, scale_of_gradients(self.accelerator.scaler, optimizer))

    def clip_grad_value_(self, parameters: Any, clip_value: Any) -> None:
        """As ``Accelerator.clip_grad_value_``."""
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizer = self._owner(parameters)
        clip = None if optimizer is None else _value_clip(clip_value)
        if optimizer is None or clip is None:
            self._clip_stock("clip_grad_value_", parameters, clip_value)
        else:
            clip_next_step(optimizer, clip, scale_of_gradients(self.accelerator.scaler, optimizer))

    # ---- what they ask

    def _owner(self, parameters: list[Tensor]) -> FusedOptimizer | None:
        """The fused optimizer that is to step next and whose parameters with gradients are exactly these, if one is."""
        accelerator = self.accelerator
        if not self.active or not accelerator.sync_gradients:  # else accelerate's step does nothing
            return None
        if not serves(accelerator):
            return None
        found, ids = None, tuple(map(id, parameters))
        for outer in accelerator._optimizers:
            optimizer = inner(outer)
            own = [*itertools.chain.from_iterable(map(_PARAMS, optimizer.param_groups))]
            difference = _difference(ids, tuple(map(id, own)))
            if difference is None:
                return None
            extra, missing, shared = difference
            if not shared or optimizer is found:
                continue
            if (
                found is not None  # two could step these parameters
                or not isinstance(optimizer, FusedOptimizer)
                or any(parameters[i].grad is not None for i in extra)
                or any(own[i].grad is not None for i in missing)
                or outer.scaler is not accelerator.scaler  # else its step would not unscale
            ):
                return None
            found = optimizer
        return None if found is None or first_gradient(found) is None else found

    def _clip_stock(self, name: str, parameters: list[Tensor], *args: Any) -> Any:
        """Clip as accelerate does. Fused optimizers that have none of these parameters are not unscaled for it."""
        given = set(map(id, parameters))
        fused = [outer for outer in self.accelerator._optimizers if isinstance(inner(outer), FusedOptimizer)]
        touched = [
            outer
            for outer in fused
            if any(id(param) in given for group in outer.param_groups for param in _PARAMS(group))
        ]
        self._touched = touched  # unscale_gradients() comes first, and clips what they were to clip
        try:
            return self._stock[name](parameters, *args)
        finally:
            self._touched = None
            self._note_unscaled(touched)

    def _note_unscaled(self, outers: Iterable[Any]) -> None:
        """Note which gradients the scaler has unscaled, see FusedAcceleratedOptimizer."""
        for outer in outers:
            if isinstance(outer, FusedAcceleratedOptimizer) and outer.scaler is not None:
                record = outer.scaler._per_optimizer_states.get(id(outer.optimizer))
                grad = first_gradient(outer.optimizer)
                outer._unscaled = None
                if record is not None and grad is not None:
                    outer._unscaled = record, weakref.ref(grad), grad._version

    def _clip_now(self, outers: Iterable[Any]) -> None:
        for optimizer in map(inner, outers):
            if isinstance(optimizer, FusedOptimizer):
                clip_now(optimizer)


def inner(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped; any other object itself."""
    while isinstance(optimizer, _optimizer.AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def hold(outer: Any, optimizer: Any) -> None:
    """Put another optimizer into accelerate's wrapper, between two steps."""
    while isinstance(outer.optimizer, _optimizer.AcceleratedOptimizer):
        outer = outer.optimizer
    outer.__setstate__({"optimizer": optimizer})


def serves(accelerator: Any) -> bool:
    """Whether each process has what it takes to clip in the step."""
    return accelerator.distributed_type in _SERVED or accelerator.is_fsdp2


@functools.lru_cache(maxsize=64)
def _difference(given: tuple[int, ...], own: tuple[int, ...]) -> tuple[list[int], list[int], bool] | None:
    """Compare ids of parameters: where either has what the other has not, and whether they have any in common.

    None where one is given twice. Every step asks the same, and the ids of objects that are alive say it all.
    """
    first, second = set(given), set(own)
    if len(first) != len(given):
        return None
    extra = [i for i, each in enumerate(given) if each not in second]
    missing = [i for i, each in enumerate(own) if each not in first]
    return extra, missing, len(extra) < len(given)


def _norm_clip(max_norm: Any, norm_type: Any) -> NormClip | None:
    """None for what torch's function takes and a step does not, such as a bound of 0."""
    try:
        return NormClip(max_norm, norm_type) if isinstance(max_norm, Tensor) else _known_norm_clip(max_norm, norm_type)
    except (TypeError, ValueError):
        return None


_known_norm_clip = functools.lru_cache(maxsize=64, typed=True)(NormClip)


def _value_clip(clip_value: Any) -> ValueClip | None:
    try:
        return ValueClip(clip_value)
    except (TypeError, ValueError):
        return None
