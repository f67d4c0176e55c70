"""The 1cycle policy (Smith and Topin, 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...messages import check_number, check_whole_number, plain, plain_settings
from ..registry import PARAM_SCHEDULERS
from .base import INF, LRSchedulerMixin, _ParamScheduler, refuse_new_groups
from .groups import per_group
from .watching import OptimizerLike

__all__ = ["OneCycleLR", "OneCycleParamScheduler"]

#: The places of a group's three values.
_INITIAL, _MAX, _MIN = range(3)


@PARAM_SCHEDULERS.register_module()
class OneCycleParamScheduler(_ParamScheduler):
    """Rises from ``eta_max / div_factor`` to ``eta_max``, then falls to ``1 / final_div_factor`` of its start.

    As ``torch.optim.lr_scheduler.OneCycleLR`` without its momentum. It sets the value, regardless of the previous one.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        param_name: must be ``'lr'``, as in MMEngine.
        eta_max: the highest value, or a list with one for each parameter group.
        total_steps: length of the cycle; ``end - begin`` by default.
        pct_start: share of the steps that rise, from 0 to 1.
        anneal_strategy: ``'cos'`` or ``'linear'``.
        div_factor: the highest value divided by the first, above 0.
        final_div_factor: the first value divided by the last, above 0.
        three_phase: fall to the first value in as many steps as it rose, and then to the last value.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.

    Raises:
        ValueError: neither ``total_steps`` nor ``end`` is given, or ``total_steps`` end before ``end``.
    """

    _in_steps = ("total_steps",)
    _per_group = ("eta_max",)

    def __init__(
        self,
        optimizer: OptimizerLike,
        param_name: str,
        eta_max: float | Sequence[float],
        total_steps: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: str = "cos",
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        *args: Any,
        **kwargs: Any,
    ):
        if param_name != "lr":
            raise ValueError(f"Invalid param_name: {param_name!r}; a 1cycle schedules only 'lr'")
        eta_max = plain_settings(eta_max)
        for value in eta_max if isinstance(eta_max, Sequence) else [eta_max]:
            check_number("eta_max", value)
        pct_start = check_number("pct_start", pct_start)
        if pct_start > 1:
            raise ValueError(f"Invalid pct_start: {pct_start}; expected a number from 0 to 1")
        if anneal_strategy not in ("cos", "linear"):
            raise ValueError(f"Invalid anneal_strategy: {anneal_strategy!r}; expected 'cos' or 'linear'")
        div_factor = check_number("div_factor", div_factor, exclusive=True)
        final_div_factor = check_number("final_div_factor", final_div_factor, exclusive=True)
        self.eta_max = eta_max
        self.total_steps = None if total_steps is None else check_whole_number("total_steps", total_steps, 1)
        self.pct_start = pct_start
        self.anneal_strategy = anneal_strategy
        self.div_factor = div_factor
        self.final_div_factor = final_div_factor
        self.three_phase = plain(three_phase)
        super().__init__(optimizer, param_name, *args, **kwargs)

    def _from_mmengine(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        if not {"anneal_func", "_schedule_phases", "total_steps"} <= set(state_dict):
            return state_dict
        phases, function = state_dict["_schedule_phases"], state_dict["anneal_func"]
        told = {
            "pct_start": (phases[0]["end_step"] + 1) / state_dict["total_steps"],
            "anneal_strategy": "linear" if "linear" in getattr(function, "__name__", str(function)) else "cos",
            "three_phase": len(phases) == 3,
        }
        return {**told, **{key: state_dict[key] for key in self.state_dict() if key in state_dict}}

    def _prepare(self) -> None:
        if self.total_steps is None:
            if self.end == INF:
                raise ValueError(f"{type(self).__name__} must know where its cycle ends; expected total_steps or end")
            self.total_steps = self.end - self.begin
        if self.end != INF and self.total_steps < self.end - self.begin:
            raise ValueError(
                f"Invalid total_steps: {self.total_steps}; expected at least {self.end - self.begin}, the steps from "
                f"begin={self.begin} to end={self.end} (by default the end of the run)"
            )
        highest = per_group("eta_max", self.eta_max, self.optimizer, self.param_name)
        if self.last_step == -1:
            for group, value in zip(self.optimizer.param_groups, highest, strict=True):
                initial = value / self.div_factor
                group.update(initial_lr=initial, max_lr=value, min_lr=initial / self.final_div_factor)

    def _take_in_new_groups(self) -> None:
        refuse_new_groups(self)

    def _phases(self) -> list[tuple[float, int, int]]:
        """The last step of each phase, and which values are at its start and end."""
        assert self.total_steps is not None
        up, last = self.pct_start * self.total_steps - 1, self.total_steps - 1
        if self.three_phase:
            return [(up, _INITIAL, _MAX), (2 * up, _MAX, _INITIAL), (last, _INITIAL, _MIN)]
        return [(up, _INITIAL, _MAX), (last, _MAX, _MIN)]

    def _bases(self) -> Sequence[Any]:
        return [(group["initial_lr"], group["max_lr"], group["min_lr"]) for group in self.optimizer.param_groups]

    def _factor(self) -> tuple[int, int, float]:
        """Which values are at both ends of the phase, and how far along it the step is."""
        assert self.total_steps is not None
        if self.last_step > self.total_steps:
            raise ValueError(f"{type(self).__name__} was stepped more than total_steps={self.total_steps} times")
        phases = self._phases()
        index = next((index for index, phase in enumerate(phases) if self.last_step <= phase[0]), len(phases) - 1)
        start = phases[index - 1][0] if index else 0.0
        end, origin, target = phases[index]
        share = (self.last_step - start) / (end - start) if end != start else 1.0
        return origin, target, share if self.anneal_strategy == "linear" else 1 + math.cos(math.pi * share)

    def _move(self, base: Any) -> Callable[[Any, Any], Any]:
        if self.anneal_strategy == "linear":
            return lambda _, factor: base[factor[0]] + (base[factor[1]] - base[factor[0]]) * factor[2]
        return lambda _, factor: base[factor[1]] + (base[factor[0]] - base[factor[1]]) / 2 * factor[2]


@PARAM_SCHEDULERS.register_module()
class OneCycleLR(LRSchedulerMixin, OneCycleParamScheduler):
    """:class:`OneCycleParamScheduler` of the learning rate.

    Args:
        optimizer: an optimizer, or a wrapper of one.
        eta_max: the highest value, or a list with one for each parameter group.
        total_steps: length of the cycle; ``end - begin`` by default.
        pct_start: share of the steps that rise, from 0 to 1.
        anneal_strategy: ``'cos'`` or ``'linear'``.
        div_factor: the highest value divided by the first, above 0.
        final_div_factor: the first value divided by the last, above 0.
        three_phase: fall to the first value in as many steps as it rose, and then to the last value.
        begin, end, last_step, by_epoch, verbose: see :class:`_ParamScheduler`.
    """
