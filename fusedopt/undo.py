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


@contextlib.contextmanager
def unchanged_on_error(*holders: Any, finally_undo: Callable[[], object] | None = None) -> Iterator[None]:
    """``with unchanged_on_error(optimizer):`` an error inside leaves the optimizer as it was.

    Args:
        holders: optimizers and optimizer wrappers, with their groups; modules, with their parameters and buffers;
            lists; dicts, such as groups; other objects, with their attributes. None is ignored.
        finally_undo: called last after an error, to restore what is recorded elsewhere.
    """
    undo: list[Callable[[], object]] = [] if finally_undo is None else [finally_undo]
    seen: set[int] = set()
    for holder in holders:
        _note(holder, undo, seen)
    try:
        yield
    except BaseException:
        for each in reversed(undo):
            each()
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


def _note(holder: Any, undo: list[Callable[[], object]], seen: set[int]) -> None:
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


def _note_dict(held: dict[Any, Any], undo: list[Callable[[], object]]) -> None:
    undo.append(_put_items_back(held))
    for key, value in held.items():
        if key != "params":  # a group's parameters are not settings
            for tensor in _tensors(value):
                _note_value(tensor, undo)
        if isinstance(value, list):
            _note_list(value, undo)


def _note_list(held: list[Any], undo: list[Callable[[], object]]) -> None:
    before = list(held)

    def put_back() -> None:
        held[:] = before

    undo.append(put_back)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [each for each in value if isinstance(each, Tensor)] if isinstance(value, (list, tuple)) else []


def _note_value(tensor: Tensor, undo: list[Callable[[], object]]) -> None:
    before, version = tensor.detach().clone(), tensor._version

    def put_back() -> None:
        if tensor._version != version:
            with torch.no_grad():
                tensor.copy_(before)

    undo.append(put_back)


def _note_attributes(holder: Any, undo: list[Callable[[], object]]) -> None:
    own = vars(holder)
    undo.append(_put_items_back(own))
    for value in own.values():
        if isinstance(value, list):
            _note_list(value, undo)
        elif isinstance(value, dict):  # one level: hooks, defaults, a module's buffers
            undo.append(_put_items_back(value))


def _note_slots(holder: Any, undo: list[Callable[[], object]]) -> None:
    before = {name: getattr(holder, name) for name in holder.__slots__}

    def put_back() -> None:
        for name, value in before.items():
            setattr(holder, name, value)

    undo.append(put_back)


def _put_items_back(held: dict[Any, Any]) -> Callable[[], None]:
    before = dict(held)

    def put_back() -> None:
        held.clear()
        held.update(before)

    return put_back


def _note_parameter(param: nn.Parameter, undo: list[Callable[[], object]]) -> None:
    if nn.parameter.is_lazy(param):
        return
    data, grad, requires_grad = param.data, param.grad, param.requires_grad

    def put_back() -> None:
        if param.data.device != data.device or param.data.data_ptr() != data.data_ptr():
            param.data = data
        param.requires_grad_(requires_grad)
        param.grad = grad

    undo.append(put_back)
