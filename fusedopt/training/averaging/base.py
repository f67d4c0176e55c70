"""BaseAveragedModel, the base of averaged models."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...messages import parse_dtype, plain, warn_caller
from ..sharding import has_shards
from ..unwrapping import bare_copy, fitted_state_dict, named_parameters, tensors_copy, unwrap
from .pairing import Group, Pairing

__all__ = ["BaseAveragedModel"]


class BaseAveragedModel(nn.Module):
    """A copy of a model whose parameters are a mean of the model's parameters at the updates.

    As ``mmengine.model.BaseAveragedModel``. An update is a fixed number of multi-tensor calls for each device and
    dtype, without synchronization. The copy is ``module``; calling the averaged model calls it.

    A subclass defines ``update_weight(steps)``, the weight w of the new value in ``average + w * (value - average)``;
    or, for any other mean, ``avg_func``, which averages one tensor.

    Args:
        model: the model to average. It is copied, without wrappers such as torch.compile's or DistributedDataParallel.
            Of a model with DTensors (``fully_shard``, tensor parallelism), each process averages its shards; the copy
            cannot be called then, but be put into the model with :meth:`applied_to`.
        interval: number of calls of :meth:`update_parameters` for each update, >= 1.
        device: device of the average; by default that of the model. If they differ, each update copies the model to
            extra memory of the average's size.
        update_buffers: average the buffers too. By default they are copied from the model at every call. Integer and
            bool buffers, such as counts, and non-persistent buffers are always copied.
        dtype: floating-point dtype of the average, or its name; by default the model's.

    Attributes:
        module: the averaged model itself.
        steps: number of calls of :meth:`update_parameters` so far, a 0-dim int64 buffer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``interval`` < 1, an unknown dtype, a ``device`` for a model with DTensors, or a model with
            parameters that have no shape yet.
    """

    steps: Tensor
    _pairings: weakref.WeakKeyDictionary[nn.Module, Pairing]
    _counted: tuple[Tensor | None, int, int]

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        dtype: torch.dtype | str | None = None,
    ):
        super().__init__()
        cls = type(self)
        if cls.update_weight is BaseAveragedModel.update_weight and cls.avg_func is BaseAveragedModel.avg_func:
            raise TypeError(f"{cls.__name__} has no formula: it must define update_weight or avg_func")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        interval = plain(interval)
        if isinstance(interval, bool) or not isinstance(interval, int):
            raise TypeError(f"interval must be an integer, got {interval!r}")
        if interval < 1:
            raise ValueError(f"Invalid interval: {interval}; expected an integer >= 1")
        if not isinstance(update_buffers, bool):
            raise TypeError(f"update_buffers must be True or False, got {update_buffers!r}")
        kept = parse_dtype(dtype)
        for name, param in named_parameters(model):
            if getattr(param, "_fsdp_flattened", False):
                raise ValueError(
                    f"parameter {name!r} is a shard of a FullyShardedDataParallel model, which is not averaged; make "
                    "the average before the model is sharded, and update it within summon_full_params(model)"
                )
            if nn.parameter.is_lazy(param):
                raise ValueError(f"parameter {name!r} has no shape yet: run the model once before it is averaged")
        sharded = has_shards(model.parameters())
        if sharded and device is not None:
            raise ValueError(f"device={device!r} cannot be set: the average of a sharded model is where its shards are")
        self.module = (tensors_copy if sharded else bare_copy)(model).requires_grad_(False)
        if device is not None:
            self.module.to(device)
        if kept is not None:
            self.module._apply(lambda tensor: tensor.to(kept) if tensor.is_floating_point() else tensor)
        else:
            _warn_of_low_precision(self.module)
        self.interval = interval
        self.update_buffers = update_buffers
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))
        self._forget()

    def update_weight(self, steps: int) -> float:
        """Weight of the new value at call number ``steps``, counted from 0; call 0 copies."""
        raise NotImplementedError

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Average one tensor in place. If a subclass defines this, it is called for each tensor."""
        averaged_param.lerp_(source_param, self.update_weight(steps))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``module``."""
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average from the model at every ``interval``-th call; count the call.

        The first call copies.

        Args:
            model: the constructor's model, or one with parameters and buffers of the same names and shapes; it may be
                compiled or in DistributedDataParallel.

        Raises:
            ValueError: a name or shape differs, or how a tensor is sharded; the message names it. Nothing has been
                changed then.
        """
        pairing = self._pair(model)
        steps = self._count()
        groups = pairing.copies
        if steps == 0:
            groups = pairing.averages + groups
        elif steps % self.interval == 0:
            self._average(pairing.averages, steps)
        for group in groups:
            group.copy()
        self.steps.add_(1)
        self._counted = self.steps, self.steps._version, steps + 1

    @torch.no_grad()
    def copy_parameters(self, model: nn.Module) -> None:
        """Copy the model's parameters and buffers. This does not count as an update.

        Raises:
            ValueError: as :meth:`update_parameters`.
        """
        pairing = self._pair(model)
        for group in pairing.averages + pairing.copies:
            group.copy()

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the model's buffers that are not averaged, which may have changed since the last update.

        Raises:
            ValueError: as :meth:`update_parameters`.
        """
        for group in self._pair(model).copies:
            group.copy()

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """``with average.applied_to(model):`` gives the model the average's parameters and buffers inside the block.

        Values are written to the model's own tensors, so its optimizer and other references stay valid. The model's
        values are kept meanwhile, which takes memory of the model's size.

        Raises:
            ValueError: as :meth:`update_parameters`.
        """
        pairing = self._pair(model)
        with torch.no_grad():
            own = pairing.source_values()
            pairing.write_source()
        try:
            yield model
        finally:
            with torch.no_grad():
                pairing.write_source(own)

    def torch_state_dict(self) -> dict[str, Any]:
        """The state for ``load_state_dict`` of ``torch.optim.swa_utils.AveragedModel``, with its ``n_averaged``.

        In the other direction, :meth:`load_state_dict` accepts a state of that class as it is.
        """
        state: dict[str, Any] = self.state_dict()
        steps = state.pop("steps")
        return {"n_averaged": (steps + self.interval - 1) // self.interval, **state}

    def _average(self, groups: list[Group], steps: int) -> None:
        if type(self).avg_func is not BaseAveragedModel.avg_func:
            for group in groups:
                for averaged, value in zip(group.averaged, group.fetch(), strict=True):
                    self.avg_func(averaged, value.to(averaged.dtype), steps)
            return
        weight = self.update_weight(steps)
        for group in groups:
            source = group.fetch()
            if source[0].dtype == group.averaged[0].dtype:
                torch._foreach_lerp_(group.averaged, source, weight)
            else:
                torch._foreach_add_(group.averaged, torch._foreach_sub(source, group.averaged), alpha=weight)

    def _pair(self, model: nn.Module) -> Pairing:
        model = unwrap(model)
        pairing = self._pairings.get(model)
        if pairing is None or not pairing.is_current():
            pairing = self._pairings[model] = Pairing(self.module, model, self.update_buffers)
        return pairing

    def _count(self) -> int:
        """``steps`` without a device sync, unless other code has written to it since the last call."""
        tensor, version, count = self._counted
        if tensor is not self.steps or version != self.steps._version:
            return int(self.steps)
        return count

    def _forget(self) -> None:
        self._pairings = weakref.WeakKeyDictionary()
        self._counted = None, 0, 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state may be from before Note [Unwrapping], with names of wrappers, or from torch's class.
        own = self.state_dict(prefix=prefix)
        fitted = fitted_state_dict({key: value for key, value in state_dict.items() if key.startswith(prefix)}, own)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if key not in fitted:
                del state_dict[key]
        state_dict.update(fitted)
        averaged = state_dict.pop(f"{prefix}n_averaged", None)
        if averaged is not None:  # from torch's class: the number of updates; the last one has just been made
            state_dict[f"{prefix}steps"] = ((averaged - 1) * self.interval + 1).clamp(min=0)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the average must not keep what is cached about its source.
        return {key: value for key, value in self.__dict__.items() if key not in ("_pairings", "_counted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def extra_repr(self) -> str:
        return f"interval={self.interval}, update_buffers={self.update_buffers}"


def _warn_of_low_precision(model: nn.Module) -> None:
    for dtype in {param.dtype for param in model.parameters()} & {torch.bfloat16, torch.float16}:
        name, share = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 4
        warn_caller(
            f"the average of {name} parameters is kept in {name} too: it stands still where an update would change a "
            f"value by less than {share:.1g} of it; pass dtype='float32', or dtype={name!r} if that is intended"
        )
