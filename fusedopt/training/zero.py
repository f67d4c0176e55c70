"""ZeroRedundancyOptimizer. Imported when it is looked up in the registry: torch's class takes seconds to import."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..backends import StepReport
from ..messages import (
    check_no_model,
    did_you_mean,
    plain_groups,
    plain_settings,
)
from ..optimizers.base import FusedOptimizer
from ..optimizers.known import Known, add_group, while_constructing
from ..optimizers.loading import read_state_dict
from ..rules import NormClip, ValueClip, clip_coefficient, norm_of, parse_clip_grad, total_of
from ..shards import add_up, refuse_norm_of_flat_shards
from ..undo import parameter_groups, unchanged_on_error
from .registry import OPTIMIZERS, accepted_arguments

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".torch.jit.* is deprecated", DeprecationWarning)  # torch's own use of it
    from torch.distributed.optim import ZeroRedundancyOptimizer as _ZeroRedundancyOptimizer

__all__ = ["ZeroRedundancyOptimizer"]


class ZeroRedundancyOptimizer(_ZeroRedundancyOptimizer):
    """Each process updates its share of the parameters and keeps its state; then all exchange their parameters.

    torch's class, for any registered optimizer; as ``mmengine.optim.ZeroRedundancyOptimizer``, which supports torch's
    optimizers only. Each process must have all gradients, as DistributedDataParallel provides them.

    Args:
        params: tensors or group dicts, the same in every process.
        optimizer_type: the optimizer of the share: a registered name, an import path or a class.
        clip_grad: clipping inside the step, see :func:`fusedopt.rules.parse_clip_grad`. The norm is over the gradients
            of all processes' shares.
        process_group: the processes, all of them by default.
        parameters_as_bucket_view: see ``torch.distributed.optim.ZeroRedundancyOptimizer``.
        kwargs: arguments of the optimizer.

    Attributes:
        optim: the optimizer of this process' share.

    Raises:
        KeyError: an unknown ``optimizer_type``.
        TypeError, ValueError: an argument is unknown to the optimizer, has the wrong type or is out of range.
    """

    _known: Known | None = None  # see Note [Groups while constructing]

    def __init__(
        self,
        params: ParamsT,
        optimizer_type: str | Callable[..., torch.optim.Optimizer],
        clip_grad: Mapping[str, Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        parameters_as_bucket_view: bool = False,
        **kwargs: Any,
    ):
        self._clip = parse_clip_grad(clip_grad)
        kwargs = plain_settings(kwargs)
        check_no_model(params)
        self._last_step: StepReport | None = None
        build = OPTIMIZERS.resolve(optimizer_type)
        if isinstance(params, Tensor):
            raise TypeError("params must be a list of tensors or group dicts, got a tensor")
        accepted = accepted_arguments(build)
        for key in kwargs:
            if accepted is not None and key not in accepted:
                known = {*accepted, "clip_grad", "process_group", "parameters_as_bucket_view"} - {"params"}
                name = getattr(build, "__name__", repr(build))
                raise TypeError(f"unexpected argument {key!r} for {name}; {did_you_mean(key, known)}")
        params = list(params)  # type: ignore[assignment]
        with unchanged_on_error(*parameter_groups(params)), while_constructing(self):
            super().__init__(
                params,
                # The settings reach the groups through the local optimizer, which knows which arguments they are.
                functools.partial(build, **kwargs),  # type: ignore[arg-type]
                process_group=process_group,
                parameters_as_bucket_view=parameters_as_bucket_view,
            )
            self.defaults.update(self.optim.defaults)
            self.clip_grad = self._clip  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.distributed.optim.ZeroRedundancyOptimizer.add_param_group``: every process must call it."""
        add_group(self, super().add_param_group, param_group)

    @property
    def clip_grad(self) -> dict[str, Any] | None:
        """The settings of the clipping inside the step, or None."""
        return None if self._clip is None else self._clip.as_dict()

    @clip_grad.setter
    def clip_grad(self, value: Mapping[str, Any] | None) -> None:
        clip = parse_clip_grad(value)
        if isinstance(self.optim, FusedOptimizer):
            self.optim.clip_grad = clip
        elif isinstance(clip, NormClip):
            refuse_norm_of_flat_shards(self.param_groups)
        self._clip = clip

    @property
    def last_step(self) -> StepReport | None:
        """The report of the last step, the same in every process; of a stock optimizer only that of norm clipping."""
        return self.optim.last_step if isinstance(self.optim, FusedOptimizer) else self._last_step

    @property
    def _shared(self) -> Any:
        """See Note [Objects around an optimizer]: our loss scaler leaves a fused share's unscaling to its step."""
        if isinstance(optim := self.__dict__.get("optim"), FusedOptimizer):
            return optim._shared
        raise AttributeError(f"{type(self).__name__!r} object has no attribute '_shared'")

    def step(self, closure: Callable[[], float] | None = None, **kwargs: Any) -> Any:
        """Clip, step this process' share, and exchange the parameters.

        Raises:
            RuntimeError: the norm is not finite under ``error_if_nonfinite``. Nothing has been changed then.
        """
        if self._clip is None or isinstance(self.optim, FusedOptimizer):  # whose step clips
            return super().step(closure, **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.optim.param_groups for param in group["params"] if param.grad is not None]
        if isinstance(self._clip, ValueClip):
            if params:  # torch rejects an empty list, which a small share may have
                torch.nn.utils.clip_grad_value_(params, self._clip.clip_value)
        else:
            norm = self._global_norm(params, self._clip)
            coefficient = clip_coefficient(norm, self._clip.max_norm)
            self._last_step = StepReport(torch.stack([norm, coefficient]))
            if params:
                torch._foreach_mul_([param.grad for param in params], coefficient)
        super().step(**kwargs)
        return loss

    def _global_norm(self, params: list[torch.nn.Parameter], clip: NormClip) -> Tensor:
        """Norm of the gradients of all shares; ``params`` is this one's. The same in every process."""
        grads = (param.grad for param in params if param.grad is not None)
        share = total_of(grads, clip.norm_type, self.join_device)
        largest = clip.norm_type == math.inf
        norm = norm_of(add_up(share[None], self.process_group, largest=largest), clip.norm_type)
        if clip.error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"The total norm of order {clip.norm_type} for gradients is non-finite, so it cannot be clipped"
            )
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The state of all shares in the first process, ``{}`` in the others. Every process must call it."""
        plain_groups(self.param_groups)  # other code may have written to them
        self.consolidate_state_dict()
        return super().state_dict() if self.rank == 0 else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of all shares, of which this process keeps its own. ``state_dict`` is not changed.

        Raises:
            ValueError, KeyError: as :meth:`FusedOptimizer.load_state_dict`, if a fused optimizer steps the share.
                Nothing has been changed then, in any process.
        """
        if not isinstance(self.optim, FusedOptimizer):
            super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
            self.optim.load_state_dict(self.optim.state_dict())
            return
        # All shares are read, so that either all processes reject the dict or none. torch loads the parts itself.
        own = self.optim
        loaded = read_state_dict(own.rule, self.param_groups, state_dict, type(own).__name__, own._precision)
        params = (param for group in self.param_groups for param in group["params"])
        indices = {param: index for index, param in enumerate(params)}
        groups = [{**group, "params": [indices[param] for param in group["params"]]} for group in loaded.param_groups]
        self.optim.state.clear()  # a parameter without an entry has not stepped
        state = {indices[param]: entry for param, entry in loaded.state.items() if param in indices}
        super().load_state_dict({"state": state, "param_groups": groups})
        # torch has filled the local optimizer's state itself: not copied, and with step counts on the CPU.
        self.optim.load_state_dict(self.optim.state_dict())
