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
from ..shards import numbers_of, settle_gradient
from .base import Backend, StepReport, StepRequest, device_of, report_dtype
from .conclusions import conclude
from .stored import Chance, Stored

__all__ = ["ReferenceBackend"]


class _Row(NamedTuple):
    """A parameter that takes part."""

    group: dict[str, Any]
    param: Tensor
    stream: int  # its number in the optimizer
    numbers: tuple[int, tuple[int, ...], tuple[int, ...]] | None  # of its elements, see fusedopt/shards/numbers.py


class _Half(NamedTuple):
    """What a step remembers between its halves."""

    rows: list[_Row]
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
        rows: list[_Row] = []
        stream = -1
        for group_index, group in enumerate(param_groups):
            for index, param in enumerate(group["params"]):
                stream += 1
                if param.grad is not None:
                    name = parameter_name(group, group_index, index)
                    settle_gradient(param)
                    check_parameter(name, param)
                    check_gradient(name, param, param.grad)
                    check_state_kinds(name, state.get(param, {}))
                    problem = self.rule.problem(group, param, name, state, counts, precision=self.precision)
                    if problem is not None:
                        raise RuntimeError(problem)
                    try:
                        numbers = numbers_of(param) if self.precision.draws(self.rule) else None
                    except ValueError as error:
                        raise ValueError(f"{name} {error}") from None
                    rows.append(_Row(group, param, stream, numbers))
        self.shards.refresh(param_groups)
        device = rows[0].param.device if rows else device_of(param_groups)
        return _Half(rows, param_groups, state, request, counts, device)

    def _found(self, half: _Half) -> Tensor | None:
        """What is found in this process, by domain, see :meth:`Backend.begin`."""
        if not half.rows:
            return None
        norm_type = half.request.norm_type
        if not half.request.finds:
            return torch.zeros((1, self.shards.count, 2), dtype=torch.float64, device=half.device)
        by_domain: list[list[Tensor]] = [[] for _ in range(self.shards.count)]
        for row in half.rows:
            assert row.param.grad is not None
            by_domain[self.shards.domain_of(row.param)].append(local_of(row.param.grad))
        return torch.stack([total_of(grads, norm_type, half.device) for grads in by_domain])[None]

    def _finish(self, half: _Half, pairs: Tensor | None) -> StepReport:
        request = half.request
        conclusions = conclude(request, pairs, half.device)
        multiplier = 1.0 if request.grad_scale is None else 1.0 / float(request.grad_scale)
        if conclusions.coefficient is not None:
            multiplier *= float(conclusions.coefficient)
        if not conclusions.skips():
            for row in half.rows:
                mine, count = self.rule.init_state(
                    row.group, row.param, half.state, half.counts, precision=self.precision
                )
                local = {name: local_of(value) for name, value in mine.items() if isinstance(value, Tensor)}
                self._update(row, local, count, multiplier, request)
        plain_groups(half.param_groups)
        return conclusions.report(report_dtype(half.param_groups))

    def _update(
        self, row: _Row, state: dict[str, Tensor], count: Tensor | None, multiplier: float, request: StepRequest
    ) -> None:
        group, rule, precision = row.group, self.rule, self.precision
        assert row.param.grad is not None
        param, grad = local_of(row.param), local_of(row.param.grad)
        dtype = compute_dtype(param)
        g = grad.to(dtype) * multiplier
        if isinstance(request.clip, ValueClip):
            bound = float(request.clip.clip_value)
            g = g.clamp(-bound, bound)
        if request.write_back_grads:
            grad.copy_(g)
        step = 1 if count is None else int(count.add_(1))
        chance = Chance(precision.seed or 0, row.stream, step, row.numbers)
        stored = Stored(param, precision, state, chance)
        columns = [(number, column) for number, column in enumerate(rule.columns, 1) if column.needed(group)]
        keys = {column.name: precision.key_of(rule, column.name) for _, column in columns}
        work = {column.name: stored.column(column, keys[column.name]) for _, column in columns}
        p = stored.weights()
        rule.update(group, p, g, work, step)
        for number, column in columns:
            stored.put_column(column, keys[column.name], work[column.name], number)
        stored.put_weights(p)
        if precision.average is not None:
            stored.put_average(precision.average.weight(step))
