"""Runs one case: checks every contender, then times those with right results."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import OPTIMIZERS, RECIPES, SCALE, Case
from .contenders import CONTENDERS, OURS, Contender, initial_tensors
from .measure import BandwidthProbe, CacheFlush, Quantiles, Times, interleave, paired_ratio
from .memory import PeakMemory

__all__ = ["CHECKED_STEPS", "Result", "expected", "find_wrong", "run"]

#: Factors on the gradients (of the first micro-batch) in the steps before the results are compared. They differ widely,
#: so that an optimizer that forgets the moments, or their maximum, is noticed.
CHECKED_STEPS = (1.0, 1 / 64)
# Allowed difference, as a share of the largest change of the parameters in those steps: a few roundings of parameters,
# gradients or state; much more for quantized state.
_TOLERANCES = {"fp32": 2e-5, "bf16": 0.1, "fp16": 0.02, "bf16-grads": 2e-5, "fp16-grads": 2e-5}
_ACCUMULATED = {"bf16-grads": 0.02, "fp16-grads": 0.005}  # sums of the micro-batches' gradients are rounded
_APPROXIMATE = 0.3
_PROBE = "bandwidth"
# With fewer elements, memory bandwidth is not the limit.
_LARGE = 10**6


@dataclass
class Result:
    """The results of one case.

    Attributes:
        case: the case.
        times: times of each contender that was timed.
        left_out: the reason for each other contender: not available here, or a wrong result.
        extra_memory: peak bytes that a step takes beyond those in use before it; None if unknown.
        bandwidth: memory bandwidth in each round, in bytes per second; empty for a case too small to be limited by it.
            On a GPU, both it and the times compared with it are ``Times.queued``.
    """

    case: Case
    times: dict[str, Times] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    extra_memory: dict[str, int | None] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)

    def seconds(self, name: str) -> Quantiles:
        """Seconds of a step."""
        return Quantiles.of(self.times[name].total)

    def ratio(self, name: str, to: str = OURS) -> tuple[Quantiles, tuple[float, float]]:
        """How many times as long as ``to`` a contender takes, and the 95 % interval of the median."""
        return paired_ratio(self.times[name].total, self.times[to].total)

    def bytes_per_second(self, name: str) -> float:
        """Bytes per second, if the contender moves exactly what two passes have to move."""
        return self._moved(name) / statistics.median(self.times[name].work)

    def share_of_bandwidth(self, name: str) -> float:
        """``bytes_per_second`` divided by the memory bandwidth of the same round: the median of the rounds."""
        moved = self._moved(name)
        rounds = zip(self.times[name].work, self.bandwidth, strict=True)
        return statistics.median(moved / seconds / bandwidth for seconds, bandwidth in rounds)

    def _moved(self, name: str) -> float:
        """Bytes that two passes of a contender have to move."""
        known = CONTENDERS.get(name, Contender)
        return self.case.parameters * known.bytes_moved(self.case)


def expected(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, initial, after the CHECKED_STEPS) of each parameter: torch's for-loop optimizer in float64."""
    recipe, spec = RECIPES[case.recipe], OPTIMIZERS[case.optimizer]
    norm = math.sqrt(sum(float(grad.double().square().sum()) for _, _, grad in initial_tensors(case)))
    multipliers = []
    for factor in CHECKED_STEPS:
        multiplier = (factor + recipe.accumulate - 1) / (SCALE if recipe.amp else 1.0)
        coefficient = min(1.0, case.max_norm / (norm * multiplier + 1e-6)) if recipe.clip else 1.0
        multipliers.append(multiplier * coefficient)
    settings = {name: case.settings(group) for group in case.groups for name in group}
    for name, param, grad in initial_tensors(case):
        exact = param.double().requires_grad_()
        optimizer = getattr(torch.optim, spec.name)([exact], foreach=False, fused=False, **settings[name])
        for multiplier in multipliers:
            exact.grad = grad.double() * multiplier
            optimizer.step()
        yield name, param, exact.detach()


def find_wrong(case: Case, contenders: dict[str, Contender]) -> dict[str, str]:
    """The reason for each contender whose parameters are wrong after the CHECKED_STEPS."""
    wrong: dict[str, str] = {}
    tolerances = {**_TOLERANCES, **(_ACCUMULATED if RECIPES[case.recipe].accumulate > 1 else {})}
    for parameter, before, after in expected(case):
        if not after.numel():
            continue
        change = float((after - before).abs().max())
        for name, contender in contenders.items():
            allowed = _APPROXIMATE if contender.approximate else tolerances[case.dtype]
            error = float((contender.whole(parameter) - after).abs().max()) / max(change, 1e-30)
            if not error <= allowed:  # also catches NaN
                text = f"wrong result: {parameter} is off by {error:.2g} of its change (allowed: {allowed:g})"
                wrong.setdefault(name, text)
    return wrong


def _extra_memory(contender: Contender, steps: int = 3) -> int | None:
    memory = PeakMemory(torch.device(contender.case.device))
    peaks = []
    for _ in range(steps):
        contender.prepare()
        memory.start()
        contender()
        peak = memory.stop()
        if peak is None:
            return None
        peaks.append(peak)
    return sorted(peaks)[len(peaks) // 2]


def run(
    case: Case,
    names: Sequence[str],
    rounds: int,
    flush: CacheFlush | None = None,
    probe: BandwidthProbe | None = None,
) -> Result:
    """Check the contenders of a case, and time those that are available and right, interleaved.

    Args:
        case: the case to run.
        names: keys of ``CONTENDERS``.
        rounds: number of rounds, each of which runs every contender once.
        flush: run before each timed step, unless the case is warm; None makes one.
        probe: timed among the contenders of a large case; None makes one.
    """
    result = Result(case)
    device = torch.device(case.device)
    contenders: dict[str, Contender] = {}
    gradients = {name: grad for name, _, grad in initial_tensors(case)}
    for name in names:
        reason = CONTENDERS[name].unavailable(case)
        if reason is None:
            try:
                contender = CONTENDERS[name](case, gradients)
                for factor in CHECKED_STEPS:
                    contender.set_gradients(factor)
                    contender()
                contender.set_gradients()
                contenders[name] = contender
                continue
            except Exception as error:  # another package's fault
                if name.startswith(OURS):
                    raise
                reason = f"fails: {type(error).__name__}: {error}".splitlines()[0]
        result.left_out[name] = reason
    for name, reason in find_wrong(case, contenders).items():
        result.left_out[name] = reason
        del contenders[name]
    if not case.warm and flush is None:
        flush = CacheFlush(device)

    functions: dict[str, Callable[[], object]] = {**contenders}
    if case.parameters >= _LARGE and not case.warm:  # the probe would evict the caches
        functions[_PROBE] = probe = probe or BandwidthProbe(device)

    def prepare(name: str) -> None:
        if name in contenders:
            contenders[name].prepare()
            if case.warm:
                contenders[name]()
                contenders[name].prepare()
        if flush is not None and not case.warm:
            flush()

    def prepare_queued(name: str) -> None:
        if name in contenders:
            contenders[name].prepare()
        if flush is not None:
            flush.read()

    queues = device.type == "cuda" and _PROBE in functions
    result.times = interleave(functions, rounds, prepare, device, prepare_queued=prepare_queued if queues else None)
    if probe is not None and _PROBE in result.times:
        result.bandwidth = [probe.moved / seconds for seconds in result.times.pop(_PROBE).work]
    result.extra_memory = {name: _extra_memory(contender) for name, contender in contenders.items()}
    contenders.clear()
    functions.clear()
    contender = None  # type: ignore[assignment]
    gc.collect()  # some are in reference cycles
    return result
