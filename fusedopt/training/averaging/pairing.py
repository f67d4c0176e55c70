"""Pairs the tensors of an averaged model with its source's, in lists for multi-tensor calls."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ...messages import is_dtensor, local_of
from ..unwrapping import named_modules, named_parameters

__all__ = ["Group", "Pairing"]

_kind = attrgetter("dtype", "device", "shape")
_END = object()


class Group:
    """Pairs of tensors; the average's share one device and dtype, and the source's do too.

    Attributes:
        averaged: tensors of the average.
        source: their partners, in the same order.
    """

    def __init__(self) -> None:
        self.averaged: list[Tensor] = []
        self.source: list[Tensor] = []
        self._staged: list[Tensor] | None = None

    def copy(self) -> None:
        """Copy the source to the average."""
        torch._foreach_copy_(self.averaged, self.source)

    def fetch(self) -> list[Tensor]:
        """The source on the average's device; from another device it is copied to memory that is kept for it."""
        if self.source[0].device == self.averaged[0].device:
            return self.source
        if self._staged is None:
            self._staged = [torch.empty_like(tensor) for tensor in self.averaged]
        torch._foreach_copy_(self._staged, self.source)
        return self._staged


class Pairing:
    """The tensors of an average and those of its source, matched by name.

    A tensor with several names counts once. A model makes its non-persistent buffers itself, so one without a partner
    of the same shape is left out.

    Args:
        average: the copy.
        model: its source, which is not kept alive by this.
        average_buffers: whether buffers are averaged; integer, bool and non-persistent buffers never are.

    Attributes:
        averages: the tensors to average.
        copies: the tensors to copy from the source.

    Raises:
        ValueError: a parameter or buffer is missing on one side, or has another shape or sharding there; the message
            names it.
    """

    def __init__(self, average: nn.Module, model: nn.Module, average_buffers: bool):
        modules = [*average.modules(), *model.modules()]
        tables: list[dict[str, Any]] = []
        for module in modules:
            tables += (module._parameters, module._buffers, module._modules)
        self._empty_tables = [table for table in tables if not table]
        self._tables = [table for table in tables if table]
        self._entries = [*chain.from_iterable(map(dict.values, self._tables)), _END]
        self._whole: list[Tensor] = []
        self._parts: list[Tensor] = []  # of DTensors, those of this process
        averages: dict[tuple[object, ...], Group] = {}
        copies: dict[tuple[object, ...], Group] = {}
        for kind, averaged, source in _match(_named_tensors(average), _named_tensors(model)):
            self._whole += (averaged, source)
            averaged, source = local_of(averaged), local_of(source)
            self._parts += (averaged, source)
            has_mean = averaged.is_floating_point() or averaged.is_complex()
            is_averaged = has_mean and (kind == "parameter" or (kind == "buffer" and average_buffers))
            key = (averaged.device, averaged.dtype, source.device, source.dtype)
            group = (averages if is_averaged else copies).setdefault(key, Group())
            group.averaged.append(averaged)
            group.source.append(source)
        self.averages = [*averages.values()]
        self.copies = [*copies.values()]
        groups = [*self.averages, *self.copies]
        self._averaged = [tensor for group in groups for tensor in group.averaged]
        self._source = [tensor for group in groups for tensor in group.source]
        self._kinds = [*map(_kind, self._averaged), *map(_kind, self._source)]

    def is_current(self) -> bool:
        """Whether both models still hold the same tensors with the same dtypes, devices and shapes."""
        entries = chain(chain.from_iterable(map(dict.values, self._tables)), (_END,))
        if any(self._empty_tables) or not all(map(is_, entries, self._entries)):
            return False
        if not all(map(is_, map(local_of, self._whole), self._parts)):
            return False
        return self._kinds == [*map(_kind, self._averaged), *map(_kind, self._source)]

    def source_values(self) -> list[Tensor]:
        """Copies of the source's tensors, for :meth:`write_source`."""
        values = [torch.empty_like(tensor, requires_grad=False) for tensor in self._source]
        if values:
            torch._foreach_copy_(values, self._source)
        return values

    def write_source(self, values: list[Tensor] | None = None) -> None:
        """Write ``values`` to the source; by default, the average's values."""
        if self._source:
            torch._foreach_copy_(self._source, self._averaged if values is None else values)


def _named_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """(kind, tensor) by name; kinds: ``'parameter'``, ``'buffer'``, ``'unsaved buffer'`` (a non-persistent one)."""
    found: dict[str, tuple[str, Tensor]] = {
        name: ("parameter", param) for name, param in named_parameters(model, remove_duplicate=False)
    }
    for path, module in named_modules(model, remove_duplicate=False):
        for key, buffer in module._buffers.items():
            if buffer is not None:
                kind = "unsaved buffer" if key in module._non_persistent_buffers_set else "buffer"
                found[f"{path}.{key}" if path else key] = (kind, buffer)
    return found


def _match(
    averaged: dict[str, tuple[str, Tensor]], source: dict[str, tuple[str, Tensor]]
) -> list[tuple[str, Tensor, Tensor]]:
    """(kind, averaged tensor, source tensor) of each pair."""
    pairs: dict[int, tuple[str, str, Tensor, Tensor]] = {}
    for name in {**averaged, **source}:
        kind = (averaged.get(name) or source[name])[0]
        if name in averaged and name in source and averaged[name][1].shape == source[name][1].shape:
            mine, theirs = averaged[name][1], source[name][1]
            if _sharding(mine) != _sharding(theirs):
                raise ValueError(
                    f"{kind} {name!r} is {_told(theirs)} in the model but {_told(mine)} in its average; make the "
                    "average after the model is sharded"
                )
            first, *_, partner = pairs.setdefault(id(mine), (name, kind, mine, theirs))
            if partner is not theirs:
                raise ValueError(f"{first!r} and {name!r} are one {kind} in the average but two in the model")
        elif kind != "unsaved buffer":
            raise ValueError(_misfit(name, kind, averaged, source))
    return [pair[1:] for pair in pairs.values()]


def _sharding(tensor: Any) -> Any:
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _told(tensor: Any) -> str:
    return f"sharded as {tensor.placements}" if is_dtensor(tensor) else "whole"


def _misfit(
    name: str, kind: str, averaged: dict[str, tuple[str, Tensor]], source: dict[str, tuple[str, Tensor]]
) -> str:
    if name not in averaged:
        return f"the average has no {kind} {name!r}, which the model has"
    if name not in source:
        hint = " (it is wrapped: pass model.module)" if f"module.{name}" in source else ""
        return f"the model has no {kind} {name!r}, which its average has{hint}"
    shapes = [tuple(tensors[name][1].shape) for tensors in (averaged, source)]
    return f"{kind} {name!r} has shape {shapes[1]} in the model but {shapes[0]} in its average"
