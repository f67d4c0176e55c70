"""What a backend is, what a step asks of it, and what a step reports."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..rules import PLAIN, HiddenCounts, NormClip, Precision, Rule, ValueClip
from ..shards import Shards

__all__ = ["Backend", "BackendUnavailable", "StepReport", "StepRequest", "device_of", "report_dtype"]


def device_of(param_groups: Iterable[Mapping[str, Any]]) -> torch.device:
    """Where the parameters are, or the first of them; the CPU without any."""
    return next((param.device for group in param_groups for param in group["params"]), torch.device("cpu"))


def report_dtype(param_groups: Iterable[Mapping[str, Any]]) -> torch.dtype:
    """Of a norm that is reported: float64 when a parameter is, with a gradient or without, as in other processes."""
    double = any(param.dtype == torch.float64 for group in param_groups for param in group["params"])
    return torch.float64 if double else torch.float32


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot serve; the message says why."""


class StepRequest(NamedTuple):
    """What one ``step()`` asks for beyond the plain update.

    Note [Three modes]: *bare* makes the update pass only, *check* finds non-finite gradients first, *full* finds the
    norm (and non-finite gradients) first. Bare serves when there is nothing to find out.

    Args:
        grad_scale: divisor of the gradients, or None for 1.
        found_inf: non-zero skips the step, or None.
        check: find non-finite gradients and skip the step when there are any.
        clip: norm or value clipping, or None.
        write_back_grads: leave the unscaled, clipped gradients in ``.grad``.
    """

    grad_scale: Tensor | float | None = None
    found_inf: Tensor | None = None
    check: bool = False
    clip: NormClip | ValueClip | None = None
    write_back_grads: bool = False

    @property
    def finds(self) -> bool:
        """Whether the step has to find something out before it updates: see Note [Three modes]."""
        return self.check or isinstance(self.clip, NormClip)

    def looking(self) -> StepRequest:
        """The request of a step that is given ``found_inf``, as if it looked for what is not finite itself."""
        return self._replace(found_inf=None, check=True)

    @property
    def norm_type(self) -> float | None:
        """Of the norm that the step clips by, or None."""
        return self.clip.norm_type if isinstance(self.clip, NormClip) else None


class StepReport:
    """What the last step found out, as 0-dim tensors on the parameters' device, made without a host read.

    Where parts of the gradients are in other processes, it is the same in all of them.

    Args:
        scalars: norm and clip coefficient in one tensor, None without norm clipping.
        found_inf: see the attribute.

    Attributes:
        grad_norm: global norm of the unscaled gradients before clipping; None without norm clipping.
        clip_coef: what the gradients were multiplied with to clip them; None without norm clipping.
        found_inf: 1.0 when the step was skipped for non-finite gradients, else 0.0; None when nobody asked or there was
            no gradient.

    They are float32, or float64 when a parameter of the optimizer is float64; ``found_inf`` is always float32.
    """

    __slots__ = ("_found_inf", "_scalars")

    def __init__(self, scalars: Tensor | None = None, found_inf: Tensor | None = None):
        self._scalars = scalars  # (grad_norm, clip_coef)
        self._found_inf = found_inf

    @property
    def grad_norm(self) -> Tensor | None:
        return None if self._scalars is None else self._scalars[0]

    @property
    def clip_coef(self) -> Tensor | None:
        return None if self._scalars is None else self._scalars[1]

    @property
    def found_inf(self) -> Tensor | None:
        return self._found_inf

    def __repr__(self) -> str:
        return f"StepReport(grad_norm={self.grad_norm}, clip_coef={self.clip_coef}, found_inf={self.found_inf})"


class Backend(abc.ABC):
    """Runs the steps of one optimizer. An instance belongs to that optimizer and may keep tables of its tensors.

    Args:
        rule: the optimizer's maths.
        devices: where its parameters are; ``unavailable``, ``unavailable_together`` and ``unavailable_for`` had nothing
            against them.
        precision: in what form the optimizer keeps its state.
    """

    name: ClassVar[str]

    #: Where the parameters were, and of which dtypes, when it was chosen, as far as it had to prove itself for them.
    chosen_for: tuple[frozenset[torch.device], frozenset[torch.dtype]] | None = None
    #: Whether some of its self-test is still to be made.
    unproved = False

    def __init__(self, rule: Rule, devices: Iterable[torch.device] = (), precision: Precision = PLAIN):
        self.rule = rule
        self.precision = precision
        self.shards = Shards()

    @classmethod
    @abc.abstractmethod
    def unavailable(cls, device: torch.device) -> str | None:
        """Why this backend cannot serve tensors on ``device``, or None when it can."""

    @classmethod
    def unavailable_together(cls, devices: Iterable[torch.device]) -> str | None:
        """Why this backend cannot serve one optimizer with tensors on all these devices, or None when it can."""
        return None

    @classmethod
    def unavailable_for(cls, rule: Rule) -> str | None:
        """Why this backend, which serves the devices, cannot serve optimizers of this rule, or None when it can."""
        return None

    @classmethod
    def must_prove_itself(cls, device: torch.device) -> bool:
        """Whether 'auto' takes it for ``device`` only after a self-test there, as the kernels of GPUs."""
        return device.type != "cpu"

    @classmethod
    def for_trial(cls, rule: Rule, device: torch.device, precision: Precision = PLAIN) -> Backend:
        """One for the steps of a self-test."""
        return cls(rule, {device}, precision)

    @abc.abstractmethod
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> StepReport:
        """Run one step over all groups.

        Every gradient and state is checked before anything is written: after an error, parameters and state are as
        before.

        Args:
            param_groups: the optimizer's.
            state: the optimizer's.
            request: what else is asked for.
            counts: where the step counts are when they are not in ``state``.

        Raises:
            RuntimeError: a gradient is sparse, complex, of another shape or device, or a parameter's state is half
                there (the message names the parameter), or the norm is not finite under ``error_if_nonfinite``.
            ValueError: parts of the gradients are in other processes, and nobody could know their norm.
        """

    @abc.abstractmethod
    def begin(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> Tensor | None:
        """The first half of :meth:`step`; nothing has changed after it.

        Returns:
            What was found in this process, to be made that of all by :meth:`fusedopt.shards.Shards.added_up` of
            :attr:`shards`; zeros where there was nothing to find out, None where no parameter takes part.
            :meth:`finish` or :meth:`abandon` must follow.
        """

    @abc.abstractmethod
    def finish(self, pairs: Tensor) -> StepReport:
        """The second half: ``pairs``, float64, (n, 2), are of all that clip and skip together."""

    @abc.abstractmethod
    def abandon(self) -> None:
        """In place of the second half: everything stays as it is."""
