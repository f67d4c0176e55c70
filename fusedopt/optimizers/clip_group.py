"""ClipGroup: several optimizers that clip by one norm and skip together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from textwrap import indent
from typing import Any

import torch
from torch import Tensor

from ..backends import StepReport, StepRequest
from ..messages import parameter_name
from ..rules import NormClip, parse_clip_grad
from ..shards import Domains, add_up, agree_on_parameters, combined, refuse_what_cannot_be_added_up, tell_calling_scaler
from .backward import refuse_part_of_a_norm
from .base import FusedOptimizer
from .given_norm import with_given_norm
from .shared import Shared, handed_over

__all__ = ["ClipGroup"]


def _of(optimizer: FusedOptimizer, request: StepRequest) -> StepRequest:
    """What the group asks of one optimizer: its gradients are its own matter."""
    return request._replace(write_back_grads=optimizer.write_back_grads)


class ClipGroup:
    """Several optimizers that clip by one norm and skip together: stages of a pipeline, or a model in parts.

    Each optimizer by itself would clip by the norm of its own parameters' gradients, and skip by its own overflows. A
    group finds the norm over all of them, then updates all or none. It is stepped in place of them, by hand or by a
    loss scaler: ``fusedopt.amp.GradScaler().step(group)``. What else belongs to an optimizer (state, schedulers, hooks,
    checkpoints, ``write_back_grads``) stays with each. Their ``last_step`` is the group's.

    Args:
        optimizers: fused optimizers without ``clip_grad`` of their own. Their parameters may be sharded.
        process_group: processes that have the other optimizers, such as those of the other stages: each has one group
            with its own optimizers, and all step together. A parameter that several processes have counts in each.
        max_norm: bound > 0 of the norm, a float or 0-dim tensor; ``inf`` only reports, None does not clip.
        norm_type: 1, 2, any p > 0, or ``inf``.
        error_if_nonfinite: raise before anything is changed when the norm is not finite (costs one host read).

    Attributes:
        optimizers: as given.
        last_step: the :class:`~fusedopt.backends.StepReport` of the last step, over all of them; None before the first.

    Raises:
        TypeError: an entry is no fused optimizer.
        ValueError: no optimizer, one twice, a parameter in two of them, an optimizer with ``clip_grad`` of its own, a
            setting out of range, or parameters of which no process could know the norm.
    """

    grad_scale = handed_over("grad_scale")
    found_inf = handed_over("found_inf")
    _step_supports_amp_scaling = True  # torch's name: a stock scaler hands over its scale

    def __init__(
        self,
        optimizers: Iterable[FusedOptimizer],
        process_group: Any = None,
        *,
        max_norm: float | Tensor | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ):
        self.optimizers = list(optimizers)
        self.process_group = process_group
        clip = None
        if max_norm is not None:
            clip = parse_clip_grad(
                {"max_norm": max_norm, "norm_type": norm_type, "error_if_nonfinite": error_if_nonfinite}
            )
        self._shared = Shared(clip)
        self._joined: tuple[list[Domains | None], Domains] | None = None
        self._introduced = False
        self._check()
        if clip is not None:
            refuse_what_cannot_be_added_up(self.param_groups)

    def _check(self) -> None:
        if not self.optimizers:
            raise ValueError("ClipGroup got no optimizers")
        owner: dict[int, int] = {}
        for number, optimizer in enumerate(self.optimizers):
            if not isinstance(optimizer, FusedOptimizer):
                raise TypeError(
                    f"optimizers[{number}] is a {type(optimizer).__name__}; expected a fused optimizer, such as "
                    "fusedopt.FusedAdamW or fusedopt.fuse(optimizer)"
                )
            for g, group in enumerate(optimizer.param_groups):
                for i, param in enumerate(group["params"]):
                    if id(param) in owner:
                        raise ValueError(
                            f"{parameter_name(group, g, i)} of optimizers[{number}] is in optimizers"
                            f"[{owner[id(param)]}], too; expected each parameter once"
                        )
                    owner[id(param)] = number
        self._refuse_own_clipping()

    def _refuse_own_clipping(self) -> None:
        for number, optimizer in enumerate(self.optimizers):
            if optimizer.clip_grad is not None:
                raise ValueError(
                    f"optimizers[{number}] has clip_grad={optimizer.clip_grad} of its own; expected None, and max_norm "
                    "of the group"
                )
            if optimizer._shared.next is not None:
                raise ValueError(
                    f"a trainer clips optimizers[{number}], which is one of a ClipGroup; expected max_norm of the group"
                )

    @property
    def clip_grad(self) -> dict[str, Any] | None:
        """The clipping over all optimizers: None, or a copy of the settings. Assigning validates."""
        clip = self._shared.clip
        return None if clip is None else clip.as_dict()

    @clip_grad.setter
    def clip_grad(self, value: Mapping[str, Any] | None) -> None:
        clip = parse_clip_grad(value)
        if isinstance(clip, NormClip):
            refuse_what_cannot_be_added_up(self.param_groups)
        self._shared.clip = clip

    @property
    def last_step(self) -> StepReport | None:
        return self._shared.last_step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in their order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(
        self,
        closure: Callable[[], float | Tensor] | None = None,
        *,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | float | None = None,
    ) -> float | Tensor | None:
        """Step all optimizers, or none. Args, Returns: as :meth:`FusedOptimizer.step`, for all of them together.

        Step hooks of the optimizers are called without arguments.

        Raises:
            ValueError: an optimizer was given ``clip_grad`` of its own since.
            RuntimeError: see :meth:`fusedopt.backends.Backend.step`; or a backward pass is under way, in which the
                gradients are not all there. No optimizer has changed anything then.
        """
        self._refuse_own_clipping()  # it may have been assigned since
        if grad_norm is None and self._shared.clip is not None:
            refuse_part_of_a_norm()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            for before in list(optimizer._optimizer_step_pre_hooks.values()):
                before(optimizer, (), {})
            if not optimizer._introduced:
                optimizer._introduce()
        if not self._introduced:
            self._introduce()
        shared = self._shared
        request, scalars = shared.request(grad_scale, found_inf), None
        if grad_norm is not None:
            request, scalars = with_given_norm(request, grad_norm, self.param_groups)
        if request.found_inf is not None:
            request = request._replace(found_inf=self._agreed(request.found_inf))
        report = self._together(request)
        shared.last_step = report if scalars is None else StepReport(scalars, report.found_inf)
        if shared.found_inf is not None and report.found_inf is not None:
            tell_calling_scaler(report.found_inf)
        for optimizer in self.optimizers:
            optimizer.last_step = shared.last_step
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look for
            for after in list(optimizer._optimizer_step_post_hooks.values()):
                after(optimizer, (), {})
        return loss

    def _introduce(self) -> None:
        """As the optimizers' own, over the group's processes."""
        settings = {"clip_grad": self.clip_grad}
        if self.process_group is not None:
            agree_on_parameters(Domains([(self.process_group,)]), (), settings)
        # Processes that have parts of the same gradients have the same optimizers.
        agree_on_parameters(self._domains, (), {**settings, "number of optimizers": len(self.optimizers)})
        self._introduced = True

    @property
    def _domains(self) -> Domains:
        """Those of all optimizers, one after the other."""
        domains = [optimizer._shards.domains for optimizer in self.optimizers]
        if self._joined is None or any(one is not other for one, other in zip(self._joined[0], domains, strict=True)):
            self._joined = domains, Domains.joined(domains)
        return self._joined[1]

    @property
    def _device(self) -> torch.device:
        return self.optimizers[0]._device

    def _added_up(self, found: Tensor, norm_type: float | None) -> Tensor:
        """What all processes of all optimizers found.

        Args:
            found: of this process, the domains of each optimizer after those of the one before, float64, (domains, 2).
            norm_type: of the norm, or None.
        """
        largest = norm_type == math.inf
        pairs = self._domains.add_up(found, largest=largest)
        if self.process_group is None:
            return pairs
        return add_up(combined(pairs, largest=largest)[None], self.process_group, largest=largest)

    def _agreed(self, found_inf: Tensor | float) -> Tensor:
        """Whether ``found_inf`` is set in any process."""
        flag = torch.as_tensor(found_inf, device=self._device).detach().reshape(()).ne(0).double()
        count = sum(optimizer._shards.count for optimizer in self.optimizers)
        found = torch.stack((torch.zeros_like(flag), flag)).repeat(count, 1)
        return self._added_up(found, None)[:, 1].amax().ne(0).float()

    def _together(self, request: StepRequest) -> StepReport:
        """First all first halves, then all second ones."""
        begun: list[FusedOptimizer] = []
        try:
            found = []
            for optimizer in self.optimizers:
                optimizer._refuse_while_averaged("step()")
                totals = optimizer._served("begin", _of(optimizer, request))
                begun.append(optimizer)
                found.append(optimizer._shards.here(totals, optimizer._device, request.norm_type).to(self._device))
            pairs = torch.cat(found)
            if request.finds:
                pairs = self._added_up(pairs, request.norm_type)
            reports = [optimizer._chosen_backend().finish(pairs.to(optimizer._device)) for optimizer in self.optimizers]
        except BaseException:
            for optimizer in begun:
                optimizer._chosen_backend().abandon()
            raise
        return reports[0]

    def __repr__(self) -> str:
        inner = "".join(f"{optimizer!r}\n" for optimizer in self.optimizers)
        return f"ClipGroup(\n{indent(inner, '    ')}    clip_grad: {self.clip_grad}\n)"
