"""Step counts: what counts as one, and where a count lives that torch's state has no place for."""

from __future__ import annotations

import math
import numbers
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..messages import local_of

__all__ = ["HiddenCounts", "count_problem", "fit_count", "fit_problem", "new_count"]

#: From here on float32 cannot count by ones.
_FLOAT32_LIMIT = 2**24


def new_count(value: float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A 0-dim count of ``value`` steps: float64 under a float64 default dtype, as torch's; it waits for no device."""
    if dtype not in (torch.float32, torch.float64):
        large = value >= _FLOAT32_LIMIT or torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if large else torch.float32
    return torch.full((), float(value), dtype=dtype, device=device)


def count_problem(value: Any, *, read: bool = True) -> str | None:
    """Why ``value`` is no count of steps, as the end of a sentence, or None.

    Args:
        value: what stands at ``step``.
        read: also read a tensor, for which a host waits for a device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            return f"is a tensor of shape {tuple(value.shape)}; expected one count >= 0"
        if value.is_complex() or value.dtype == torch.bool or value.is_quantized:
            return f"has dtype {value.dtype}; expected a number >= 0"
        if not read:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return f"is {value!r}; expected a number >= 0"
    number = float(value)
    if not (math.isfinite(number) and number >= 0 and number.is_integer()):
        return f"is {number:g}; expected a count >= 0"
    return None


def fit_problem(step: Tensor, device: torch.device, *, integers: bool) -> str | None:
    """Why :func:`fit_count` cannot make ``step`` fit, as the end of a sentence, or None."""
    if _fits(step, device, integers) or step.device.type != "cpu" or not step.is_shared():
        return None
    return (
        f"is {step.dtype} on {step.device} and in shared memory, where this backend cannot count for a parameter on "
        f"{device}: make it a float32 tensor there"
    )


def fit_count(step: Tensor, device: torch.device, *, integers: bool) -> None:
    """Make ``step`` a count that a backend can keep. It stays the same tensor object.

    Note [Counts are not copied]: processes that train one model in shared memory (A3C) share its step counts, too. One
    that is replaced by a tensor of our own would count this process's steps alone, without a word. So a count of one
    element is used as it lies, in any shape; another dtype or device is changed in place; and what cannot be changed
    without taking it from the others is refused.

    Args:
        step: a tensor that :func:`count_problem` and :func:`fit_problem` had nothing against.
        device: the parameter's.
        integers: whether the backend counts in int64, too.
    """
    if not _fits(step, device, integers):
        with torch.no_grad():
            step.data = new_count(step.item(), device, step.dtype).reshape(step.shape)


def _fits(step: Tensor, device: torch.device, integers: bool) -> bool:
    known = (torch.float32, torch.float64, torch.int64) if integers else (torch.float32, torch.float64)
    return step.device == device and step.dtype in known


def _let_go(count: Tensor) -> None:
    """Called when nothing needs the count any more, until when it was an argument that waited."""


class HiddenCounts(dict[Tensor, tuple[Tensor, "weakref.ref[Tensor]"]]):
    """The step counts of a rule that torch keeps none for, by parameter; the plan reads them, see csrc/plan/states.h.

    Note [Hidden counts]: SGD has to know of each parameter whether its momentum buffer is real yet, on the device,
    where a step may have been skipped. Whoever walks ``optimizer.state`` expects torch's keys there
    (``torch.distributed.checkpoint`` loads no others), so the count is kept apart. It is the count of one tensor, the
    rule's first column, in whatever form it is kept, or the first that is carried where the rule has none (a master,
    an average), which a weak reference names: when that was replaced, the count is made up anew, and when its parameter
    has left the optimizer's state, it goes as well, and with it the last reference to the parameter.

    Args:
        optimizer: whose counts they are; its ``state`` is looked at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__()
        self._optimizer = weakref.ref(optimizer)

    def put(self, param: Tensor, column: Tensor, count: Tensor) -> None:
        """Let ``count`` be that of ``column``, the first of ``param``."""
        own, optimizer = weakref.ref(self), self._optimizer

        def forget(gone: Any) -> None:
            counts, holder = own(), optimizer()
            entry = None if counts is None else counts.get(param)
            if entry is not None and entry[1] is gone and (holder is None or param not in holder.state):
                del counts[param]  # type: ignore[union-attr]

        self[param] = count, weakref.ref(column, forget)
        # Work on a device, or a graph captured there, may outlive the optimizer; what it works on is kept alive by
        # whoever keeps the state, and so has to be the count.
        weakref.finalize(column, _let_go, count).atexit = False

    def of(self, param: Tensor, column: Tensor | None) -> Tensor | None:
        """The count of ``column``, or None when it has none."""
        entry = self.get(param)
        return entry[0] if entry is not None and column is not None and entry[1]() is column else None

    def settle(self, param: Tensor, column: Tensor, *, created: bool, begins_as_zeros: bool = True) -> Tensor:
        """The count of ``column``, made up where it has none.

        A column that was just created has taken no step. One that comes from elsewhere is real; but zeros that took the
        place of a column without a step are that column, moved to another device, say. What does not begin as zeros
        cannot tell, and keeps the count of what was there before.
        """
        count = None if created else self.of(param, column)
        if count is None or count.device != param.device:
            value = 0.0
            if not created:
                before = self.get(param)
                value = 1.0 if before is None else float(before[0])
                if value == 0 and begins_as_zeros and bool(local_of(column).any()):
                    value = 1.0
            count = new_count(value, param.device)
            self.put(param, column, count)
        return count

    def of_entry(self, param: Tensor, entry: Mapping[str, Any]) -> Tensor | None:
        """The count of whichever of a parameter's states has it, or None."""
        found = (self.of(param, value) for value in entry.values() if isinstance(value, Tensor))
        return next((count for count in found if count is not None), None)

    def known(self, state: Mapping[Tensor, Mapping[str, Any]]) -> dict[Tensor, Tensor]:
        """Counts by parameter, in the form that is pickled."""
        pairs = ((param, self.of_entry(param, state.get(param, {}))) for param in self)
        return {param: count for param, count in pairs if count is not None}
