"""The self-test: a GPU kernel proves itself on the device before an optimizer is given to it.

Each mode of a step (see Note [Three modes]) is run a few times on small tensors, once with values that a loss scaler
skips, and all that it leaves is compared with the reference backend, which runs on the CPU in float64. An optimizer
that keeps state in fewer bits is given a backend that has made these steps with its forms; there, the reference keeps
them too: see :mod:`fusedopt.backends.selftest_kept`.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..messages import SUPPORTED_DTYPES
from ..rules import PLAIN, RULES, NormClip, Precision, Rule
from ..rules.bounds import CLIPPED_ROUNDINGS, ROUNDINGS, error_bound
from .base import Backend, StepReport, StepRequest
from .reference import ReferenceBackend
from .selftest_kept import difference, on_trial

__all__ = [
    "MODES",
    "VARIABLE",
    "Result",
    "Verdict",
    "judge",
    "must_wait",
    "on_trial",
    "switched_on",
    "table",
    "try_mode",
]

#: Environment variable that turns the self-test off with 0.
VARIABLE = "FUSEDOPT_SELFTEST"
MODES = ("bare", "check", "full")

# One that is more than a chunk, so that vectors, the tail of a chunk and several chunks are at work, and a small one,
# whose gradient has other strides.
_SHAPES = ((2085,), (5, 7))

#: What was found out in this process: None, or what is wrong.
_found: dict[tuple[type[Backend], str, torch.device, torch.dtype, Precision], str | None] = {}

#: Settings with which :func:`table` tries the forms in which state can be kept, and parameters of which dtype.
_KEPT: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"state_dtype": "bfloat16", "stochastic_rounding": True}),
    (torch.float32, {"state_dtype": "float16", "ema": {"decay": 0.999}}),
    (torch.float32, {"state_dtype": "int8"}),
    (torch.float32, {"state_dtype": "int8", "stochastic_rounding": True}),
    (torch.bfloat16, {"state_dtype": "bfloat16", "stochastic_rounding": True}),
    (torch.bfloat16, {"state_dtype": "bfloat16", "master": "split"}),
    (torch.bfloat16, {"state_dtype": "int8", "master": "split8"}),
    (torch.float16, {"state_dtype": "float16", "master": "float32"}),
)


class Verdict(NamedTuple):
    """What is wrong with a backend, if anything, and whether some of it is still to be found out."""

    problem: str | None
    postponed: bool


class Result(NamedTuple):
    """A row of the table: ``problem`` is None where everything is as it should be."""

    rule: str
    dtype: str
    mode: str
    problem: str | None


def switched_on() -> bool:
    """Whether there is to be a self-test.

    Raises:
        ValueError: the environment says neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} in the environment: {value!r}; expected 0 or 1")
    return value == "1"


def must_wait(device: torch.device) -> bool:
    """Whether nothing can be run and read on ``device`` now: a graph is captured, or tensors are not real ones."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    module = torch.get_device_module(device)
    probe = getattr(module, "is_current_stream_capturing", None)
    if probe is None:
        return False
    with module.device(device):
        there = probe()
    return there or probe()


def judge(
    backend: type[Backend],
    rule: Rule,
    devices: Iterable[torch.device],
    dtypes: Iterable[torch.dtype],
    precision: Precision = PLAIN,
) -> Verdict:
    """Run the self-test as far as this process has not yet; what was found out stays."""
    postponed = False
    precision = on_trial(precision)
    unproved = [device for device in devices if backend.must_prove_itself(device)]
    for device in sorted(unproved, key=str) if switched_on() else ():
        for dtype in (known for known in SUPPORTED_DTYPES if known in set(dtypes)):
            key = (backend, rule.name, device, dtype, precision)
            if key not in _found:
                if must_wait(device):
                    postponed = True
                    continue
                try:
                    problems = (try_mode(backend, rule, device, dtype, mode, precision) for mode in MODES)
                    _found[key] = next((problem for problem in problems if problem is not None), None)
                except torch.OutOfMemoryError:  # which tells nothing of the kernels
                    postponed = True
                    continue
            if (problem := _found[key]) is not None:
                return Verdict(f"its self-test on {device} failed: {problem}", postponed)
    return Verdict(None, postponed)


def table(backend: type[Backend], device: torch.device) -> Iterator[Result]:
    """Run all of it, whatever was found out before: each rule that the backend has, in each dtype and mode.

    Then, in the longest mode, forms that keep state in fewer bits.
    """
    for rule in RULES.values():
        if backend.unavailable_for(rule) is not None:
            continue
        for dtype in SUPPORTED_DTYPES:
            for mode in MODES:
                problem = try_mode(backend, rule, device, dtype, mode)
                yield Result(rule.name, _name(dtype), mode, problem)
        for dtype, settings in _KEPT:
            precision = on_trial(Precision.parse(rule, **settings))
            problem = try_mode(backend, rule, device, dtype, "full", precision)
            yield Result(rule.name, _name(dtype), f"full, {_words(rule, precision)}", problem)


def try_mode(
    backend: type[Backend],
    rule: Rule,
    device: torch.device,
    dtype: torch.dtype,
    mode: str,
    precision: Precision = PLAIN,
) -> str | None:
    """Make the steps of one mode, and tell in what they differ from the reference: None when in nothing.

    Args:
        backend: to make them.
        rule: whose.
        device: where.
        dtype: of the parameters.
        mode: one of :data:`MODES`.
        precision: in what form state is kept, as :func:`fusedopt.backends.selftest_kept.on_trial` has it.

    Raises:
        torch.OutOfMemoryError: there was no memory for them.
    """
    where = f"rule {rule.name}, {_name(dtype)}, mode {mode}"
    if not precision.is_plain:
        where += f", {_words(rule, precision)}"
    try:
        with _undisturbed(device):
            problem = _run(backend.for_trial(rule, device, precision), device, dtype, mode)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a launch, of a compiler, of a driver: each has its own
        words = str(error).strip().splitlines() or [""]
        problem = f"{type(error).__name__}: {words[0]}"
    return None if problem is None else f"{where}: {problem}"


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Plain tensors, whatever the caller's modes are, and waiting allowed. All of it is put back afterwards."""
    waiting = torch.cuda.get_sync_debug_mode() if device.type == "cuda" and torch.cuda.is_initialized() else 0
    with torch.inference_mode(False), torch.no_grad():
        if waiting:
            torch.cuda.set_sync_debug_mode(0)
        try:
            yield
        finally:
            if waiting:
                torch.cuda.set_sync_debug_mode(waiting)


def _requests(mode: str, device: torch.device) -> Iterator[tuple[StepRequest, bool]]:
    """Two steps of a mode, and one that is to be skipped: an overflow, or the flag of a scaler that found one."""
    scale, zero, one = (torch.full((), value, dtype=torch.float32, device=device) for value in (4.0, 0.0, 1.0))
    if mode == "bare":
        yield StepRequest(), False
        yield StepRequest(scale, found_inf=zero), False
        yield StepRequest(scale, found_inf=one), True
    else:
        checked = StepRequest(scale, check=True, clip=NormClip(10.0) if mode == "full" else None)
        yield (StepRequest(clip=checked.clip) if mode == "full" else checked), False
        yield checked, False
        yield checked, True


def _made_up(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Values from 0.5 to 1.5."""
    return 0.5 + torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)


def _run(backend: Backend, device: torch.device, dtype: torch.dtype, mode: str) -> str | None:
    rule, precision = backend.rule, backend.precision
    generator = torch.Generator("cpu").manual_seed(0)
    sample = torch.zeros((), dtype=dtype, device="cpu")
    trials = [group for group in rule.trial_settings() if precision.refusal(rule, group, sample) is None]
    shapes = [shape for _ in trials for shape in _SHAPES]
    # A parameter and its gradient have one sign, so that nothing cancels and the bound is simple.
    signs = [torch.where(_made_up(generator, shape) < 1, -1.0, 1.0).double() for shape in shapes]
    values = [(sign * _made_up(generator, shape)).to(dtype) for sign, shape in zip(signs, shapes, strict=True)]
    params = [torch.nn.Parameter(value.to(device)) for value in values]
    groups = _groups(trials, params)
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    after = _contents(params, state)

    for number, (request, skipped) in enumerate(_requests(mode, device), start=1):
        grads = [(sign * _made_up(generator, shape)).to(dtype) for sign, shape in zip(signs, shapes, strict=True)]
        if skipped:
            grads[0][-1] = torch.inf if mode == "check" else torch.nan
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device) if grad.dim() == 1 else grad.t().contiguous().to(device).t()
        before = after

        wide = torch.float64 if precision.is_plain else dtype
        twins = [
            torch.nn.Parameter(now["param"].clone().view(shape).to(wide))
            for now, shape in zip(before, shapes, strict=True)
        ]
        twin_state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for twin, grad, now, param in zip(twins, grads, before, params, strict=True):
            twin.grad = grad.to(wide)
            for key, value in now.items():
                if key != "param":
                    stored = state[param][key]
                    of = torch.float64 if precision.is_plain else stored.dtype
                    twin_state[twin][key] = value.clone().view(stored.shape).to(of)
        expected = ReferenceBackend(rule, precision=precision).step(_groups(trials, twins), twin_state, request)
        report = backend.step(groups, state, request)
        after = _contents(params, state)

        problem = _differs_in_report(report, expected)
        if problem is None:
            exact = _contents(twins, twin_state)
            roundings = 0 if skipped else ROUNDINGS if request.clip is None else CLIPPED_ROUNDINGS
            if precision.is_plain:
                problem = _differs_in_contents(before, after, exact, dtype, roundings)
            else:
                columns = ({"param": twin, **twin_state[twin]} for twin in twins)
                stored_in = [{name: column.dtype for name, column in of.items()} for of in columns]
                rows = zip(before, after, exact, stored_in, strict=True)
                differences = (difference(precision, *row, roundings) for row in rows)
                problem = next((each for each in differences if each is not None), None)
        if problem is not None:
            return f"{problem} (step {number}{', which is to be skipped' if skipped else ''})"
    return None


def _groups(trials: Sequence[Mapping[str, Any]], params: Sequence[Tensor]) -> list[dict[str, Any]]:
    size = len(_SHAPES)
    return [{"params": list(params[i * size : (i + 1) * size]), **settings} for i, settings in enumerate(trials)]


def _contents(params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Of each parameter, it and its state by name: flat, in float64, on the CPU. The device is read once a name."""
    found: list[dict[str, Tensor]] = [{} for _ in params]
    tensors = [{"param": param.detach(), **state.get(param, {})} for param in params]
    for name in dict.fromkeys(name for each in tensors for name in each):
        owners = [i for i, each in enumerate(tensors) if name in each]
        flat = [tensors[i][name].reshape(-1) for i in owners]
        read = torch.cat(flat).to("cpu", torch.float64, copy=True).split([part.numel() for part in flat])
        for i, part in zip(owners, read, strict=True):
            found[i][name] = part
    return found


def _differs_in_contents(
    before: list[dict[str, Tensor]],
    after: list[dict[str, Tensor]],
    exact: list[dict[str, Tensor]],
    dtype: torch.dtype,
    roundings: int,
) -> str | None:
    """The first column that is not as it should be; without ``roundings`` it is to be exactly so."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name in dict.fromkeys(name for each in exact for name in each):
        owners = [i for i, each in enumerate(exact) if name in each]
        if not all(name in after[i] for i in owners):
            return f"{name} is missing"
        want, found = (torch.cat([each[i][name] for i in owners]) for each in (exact, after))
        bound = torch.zeros_like(want)
        if roundings and name != "step":
            was = torch.cat([before[i].get(name, torch.zeros_like(exact[i][name])) for i in owners])
            # The terms are at most as large as this, since nothing cancels. In float64 the reference rounds too.
            magnitude = (2 * was.abs() + want.abs()) * (2 if compute == torch.float64 else 1)
            bound = error_bound(want, magnitude, dtype, compute, roundings)
        if (problem := _differs(name, found, want, bound)) is not None:
            return problem
    return None


def _differs_in_report(report: StepReport, expected: StepReport) -> str | None:
    for name in ("grad_norm", "clip_coef", "found_inf"):
        found, exact = getattr(report, name), getattr(expected, name)
        if exact is not None:
            if found is None:
                return f"{name} is missing, expected {exact.item():.10g}"
            exact = exact.double().reshape(1)
            roundings = ROUNDINGS if found.dtype == torch.float32 else CLIPPED_ROUNDINGS
            bound = error_bound(exact, exact.abs(), found.dtype, found.dtype, roundings)
            found = found.detach().reshape(1).to("cpu", torch.float64)
            if (problem := _differs(name, found, exact, bound)) is not None:
                return problem
    return None


def _differs(name: str, found: Tensor, exact: Tensor, bound: Tensor) -> str | None:
    """Whether something is further from ``exact`` than ``bound``: both values, where it is worst."""
    error = (found - exact).abs()
    same = (error <= bound) | (found == exact) | (found.isnan() & exact.isnan())
    if bool(same.all()):
        return None
    excess = torch.where(same, -1.0, (error / bound.clamp(min=1e-300)).nan_to_num(torch.inf, torch.inf))
    worst = int(excess.argmax())
    return f"{name} is {found[worst].item():.10g}, expected {exact[worst].item():.10g}"


def _words(rule: Rule, precision: Precision) -> str:
    """Those settings that are not the usual ones."""
    return ", ".join(f"{name}={value!r}" for name, value in precision.settings(rule).items() if value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
