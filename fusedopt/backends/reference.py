"""The reference backend: every step in plain tensor operations, on any device, one parameter after the other.

It is what the kernels are tested against, and what runs where no kernel can. It reads scale, found_inf and step
counts on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..messages import check_gradient, check_parameter, check_state_kinds, local_of, parameter_name, plain_groups
from ..rules import HiddenCounts, ValueClip, compute_dtype, total_of
from ..shards import settle_gradient
from .base import Backend, StepReport, StepRequest, device_of, report_dtype
from .conclusions import conclude

__all__ = ["ReferenceBackend"]


class _Half(NamedTuple):
    """What a step remembers between its halves."""

    rows: list[tuple[dict[str, Any], Tensor]]  # group and parameter
    param_groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    request: StepRequest
    counts: HiddenCounts | None
    device: torch.device


class ReferenceBackend(Backend):
    """Plain PyTorch, readable in a minute."""

    name = "reference"
    _half: _Half | None = None

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
        half = self._prepared(param_groups, state, request, counts)
        pairs = None
        domains, given = self.shards.domains, request.found_inf
        if request.finds and (half.rows or domains is not None):
            if domains is not None and given is not None:
                half = half._replace(request=request.looking())
            pairs = self.shards.added_up(self._found(half), half.device, request.norm_type, given)
        elif domains is not None and given is not None:
            half = half._replace(request=request._replace(found_inf=domains.agree(given, half.device)))
        return self._finish(half, pairs)

    @torch.no_grad()
    def begin(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> Tensor | None:
        self._half = self._prepared(param_groups, state, request, counts)
        return self._found(self._half)

    @torch.no_grad()
    def finish(self, pairs: Tensor) -> StepReport:
        half, self._half = self._half, None
        assert half is not None
        return self._finish(half, pairs)

    def abandon(self) -> None:
        self._half = None

    def _prepared(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None,
    ) -> _Half:
        """The parameters that take part, when all that could be wrong with them is not."""
        rows = []
        for group_index, group in enumerate(param_groups):
            for index, param in enumerate(group["params"]):
                if param.grad is not None:
                    name = parameter_name(group, group_index, index)
                    settle_gradient(param)
                    check_parameter(name, param)
                    check_gradient(name, param, param.grad)
                    check_state_kinds(name, state.get(param, {}))
                    if (problem := self.rule.problem(group, param, name, state, counts)) is not None:
                        raise RuntimeError(problem)
                    rows.append((group, param))
        self.shards.refresh(param_groups)
        device = rows[0][1].device if rows else device_of(param_groups)
        return _Half(rows, param_groups, state, request, counts, device)

    def _found(self, half: _Half) -> Tensor | None:
        """What is found in this process, by domain, see :meth:`Backend.begin`."""
        if not half.rows:
            return None
        norm_type = half.request.norm_type
        if not half.request.finds:
            return torch.zeros((1, self.shards.count, 2), dtype=torch.float64, device=half.device)
        by_domain: list[list[Tensor]] = [[] for _ in range(self.shards.count)]
        for _, param in half.rows:
            assert param.grad is not None
            by_domain[self.shards.domain_of(param)].append(local_of(param.grad))
        return torch.stack([total_of(grads, norm_type, half.device) for grads in by_domain])[None]

    def _finish(self, half: _Half, pairs: Tensor | None) -> StepReport:
        request = half.request
        conclusions = conclude(request, pairs, half.device)
        multiplier = 1.0 if request.grad_scale is None else 1.0 / float(request.grad_scale)
        if conclusions.coefficient is not None:
            multiplier *= float(conclusions.coefficient)
        if not conclusions.skips():
            for group, param in half.rows:
                mine, count = self.rule.init_state(group, param, half.state, half.counts)
                local = {name: local_of(value) for name, value in mine.items() if isinstance(value, Tensor)}
                self._update(group, param, local, count, multiplier, request)
        plain_groups(half.param_groups)
        return conclusions.report(report_dtype(half.param_groups))

    def _update(
        self,
        group: dict[str, Any],
        whole: Tensor,
        state: dict[str, Any],
        count: Tensor | None,
        multiplier: float,
        request: StepRequest,
    ) -> None:
        assert whole.grad is not None
        param, grad = local_of(whole), local_of(whole.grad)
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
