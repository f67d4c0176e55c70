"""OptimWrapper."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...backends import StepReport
from ...messages import plain
from ...optimizers.shared import steps_fused
from ...rules import NormClip, ValueClip, clip_coefficient, parse_clip_grad
from ...shards import refuse_norm_of_flat_shards
from ..registry import OPTIM_WRAPPERS
from .base import BaseOptimWrapper, taking
from .clipping import clip_norm
from .summary import parameter_table, settings_summary

__all__ = ["OptimWrapper"]


def _check_loss(loss: Tensor) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor of one element, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss must be a tensor of one element, got shape {tuple(loss.shape)}; reduce it first, as with loss.mean()"
        )


def _on(device: torch.device, count: int | Tensor) -> int | Tensor:
    return count.to(device, non_blocking=True) if isinstance(count, Tensor) else count


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(BaseOptimWrapper):
    """Drives any torch optimizer: backward, gradient accumulation, clipping, step; as ``mmengine.optim.OptimWrapper``.

    A fused optimizer clips inside its step (the wrapper sets its ``clip_grad``). For any other optimizer the gradients
    are clipped with ``torch.nn.utils`` before the step. The wrapper itself does not synchronize.

    Args:
        optimizer: the optimizer.
        accumulative_counts: number of iterations whose gradients are accumulated for one step.
        clip_grad: None, ``dict(max_norm=…, norm_type=2.0, error_if_nonfinite=False)`` or
            ``dict(type='value', clip_value=…)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or ``clip_grad`` is set on both the
            wrapper and the optimizer. The optimizer has not changed then.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
    ):
        with taking(optimizer):
            super().__init__(optimizer)
            accumulative_counts = plain(accumulative_counts)
            if isinstance(accumulative_counts, bool) or not isinstance(accumulative_counts, int):
                raise TypeError(f"accumulative_counts must be an int, got {accumulative_counts!r}")
            if accumulative_counts < 1:
                raise ValueError(f"accumulative_counts must be at least 1, got {accumulative_counts}")
            clip = parse_clip_grad(clip_grad)
            if isinstance(clip, NormClip) and not steps_fused(optimizer):
                refuse_norm_of_flat_shards(optimizer.param_groups)
            own_clip = getattr(optimizer, "clip_grad", None)
            if clip is not None and own_clip is not None:
                raise ValueError(
                    f"clip_grad is set on both the wrapper ({clip.as_dict()}) and the optimizer ({own_clip}); set it "
                    "on one of them"
                )
            if clip is not None and steps_fused(optimizer):
                optimizer.clip_grad = clip.as_dict()  # type: ignore[attr-defined]
                clip = None
            # None for a fused optimizer, which clips itself.
            self._stock_clip = clip
            self._stock_grad_norm: Tensor | None = None
            # The names of these four are MMEngine's; MMagic reads them. -1: initialize_count_status was not called.
            self._accumulative_counts = accumulative_counts
            self._inner_count = 0
            self._max_counts = -1
            self._remainder_counts = -1
            #: Number of calls of ``step``, including skipped steps.
            self.step_count = 0
            # Those that were not skipped since the first count_made_steps(); a tensor if steps have flags on a device.
            self._steps_made: int | Tensor | None = None
            self._warned_about: set[str] = set()

    @property
    def clip_grad(self) -> dict[str, Any] | None:
        """The settings of gradient clipping in the wrapper or the optimizer; None without clipping."""
        clip = self._stock_clip
        return getattr(self.optimizer, "clip_grad", None) if clip is None else clip.as_dict()

    @property
    def clip_grad_kwargs(self) -> dict[str, Any] | None:
        """:attr:`clip_grad` without its ``type``, under MMEngine's name; None without clipping."""
        clip = self.clip_grad
        return None if clip is None else {key: value for key, value in clip.items() if key != "type"}

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: Mapping[str, Any] | None = None,
        zero_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Backward through ``loss``; if :meth:`should_update`, step and zero the gradients.

        Args:
            loss: a tensor of one element.
            step_kwargs: arguments of the optimizer's ``step``.
            zero_kwargs: arguments of the optimizer's ``zero_grad``.

        Raises:
            TypeError, ValueError: ``loss`` is not a tensor of one element.
        """
        _check_loss(loss)
        self.backward(self.scale_loss(loss))
        if self.should_update():
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute gradients and count one inner iteration; ``kwargs`` are those of ``torch.Tensor.backward``."""
        loss.backward(**kwargs)
        self._inner_count += 1

    def zero_grad(self, **kwargs: Any) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        self.optimizer.zero_grad(**kwargs)

    def step(self, **kwargs: Any) -> None:
        """Clip and step; ``kwargs`` are those of the optimizer's ``step``."""
        self.step_count += 1
        if self._stock_clip is not None:
            self._clip_gradients(self._stock_clip)
        self.optimizer.step(**kwargs)
        self._count_made_step()

    def _clip_grad(self) -> None:
        """Clip, for a subclass' own ``step``; MMEngine's name. A no-op for a fused optimizer, whose step clips."""
        if self._stock_clip is not None:
            self._clip_gradients(self._stock_clip)

    def count_made_steps(self) -> int | Tensor:
        """The number of steps since the first call of this that were not skipped; does not wait for the device."""
        if self._steps_made is None:
            self._steps_made = 0
        return self._steps_made

    def _count_made_step(self) -> None:
        made = self._steps_made
        if made is None:  # count_made_steps was never called
            return
        skipped = self.step_was_skipped
        if skipped is None:
            self._steps_made = made + 1
        else:
            self._steps_made = _on(skipped.device, made) + skipped.logical_not()

    def _clip_gradients(self, clip: NormClip | ValueClip) -> None:
        params = [param for group in self.optimizer.param_groups for param in group["params"] if param.grad is not None]
        if not params:
            return
        if isinstance(clip, ValueClip):
            torch.nn.utils.clip_grad_value_(params, clip.clip_value)
        else:
            refuse_norm_of_flat_shards(self.optimizer.param_groups)
            self._stock_grad_norm = clip_norm(params, clip)

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of the forward pass; a DDP model does not synchronize in it if no step follows."""
        no_sync: Any = getattr(model, "no_sync", None)
        with contextlib.nullcontext() if no_sync is None or self.should_sync() else no_sync():
            yield

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Set the progress of training, so that the last iterations make a step even if they are fewer.

        Args:
            model: the model; BatchNorm together with accumulation gives a warning, once.
            init_counts: inner iterations done.
            max_counts: total inner iterations, -1 if unknown.
        """
        init_counts, max_counts = plain(init_counts), plain(max_counts)
        self._inner_count = init_counts
        self._max_counts = max_counts
        self._remainder_counts = max_counts % self._accumulative_counts if max_counts != -1 else -1
        if init_counts % self._accumulative_counts:
            self._warn_once(
                f"init_counts {init_counts} is not divisible by accumulative_counts {self._accumulative_counts}: the "
                "gradients accumulated before it are lost, so the next step has fewer than the others"
            )
        if self._accumulative_counts > 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            self._warn_once(
                "gradient accumulation with BatchNorm is not equivalent to a larger batch: the layers normalize over "
                "each smaller batch separately"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned_about:
            self._warned_about.add(message)
            warnings.warn(message, stacklevel=3)

    def should_update(self) -> bool:
        """Whether a step is due after the backward passes counted so far."""
        return self._inner_count % self._accumulative_counts == 0 or self._inner_count == self._max_counts

    def should_sync(self) -> bool:
        """Whether a step will be due after the next backward pass, so that it must synchronize gradients."""
        count = self._inner_count + 1
        return count % self._accumulative_counts == 0 or count == self._max_counts

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Divide by the number of iterations of the step: ``accumulative_counts``, or those left at the end.

        Raises:
            RuntimeError: more iterations than ``max_counts`` of ``initialize_count_status``.
        """
        count = self._accumulative_counts
        if count == 1:
            return loss
        if self._max_counts != -1 and self._inner_count >= self._max_counts - self._remainder_counts:
            count = self._remainder_counts
            if count == 0:
                raise RuntimeError(
                    f"initialize_count_status was called with max_counts={self._max_counts}, and this is one more "
                    f"iteration (inner_count {self._inner_count}); call it again with the new total"
                )
        return loss / count

    def resume_inner_count(self, count: int, *, restart_accumulation: bool = False) -> None:
        """Continue from the inner iterations of a checkpoint.

        Args:
            count: inner iterations done.
            restart_accumulation: restart the current accumulation, because its gradients are lost.
        """
        self._inner_count = count - count % self._accumulative_counts * restart_accumulation

    @property
    def inner_count(self) -> int:
        """Number of backward passes so far."""
        return self._inner_count

    @property
    def grad_norm(self) -> Tensor | None:
        """Gradient norm of the last step before clipping, a 0-dim tensor on the device; None without norm clipping."""
        report = self._report
        return self._stock_grad_norm if report is None else report.grad_norm

    @property
    def clip_coef(self) -> Tensor | None:
        """The factor that clipped the gradients of the last step, a 0-dim tensor; None without norm clipping."""
        report = self._report
        if report is not None:
            return report.clip_coef
        if self._stock_grad_norm is None or not isinstance(self._stock_clip, NormClip):
            return None
        return clip_coefficient(self._stock_grad_norm, self._stock_clip.max_norm)

    @property
    def loss_scale(self) -> Tensor | None:
        """The loss scale, a 0-dim tensor; None without loss scaling."""
        return None

    @property
    def step_was_skipped(self) -> Tensor | None:
        """Whether the last step was skipped for non-finite gradients, a 0-dim bool tensor; None if not checked."""
        report = self._report
        return None if report is None or report.found_inf is None else report.found_inf != 0

    @property
    def _report(self) -> StepReport | None:
        report = getattr(self.optimizer, "last_step", None)
        return report if isinstance(report, StepReport) else None

    def describe(self, model: nn.Module | None = None) -> str:
        """A table of all parameters: name, shape, learning rate, weight decay and number of the group.

        The last line tells the bytes that a fused optimizer takes for each element, held and moved in a step.

        Args:
            model: adds names that groups lack, and the parameters that the optimizer does not train.
        """
        return parameter_table({"": self.optimizer}, model)

    def _settings(self) -> dict[str, Any]:
        """The wrapper's own settings that :meth:`__repr__` shows."""
        return {"accumulative_counts": self._accumulative_counts, "clip_grad": self.clip_grad}

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value!r}" for name, value in self._settings().items() if value is not None)
        return f"{type(self).__name__}({own})\n{indent(settings_summary(self.optimizer), '  ')}"
