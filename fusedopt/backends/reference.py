"""The reference backend: every step in plain tensor operations, on any device, one parameter after the other.

It is what the kernels are tested against, and what runs where no kernel can. It reads scale, found_inf and step
counts on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..messages import check_gradient, check_parameter, check_state_kinds, parameter_name, plain_groups
from ..rules import HiddenCounts, NormClip, ValueClip, clip_coefficient, compute_dtype, global_norm
from .base import Backend, StepReport, StepRequest

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    """Plain PyTorch, readable in a minute."""

    name = "reference"

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        return None

    @classmethod
    def must_prove_itself(cls, device: torch.device) -> bool:
        return False

    @torch.no_grad()
    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> StepReport:
        rows = []
        for group_index, group in enumerate(param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = parameter_name(group, group_index, index)
                    check_parameter(name, param)
                    check_gradient(name, param, param.grad)
                    check_state_kinds(name, state.get(param, {}))
                    if (problem := self.rule.problem(group, param, name, state, counts)) is not None:
                        raise RuntimeError(problem)
                    rows.append((group, param, param.grad))
        inv_scale = 1.0 if request.grad_scale is None else 1.0 / float(request.grad_scale)
        clip = request.clip

        device = rows[0][1].device if rows else torch.device("cpu")
        found_inf = None
        if request.found_inf is not None:
            found_inf = torch.as_tensor(request.found_inf, device=device).reshape(()).ne(0).float()
        if request.check and rows:
            finite = all(bool(grad.isfinite().all()) for _, _, grad in rows)
            found_inf = torch.tensor(0.0 if finite else 1.0, device=device)
        skip = found_inf is not None and float(found_inf) != 0

        scalars = None
        multiplier = inv_scale
        if isinstance(clip, NormClip):
            norm = global_norm([grad for _, _, grad in rows], clip.norm_type, device) * inv_scale
            if clip.error_if_nonfinite and not skip and not norm.isfinite():
                raise RuntimeError(f"The total norm of order {clip.norm_type} of the gradients is {float(norm)}")
            coefficient = clip_coefficient(norm, clip.max_norm)
            multiplier *= float(coefficient)
            double = any(param.dtype == torch.float64 for _, param, _ in rows)
            scalars = torch.stack((norm, coefficient)).to(torch.float64 if double else torch.float32)

        if not skip:
            for group, param, grad in rows:
                mine, count = self.rule.init_state(group, param, state, counts)
                self._update(group, param, grad, mine, count, multiplier, request)
        plain_groups(param_groups)
        return StepReport(scalars, found_inf)

    def _update(
        self,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Any],
        count: Tensor | None,
        multiplier: float,
        request: StepRequest,
    ) -> None:
        dtype = compute_dtype(param)
        g = grad.to(dtype) * multiplier
        if isinstance(request.clip, ValueClip):
            bound = float(request.clip.clip_value)
            g = g.clamp(-bound, bound)
        if request.write_back_grads:
            grad.copy_(g)
        step = 1 if count is None else int(count.add_(1))
        columns = {column.name: state[column.name] for column in self.rule.columns if column.needed(group)}
        work = {name: tensor.to(dtype) for name, tensor in columns.items()}
        p = param.to(dtype)
        self.rule.update(group, p, g, work, step)
        for target, result in ((param, p), *((columns[name], work[name]) for name in columns)):
            if result is not target:
                target.copy_(result)
