"""What the backends have in common whose steps a StepPlan of the compiled module runs."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..messages import check_gradient, check_parameter, check_state_kinds, parameter_name, plain_groups
from ..rules import PLAIN, HiddenCounts, NormClip, Precision, Rule, ValueClip
from ..shards import numbers_of, settle_gradient
from .base import Backend, BackendUnavailable, StepReport, StepRequest, device_of, report_dtype
from .conclusions import conclude

__all__ = ["PlanBackend"]


def _numbers(param_groups: list[dict[str, Any]]) -> list[Any]:
    """The numbers of each parameter's elements, see fusedopt/shards/numbers.py."""
    found = []
    for g, group in enumerate(param_groups):
        for i, param in enumerate(group["params"]):
            try:
                found.append(numbers_of(param))
            except ValueError as error:
                raise ValueError(f"{parameter_name(group, g, i)} {error}") from None
    return found


class PlanBackend(Backend):
    """Asks the plan for each step, and attends to what it cannot serve as it is."""

    def __init__(self, rule: Rule, devices: Iterable[torch.device] = (), precision: Precision = PLAIN):
        super().__init__(rule, devices, precision)
        self._device_type = next((device.type for device in devices), "cpu")
        self._half: Any = None  # between the halves of a step: the groups, the request, whether the plan has begun
        self._plan = self._make_plan()

    @abc.abstractmethod
    def _make_plan(self) -> Any:
        """A StepPlan for tensors on ``self._device_type``."""

    def _how_state_is_kept(self) -> dict[str, Any]:
        """What a StepPlan is told of the precision, as its arguments."""
        if self.precision.is_plain:
            return {}
        average = self.precision.average
        settings = average and (average.smallest_weight, average.gamma or 0.0, average.begin, average.interval)
        keys = [self.precision.key_of(self.rule, column.name) for column in self.rule.columns]
        chance = self.precision.seed is not None, self.precision.seed or 0
        return {"precision": (keys, self.precision.master_key, chance, settings, _numbers)}

    @classmethod
    def unavailable_together(cls, devices: Iterable[torch.device]) -> str | None:
        kinds = sorted({device.type for device in devices})
        return f"one optimizer has parameters on {' and '.join(kinds)}" if len(kinds) > 1 else None

    def step(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> StepReport:
        result = self._run(param_groups, state, request, counts)
        if type(result) is tuple:
            return StepReport(*result)
        if result is False:
            device = device_of(param_groups)
            assert self.shards.domains is not None
            request = request._replace(found_inf=self.shards.domains.agree(request.found_inf, device))  # type: ignore[arg-type]
            result = self._run(param_groups, state, request, counts, False, True)
            if type(result) is tuple:
                return StepReport(*result)
        try:
            device = device_of(param_groups)
            pairs = self.shards.added_up(result, device, request.norm_type, request.found_inf)
        except BaseException:
            self.abandon()
            raise
        return self.finish(pairs)

    def begin(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None = None,
    ) -> Tensor | None:
        return self._run(param_groups, state, request, counts, True)

    def finish(self, pairs: Tensor) -> StepReport:
        param_groups, request, begun, _ = self._half
        self._half = None
        if begun:
            report = StepReport(*self._plan.finish(pairs))
            if self._plan.take_foreign_numbers():
                plain_groups(param_groups)
            return report
        return conclude(request, pairs, device_of(param_groups)).report(report_dtype(param_groups))

    def abandon(self) -> None:
        self._half = None
        self._plan.abandon()

    def _run(
        self,
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        request: StepRequest,
        counts: HiddenCounts | None,
        half: bool = False,
        agreed: bool = False,
    ) -> Any:
        """What the plan's ``step`` returns, when all its parameters have what they need."""
        norm_type, error_if_nonfinite, clip_value = 0.0, False, math.inf
        max_norm: float | Tensor = 0.0
        clip = request.clip
        if isinstance(clip, NormClip):
            norm_type, max_norm, error_if_nonfinite = clip.norm_type, clip.max_norm, clip.error_if_nonfinite
        elif isinstance(clip, ValueClip):
            clip_value = clip.clip_value

        asked = (
            request.grad_scale,
            request.found_inf,
            request.check,
            norm_type,
            max_norm,
            error_if_nonfinite,
            clip_value,
            request.write_back_grads,
            counts,
            half,
            agreed,
        )
        result = self._plan.step(param_groups, state, *asked)
        for _ in range(2):  # of a gradient that could not be used it tells that state is missing, too, afterwards
            if type(result) is list:
                self._attend(result, param_groups, state, counts)
                result = self._plan.step(param_groups, state, *asked)
        if type(result) is list:
            g, i, reason, _ = result[0]
            raise RuntimeError(f"{parameter_name(param_groups[g], g, i)} {reason}")
        if type(result) is tuple:
            if self._plan.take_foreign_numbers():
                plain_groups(param_groups)
        elif result is not False:
            if request.found_inf is not None and not half:
                request = request.looking()
            self._half = param_groups, request, result is not None, asked  # which the plan has by address
        return result

    def _attend(
        self,
        attention: list[tuple[int, int, str, bool | None]],
        param_groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        counts: HiddenCounts | None,
    ) -> None:
        """Look at what the plan cannot serve as it is: raise what is wrong, then create the state that is missing."""
        integers = self._plan.counts_integers
        for g, i, reason, state_missing in attention:
            group = param_groups[g]
            param, name = group["params"][i], parameter_name(group, g, i)
            check_parameter(name, param)
            check_state_kinds(name, state.get(param, {}))
            if param.device.type != self._device_type:
                raise BackendUnavailable(f"{name} is on {param.device}, others on {self._device_type}")
            if self.chosen_for is not None:
                devices, dtypes = self.chosen_for
                if param.device not in devices or param.dtype not in dtypes:
                    raise BackendUnavailable(f"{name} is {param.dtype} on {param.device}, which it was not chosen for")
            if state_missing is None:  # nothing that could be mended
                raise RuntimeError(f"{name} {reason}")
            if param.grad is None:  # another thread has dropped it since
                continue
            settled = settle_gradient(param)
            check_gradient(name, param, param.grad)
            if not state_missing and not settled:
                raise RuntimeError(f"{name} {reason}")
            problem = self.rule.problem(group, param, name, state, counts, integers=integers, precision=self.precision)
            if problem is not None:
                raise RuntimeError(problem)
        for g, i, _, _ in attention:
            group = param_groups[g]
            self.rule.init_state(group, group["params"][i], state, counts, integers=integers, precision=self.precision)
