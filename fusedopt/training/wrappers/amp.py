"""AmpOptimWrapper."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...amp import GradScaler
from ...messages import check_flag, check_number, did_you_mean, is_dtensor, parse_dtype, plain, plain_settings
from ...optimizers import FusedOptimizer
from ...rules import NormClip
from ..registry import OPTIM_WRAPPERS, accepted_arguments
from ..sharding import has_shards
from .base import check_state_dict, taking
from .wrapper import OptimWrapper

__all__ = ["AmpOptimWrapper"]

_SCALER_KEYS = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def _check_scaler_state(state: Any) -> None:
    check_state_dict(state, "state_dict['loss_scaler']")
    missing = [key for key in _SCALER_KEYS if key not in state]
    if missing:
        raise KeyError(
            f"state_dict['loss_scaler'] has no {', '.join(map(repr, missing))}; expected what the state_dict() of a "
            f"GradScaler returns, got {', '.join(map(repr, state))}"
        )
    for key in _SCALER_KEYS:
        if not isinstance(plain(state[key]), (int, float)):
            raise ValueError(f"state_dict['loss_scaler'][{key!r}] must be a number, got {state[key]!r}")


def _scaler_of(optimizer: Any, use_fsdp: bool) -> type[torch.amp.GradScaler]:
    """The class of the loss scaler.

    Shards of FSDP1 are plain tensors, so only a scaler that is told so asks the other processes. Fused optimizers do
    this themselves, and torch does for DTensors. In a single process without a group there is nobody to ask.
    """
    if not use_fsdp or isinstance(optimizer, FusedOptimizer) or not (dist.is_available() and dist.is_initialized()):
        return GradScaler
    if isinstance(optimizer, torch.optim.Optimizer) and has_shards(
        param for group in optimizer.param_groups for param in group["params"]
    ):
        return GradScaler
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper):
    """:class:`OptimWrapper` with automatic mixed precision, on a GPU or a CPU.

    A fused optimizer unscales, checks and clips inside its step. With any other optimizer, the scaler unscales, then
    ``torch.nn.utils`` clips, then the scaler steps.

    Args:
        loss_scale: ``'dynamic'``, a number > 0 for a fixed scale, or a dict of ``torch.amp.GradScaler`` arguments.
        dtype: autocast dtype: ``'float16'``, ``'bfloat16'``, ``'float32'``, ``'float64'``, the torch.dtype, or None
            for torch's default on the parameters' device. On a CPU torch autocasts only to the first two; the others
            switch autocast off there.
        use_fsdp: whether the model is a FullyShardedDataParallel (FSDP1). An optimizer that is not fused then gets
            torch's ``ShardedGradScaler``, whose processes agree on overflows. Fused optimizers, and models of
            ``fully_shard`` (FSDP2), need no setting: their processes agree in any case.
        optimizer, accumulative_counts, clip_grad: see :class:`OptimWrapper`, by keyword; ``optimizer`` is required.

    Raises:
        TypeError: ``loss_scale``, ``dtype`` or ``use_fsdp`` has the wrong type.
        ValueError: an unknown dtype, or a value out of range.
    """

    def __init__(
        self,
        loss_scale: str | float | Mapping[str, Any] = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ):
        scaler_settings: dict[str, Any] = {}
        # MMEngine's name: the scale a static scaler is set to after each step, None for a dynamic one.
        self._scale_update_param: float | None = None
        loss_scale = plain_settings(loss_scale)
        if isinstance(loss_scale, Mapping):
            scaler_settings.update(loss_scale)
        elif isinstance(loss_scale, (int, float)) and not isinstance(loss_scale, bool):
            check_number("loss_scale", loss_scale, exclusive=True)
            self._scale_update_param = scaler_settings["init_scale"] = float(loss_scale)
        elif loss_scale != "dynamic":
            raise TypeError(
                f"loss_scale must be 'dynamic', a number or a dict of GradScaler arguments, got {loss_scale!r} "
                "(the optimizer is passed by keyword: optimizer=...)"
            )
        self.cast_dtype = parse_dtype(dtype)
        scaler = _scaler_of(kwargs.get("optimizer"), check_flag("use_fsdp", use_fsdp))
        known = accepted_arguments(scaler) or scaler_settings
        for key in scaler_settings:
            if key not in known:
                raise TypeError(f"loss_scale {loss_scale!r}: unknown key {key!r}; {did_you_mean(key, known)}")
        with taking(kwargs.get("optimizer")):
            super().__init__(**kwargs)
            self.loss_scaler = scaler(**{"device": self._device.type, **scaler_settings})
            self._found_inf: list[Tensor] = []

    @property
    def _device(self) -> torch.device:
        # Looked up at each use, since a model may be moved after its optimizer is created.
        params = (param for group in self.optimizer.param_groups for param in group["params"])
        first: Any = next(params, None)
        if is_dtensor(first):  # which may be offloaded to the CPU
            return torch.device(first.device_mesh.device_type)
        return torch.device("cpu") if first is None else first.device

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute scaled gradients and count one inner iteration."""
        super().backward(self.loss_scaler.scale(loss), **kwargs)

    def step(self, **kwargs: Any) -> None:
        """Unscale, clip, step unless a gradient is not finite, and update the loss scale."""
        self.step_count += 1
        scaler = self.loss_scaler
        clip = self._stock_clip
        if clip is not None:
            scaler.unscale_(self.optimizer)
            if isinstance(clip, NormClip) and clip.error_if_nonfinite and self._overflowed():
                # The scaler skips this step and lowers the scale, which is normal and not an error.
                clip = dataclasses.replace(clip, error_if_nonfinite=False)
            self._clip_gradients(clip)
        scaler.step(self.optimizer, **kwargs)
        if scaler.is_enabled():
            self._found_inf = list(scaler._found_inf_per_device(self.optimizer).values())
        scaler.update(self._scale_update_param)
        self._count_made_step()

    def _overflowed(self) -> bool:
        scaler = self.loss_scaler
        if not scaler.is_enabled():
            return False
        return any(float(found) != 0 for found in scaler._found_inf_per_device(self.optimizer).values())

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, in addition to :meth:`OptimWrapper.optim_context`."""
        device_type = self._device.type
        # Only CUDA autocasts to float32; elsewhere torch would warn at every iteration and leave autocast off.
        enabled = device_type == "cuda" or self.cast_dtype not in (torch.float32, torch.float64)
        with super().optim_context(model), torch.autocast(device_type, dtype=self.cast_dtype, enabled=enabled):
            yield

    @property
    def loss_scale(self) -> Tensor | None:
        """The scale of the next loss, a 0-dim tensor; None if the scaler is disabled."""
        if not self.loss_scaler.is_enabled():
            return None
        scale = self.loss_scaler._get_scale_async()
        if scale is None:  # the scaler creates it at the first loss
            return torch.full((), self.loss_scaler._init_scale, dtype=torch.float32, device=self._device)
        return scale.clone()  # the scaler updates its own in place

    @property
    def step_was_skipped(self) -> Tensor | None:
        """Whether the last step was skipped for non-finite gradients, a 0-dim bool tensor; None before the first."""
        if not self._found_inf:
            return None
        device = self._found_inf[0].device
        return torch.stack([found.to(device, non_blocking=True) for found in self._found_inf]).ne(0).any()

    def _settings(self) -> dict[str, Any]:
        scale = self.loss_scale
        return {**super()._settings(), "dtype": self.cast_dtype, "loss_scale": scale if scale is None else float(scale)}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of :class:`OptimWrapper`, with ``loss_scaler``."""
        return {**super().state_dict(), "loss_scaler": self.loss_scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state dict of any wrapper of one optimizer, or of the optimizer itself.

        If it has no ``loss_scaler``, or that of a disabled scaler, the loss scale does not change. On an error nothing
        has been loaded.

        Raises:
            TypeError: it, or its ``loss_scaler``, is not a dict.
            KeyError: ``loss_scaler`` lacks an entry.
            ValueError: as :meth:`OptimWrapper.load_state_dict`, or an entry of ``loss_scaler`` is not a number.
        """
        check_state_dict(state_dict)
        scaler_state = state_dict.get("loss_scaler") or {}
        if scaler_state:
            _check_scaler_state(scaler_state)
        super().load_state_dict(state_dict)
        if scaler_state:
            self.loss_scaler.load_state_dict(scaler_state)

    def _loaded_objects(self) -> list[Any]:
        return [*super()._loaded_objects(), self.loss_scaler]


@OPTIM_WRAPPERS.register_module(name="ApexOptimWrapper")
def _no_apex(*args: Any, **kwargs: Any) -> NoReturn:
    raise NotImplementedError("ApexOptimWrapper is not supported: apex.amp no longer exists; use AmpOptimWrapper")
