"""A call that fails changes nothing: the objects of its caller are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["parameter_groups", "unchanged_on_error"]

# Note [What fails changes nothing]
# A constructor that writes to its arguments (an optimizer's groups or clip_grad, a model's device) may then fail:
# in its own code, in a subclass, or because the next entry of a list is rejected. A user who fixes the mistake and
# calls it again must find everything as it was. So all of them run inside unchanged_on_error(...), which records the
# state of the arguments, one level deep, and restores it on an error.


#: A function and its arguments: one object for each thing that is noted, since there may be many thousands.
_Undo = tuple[Any, ...]
#: Types of settings in which there is nothing to restore.
_FIXED = frozenset({float, int, bool, str, type(None)})


@contextlib.contextmanager
def unchanged_on_error(*holders: Any, finally_undo: Callable[[], object] | None = None) -> Iterator[None]:
    """``with unchanged_on_error(optimizer):`` an error inside leaves the optimizer as it was.

    Args:
        holders: optimizers and optimizer wrappers, with their groups; modules, with their parameters and buffers;
            lists; dicts, such as groups; other objects, with their attributes. None is ignored.
        finally_undo: called last after an error, to restore what is recorded elsewhere.
    """
    undo: list[_Undo] = [] if finally_undo is None else [(finally_undo,)]
    seen: set[int] = set()
    for holder in holders:
        _note(holder, undo, seen)
    try:
        yield
    except BaseException:
        for restore, *args in reversed(undo):
            restore(*args)
        raise


def parameter_groups(params: Any) -> list[dict[str, Any]]:
    """The groups in an optimizer's first argument, with iterators of parameters in them turned into lists.

    A group can then be used again after a failure. An exhausted generator is left as it is.
    """
    groups = [each for each in params if isinstance(each, dict)] if isinstance(params, (list, tuple)) else []
    for group in groups:
        own = group.get("params")
        if isinstance(own, Iterator) and getattr(own, "gi_frame", own) is not None:
            group["params"] = list(own)
    return groups


def _note(holder: Any, undo: list[_Undo], seen: set[int]) -> None:
    if holder is None or isinstance(holder, Tensor) or id(holder) in seen:
        return
    seen.add(id(holder))
    if isinstance(holder, dict):
        _note_dict(holder, undo)
    elif isinstance(holder, list):
        _note_list(holder, undo)
    elif isinstance(holder, nn.Module):
        for module in holder.modules():
            _note_attributes(module, undo)
        for param in holder.parameters():
            _note_parameter(param, undo)
    elif hasattr(holder, "__dict__"):
        _note_attributes(holder, undo)
        if isinstance(holder, torch.optim.Optimizer):
            if (shared := getattr(holder, "_shared", None)) is not None:  # a fused optimizer
                _note_slots(shared, undo)
            for group in holder.param_groups:
                _note(group, undo, seen)
        elif isinstance(getattr(holder, "optimizer", None), torch.optim.Optimizer):  # a wrapper or a scheduler
            _note(holder.optimizer, undo, seen)
            _note(getattr(holder, "base_param_settings", None), undo, seen)
        elif isinstance(wrappers := getattr(holder, "optim_wrappers", None), dict):  # an OptimWrapperDict
            for wrapper in wrappers.values():
                _note(wrapper, undo, seen)


def _note_dict(held: dict[Any, Any], undo: list[_Undo]) -> None:
    undo.append((_put_items_back, held, dict(held)))
    for key, value in held.items():
        if type(value) in _FIXED:
            continue
        if key != "params":  # a group's parameters are not settings
            for tensor in _tensors(value):
                undo.append((_put_value_back, tensor, tensor.detach().clone(), tensor._version))
        if isinstance(value, list):
            _note_list(value, undo)


def _note_list(held: list[Any], undo: list[_Undo]) -> None:
    undo.append((_put_entries_back, held, list(held)))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, (list, tuple)) else []


def _note_attributes(holder: Any, undo: list[_Undo]) -> None:
    own = vars(holder)
    undo.append((_put_items_back, own, dict(own)))
    for value in own.values():
        if isinstance(value, list):
            _note_list(value, undo)
        elif isinstance(value, dict):  # one level: hooks, defaults, a module's buffers
            undo.append((_put_items_back, value, dict(value)))


def _note_slots(holder: Any, undo: list[_Undo]) -> None:
    undo.append((_put_slots_back, holder, {name: getattr(holder, name) for name in holder.__slots__}))


def _note_parameter(param: nn.Parameter, undo: list[_Undo]) -> None:
    if not nn.parameter.is_lazy(param):
        undo.append((_put_parameter_back, param, param.data, param.grad, param.requires_grad))


def _put_items_back(held: dict[Any, Any], before: dict[Any, Any]) -> None:
    held.clear()
    held.update(before)


def _put_entries_back(held: list[Any], before: list[Any]) -> None:
    held[:] = before


def _put_value_back(tensor: Tensor, before: Tensor, version: int) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(before)


def _put_slots_back(holder: Any, before: dict[str, Any]) -> None:
    for name, value in before.items():
        setattr(holder, name, value)


def _put_parameter_back(param: nn.Parameter, data: Tensor, grad: Tensor | None, requires_grad: bool) -> None:
    if param.data.device != data.device or param.data.data_ptr() != data.data_ptr():
        param.data = data
    param.requires_grad_(requires_grad)
    param.grad = grad
