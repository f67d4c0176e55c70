"""The self-test: right kernels pass, wrong ones are noticed, named and passed over, and nothing else is disturbed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, HAS_EMULATOR, OPTIONS, EmulatedBackend, bits, module, parameters, set_gradients
from torch._subclasses import FakeTensorMode

import fusedopt
from fusedopt import backends
from fusedopt.backends import (
    Backend,
    BackendUnavailable,
    NativeBackend,
    ReferenceBackend,
    StepReport,
    TritonBackend,
    selftest,
)
from fusedopt.backends import triton as triton_backend
from fusedopt.cli import info, main
from fusedopt.rules import PLAIN, RULES, Precision

CPU = torch.device("cpu")
ADAM = RULES["adam"]

if module is None:
    pytest.skip("the compiled module is not built", allow_module_level=True)

TRITON_PROBLEM = TritonBackend.unavailable(CPU)
KINDS = [
    pytest.param(
        EmulatedBackend, id="emulated", marks=pytest.mark.skipif(not HAS_EMULATOR, reason="built without the emulator")
    ),
    pytest.param(
        TritonBackend, id="triton", marks=pytest.mark.skipif(bool(TRITON_PROBLEM), reason=f"{TRITON_PROBLEM}")
    ),
]
each_kind = pytest.mark.parametrize("kind", KINDS)
needs_emulator = KINDS[0].marks[0]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that makes these backends all there are, in this order; on a CPU too they have to prove themselves."""

    def replace(*kinds: type[Backend]) -> None:
        monkeypatch.setattr(backends, "BACKENDS", {kind.name: kind for kind in (*kinds, ReferenceBackend)})

    monkeypatch.setattr(NativeBackend, "must_prove_itself", classmethod(lambda cls, device: True))
    monkeypatch.setattr(TritonBackend, "must_prove_itself", classmethod(lambda cls, device: True))
    monkeypatch.setattr(selftest, "_found", {})
    monkeypatch.delenv("FUSEDOPT_SELFTEST", raising=False)
    backends._note_fallback.cache_clear()
    yield replace
    backends._note_fallback.cache_clear()


def mode_of(request: Any) -> str:
    return "full" if request.clip is not None else "check" if request.check else "bare"


class Fault:
    """What is wrong with a planted kernel: it does this after (or in place of) its step."""

    def __init__(self, mode: str, expect: str, act: Callable[..., StepReport]):
        self.mode, self.expect, self.act = mode, expect, act

    def planted_in(self, kind: type[Any]) -> type[Any]:
        fault = self

        class Faulty(kind):  # type: ignore[misc]
            name = f"faulty-{kind.name}"

            def step(self, groups: Any, state: Any, request: Any) -> StepReport:
                if mode_of(request) != fault.mode:
                    return super().step(groups, state, request)
                return fault.act(super().step, groups, state, request)

        return Faulty


def perturbs(column: str) -> Callable[..., StepReport]:
    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        report = step(groups, state, request)
        param = groups[-1]["params"][0]
        target = param if column == "param" else state[param][column]
        target.detach()[-1] += 0.125
        return report

    return act


def never_skips(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    if request.clip is None:
        return step(groups, state, request._replace(check=False))
    return step(groups, state, request._replace(found_inf=None))


def skips_without_a_word(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    report = step(groups, state, request)
    return StepReport(report._scalars, torch.zeros(()))


def updates_where_it_should_skip(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    report = step(groups, state, request)
    if float(report.found_inf or 0):
        step(groups, state, request._replace(check=False, found_inf=None))
    return report


def counts_a_skipped_step(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    report = step(groups, state, request)
    if report.found_inf is not None and float(report.found_inf):
        for mine in state.values():
            mine["step"] += 1
    return report


def leaves_counts(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    before = [state[param]["step"].clone() if "step" in state[param] else 0 for g in groups for param in g["params"]]
    report = step(groups, state, request)
    for param, count in zip((p for g in groups for p in g["params"]), before, strict=True):
        if "step" in state[param]:
            state[param]["step"].fill_(float(count))
    return report


def reports(norm: float = 1.0, coefficient: float = 1.0) -> Callable[..., StepReport]:
    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        report = step(groups, state, request)
        factors = torch.tensor([norm, coefficient], dtype=report._scalars.dtype)
        return StepReport(report._scalars * factors, report.found_inf)

    return act


def fails(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
    raise RuntimeError("CUDA error: invalid device function\nCUDA kernel errors might be reported later")


FAULTS = {
    "param": Fault("bare", r"mode bare: param is [-\d.e+]+, expected [-\d.e+]+ \(step 1\)", perturbs("param")),
    "exp_avg": Fault("check", r"mode check: exp_avg is [-\d.e+]+, expected [-\d.e+]+ \(step 1\)", perturbs("exp_avg")),
    "exp_avg_sq": Fault("full", r"mode full: exp_avg_sq is .*, expected .* \(step 1\)", perturbs("exp_avg_sq")),
    "max": Fault("full", r"mode full: max_exp_avg_sq is .*, expected .* \(step 1\)", perturbs("max_exp_avg_sq")),
    "count": Fault("bare", r"mode bare: step is 0, expected 1 \(step 1\)", leaves_counts),
    "no skip": Fault("check", r"mode check: found_inf is missing, expected 0 \(step 1\)", never_skips),
    "flag": Fault("check", r"found_inf is 0, expected 1 \(step 3, which is to be skipped\)", skips_without_a_word),
    "half a skip": Fault(
        "check", r"param is .*, expected .* \(step 3, which is to be skipped\)", updates_where_it_should_skip
    ),
    "flag handed in": Fault("bare", r"step is 3, expected 2 \(step 3, which is to be skipped\)", counts_a_skipped_step),
    "norm": Fault("full", r"mode full: grad_norm is .*, expected .* \(step 1\)", reports(norm=1 + 1e-5)),
    "coefficient": Fault("full", r"mode full: clip_coef is .*, expected .* \(step 1\)", reports(coefficient=0.5)),
    "launch": Fault("full", r"mode full: RuntimeError: CUDA error: invalid device function", fails),
}


# --- What it notices ---------------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("mode", selftest.MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=selftest._name)
@pytest.mark.parametrize("rule", RULES)
def test_right_kernels_pass_in_every_rule_dtype_and_mode(rule: str, dtype: torch.dtype, mode: str) -> None:
    assert selftest.try_mode(EmulatedBackend, RULES[rule], CPU, dtype, mode) is None


@pytest.mark.skipif(bool(TRITON_PROBLEM), reason=f"{TRITON_PROBLEM}")
@pytest.mark.parametrize(
    ("rule", "dtype", "mode"),
    [
        ("sgd", torch.float32, "full"),
        ("sgd", torch.float16, "check"),
        ("adam", torch.bfloat16, "full"),
        ("adam", torch.float64, "bare"),
        ("adam", torch.float32, "check"),
        *((rule, torch.float32, "full") for rule in RULES if rule not in ("sgd", "adam")),
    ],
)
def test_right_interpreted_kernels_pass(rule: str, dtype: torch.dtype, mode: str) -> None:
    if (reason := TritonBackend.unavailable_for(RULES[rule])) is not None:
        pytest.skip(reason)
    assert selftest.try_mode(TritonBackend, RULES[rule], CPU, dtype, mode) is None


@pytest.mark.slow
@pytest.mark.skipif(bool(TRITON_PROBLEM), reason=f"{TRITON_PROBLEM}")
def test_all_right_interpreted_kernels_pass() -> None:
    assert [result for result in selftest.table(TritonBackend, CPU) if result.problem is not None] == []


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_its_settings_use_every_column_of_a_rule(rule: Any) -> None:
    """And as many of them as any option."""
    assert {name for group in rule.trial_settings() for name in rule.needed_columns(group)} == {
        column.name for column in rule.columns
    }
    options = [settings for cls, settings in OPTIONS.values() if cls.rule is rule]
    groups = [rule.hyperparameters().as_defaults() | settings for settings in options]
    assert {len(rule.needed_columns(group)) for group in groups} == {
        len(rule.needed_columns(group)) for group in rule.trial_settings()
    }


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=selftest._name)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_noticed_and_named(fault: str, dtype: torch.dtype) -> None:
    planted = FAULTS[fault]
    for mode in selftest.MODES:
        found = selftest.try_mode(planted.planted_in(EmulatedBackend), ADAM, CPU, dtype, mode)
        if mode != planted.mode:
            assert found is None
        else:
            assert found is not None
            assert found.startswith(f"rule adam, {selftest._name(dtype)}, mode {mode}: ")
            assert re.search(planted.expect, found), found


@pytest.mark.skipif(bool(TRITON_PROBLEM), reason=f"{TRITON_PROBLEM}")
@pytest.mark.parametrize("fault", ["exp_avg_sq", "flag", "launch"])
def test_a_wrong_interpreted_kernel_is_noticed(fault: str) -> None:
    planted = FAULTS[fault]
    found = selftest.try_mode(planted.planted_in(TritonBackend), ADAM, CPU, torch.float32, planted.mode)
    assert found is not None
    assert re.search(planted.expect, found), found


@needs_emulator
def test_a_kernel_that_reports_the_coefficient_but_does_not_clip_by_it_is_noticed_in_every_dtype() -> None:
    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        grads = [param.grad.double().flatten() for group in groups for param in group["params"]]
        norm = torch.cat(grads).norm() / (1.0 if request.grad_scale is None else float(request.grad_scale))
        scalars = torch.stack((norm, (10 / (norm + 1e-6)).clamp(max=1.0)))
        dtype = torch.float64 if groups[0]["params"][0].dtype == torch.float64 else torch.float32
        return StepReport(scalars.to(dtype), step(groups, state, request._replace(clip=None)).found_inf)

    for dtype in DTYPES:
        found = selftest.try_mode(Fault("full", "", act).planted_in(EmulatedBackend), ADAM, CPU, dtype, "full")
        assert found is not None
        assert re.search(r"mode full: (param|exp_avg) is", found), found


# --- What comes of it --------------------------------------------------------------------------------------------


@each_kind
def test_auto_takes_the_next_with_one_warning(kind: type[Any], offer: Callable[..., None]) -> None:
    faulty = FAULTS["exp_avg"].planted_in(kind)
    offer(faulty)
    params = parameters([(3,)])
    text = (
        rf"fusedopt: faulty-{kind.name}: its self-test on cpu failed: rule adam, float32, mode check: exp_avg is "
        r"[-\d.e+]+, expected [-\d.e+]+ \(step 1\); using the slow reference backend"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        optimizer = fusedopt.FusedAdamW(params)
    assert len(caught) == 1
    assert optimizer.backend_in_use == "reference"
    assert fusedopt.FusedAdam(params).backend_in_use == "reference", "silent now: warnings are errors here"
    set_gradients(params, 0)
    optimizer.step()


@needs_emulator
def test_the_next_proves_itself_too(offer: Callable[..., None]) -> None:
    offer(FAULTS["norm"].planted_in(EmulatedBackend), FAULTS["count"].planted_in(NativeBackend), EmulatedBackend)
    with pytest.warns(UserWarning, match=r"faulty-emulated: .*grad_norm is.*; faulty-native: .*step is 0, expected 1"):
        assert fusedopt.FusedAdamW(parameters([(3,)])).backend_in_use == "emulated"


@needs_emulator
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_backend_that_was_named_raises(by: str, offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    offer(FAULTS["launch"].planted_in(EmulatedBackend))
    name = "faulty-emulated"
    if by == "environment":
        monkeypatch.setenv("FUSEDOPT_BACKEND", name)
    asked = "" if by == "argument" else r" \(from FUSEDOPT_BACKEND in the environment\)"
    text = (
        rf"backend '{name}'{asked} is not available: its self-test on cpu failed: rule sgd, bfloat16, mode full: "
        "RuntimeError: CUDA error: invalid device function"
    )
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match=text):
            fusedopt.FusedSGD(parameters([(3,)], torch.bfloat16), backend=name if by == "argument" else "auto")


class Counted(EmulatedBackend):
    """Counts the trials that it is made for."""

    name = "counted"
    trials = 0

    @classmethod
    def for_trial(cls, rule: Any, device: torch.device, precision: Any = PLAIN) -> Any:
        cls.trials += 1
        return super().for_trial(rule, device, precision)


@pytest.fixture
def counted(offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    if not HAS_EMULATOR:
        pytest.skip("built without the emulator")
    offer(Counted)
    monkeypatch.setattr(Counted, "trials", 0)
    return Counted


def test_it_runs_once_for_each_rule_and_dtype(counted: type[Counted]) -> None:
    fusedopt.FusedAdamW(parameters([(3,)]))
    assert counted.trials == 3
    fusedopt.FusedAdam(parameters([(3,)]), backend="counted")
    assert counted.trials == 3
    fusedopt.FusedSGD(parameters([(3,)]))
    assert counted.trials == 6
    fusedopt.FusedAdamW([*parameters([(3,)]), *parameters([(3,)], torch.bfloat16)])
    assert counted.trials == 9


def test_dtypes_that_come_later_are_tried_then(counted: type[Counted]) -> None:
    params = parameters([(3,), (2, 2)])
    optimizer = fusedopt.FusedAdamW(params[:1])
    set_gradients(params, 0)
    optimizer.step()
    added = parameters([(3,)], torch.float16)
    optimizer.add_param_group({"params": added})
    set_gradients(added, 0)
    optimizer.step()
    assert counted.trials == 6
    model = torch.nn.Linear(3, 3)
    optimizer = fusedopt.FusedAdamW(model.parameters())
    assert counted.trials == 6
    model.to(torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert counted.trials == 9
    assert optimizer.backend_in_use == "counted"
    assert float(optimizer.state[model.bias]["step"]) == 1
    optimizer.step()
    assert counted.trials == 9


@needs_emulator
def test_a_dtype_that_comes_later_may_change_the_backend(offer: Callable[..., None]) -> None:
    class OnlyFloat(EmulatedBackend):
        name = "only-float"

        def step(self, groups: Any, state: Any, request: Any) -> StepReport:
            if groups[0]["params"][0].dtype != torch.float32:
                raise RuntimeError("no such kernel")
            return super().step(groups, state, request)

    offer(OnlyFloat)
    model = torch.nn.Linear(3, 3)
    optimizer = fusedopt.FusedAdamW(model.parameters())
    assert optimizer.backend_in_use == "only-float"
    optimizer.add_param_group({"params": parameters([(3,)], torch.bfloat16)})
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="bfloat16, mode bare: RuntimeError: no such kernel; using the slow reference"):
        optimizer.step()
    assert optimizer.backend_in_use == "reference"


def test_it_can_be_turned_off(counted: type[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_SELFTEST", "0")
    optimizer = fusedopt.FusedAdamW(parameters([(3,)]))
    assert (counted.trials, optimizer.backend_in_use) == (0, "counted")
    assert "the self-test is off" in info.info()
    monkeypatch.setenv("FUSEDOPT_SELFTEST", "1")
    fusedopt.FusedAdamW(parameters([(3,)]))
    assert counted.trials == 3


@pytest.mark.parametrize("value", ["2", "no", "true", "-0"])
def test_another_value_is_a_mistake(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_SELFTEST", value)
    with pytest.raises(
        ValueError, match=re.escape(f"FUSEDOPT_SELFTEST in the environment: {value!r}; expected 0 or 1")
    ):
        fusedopt.FusedAdamW(parameters([(3,)]))


def test_what_runs_on_a_cpu_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "try_mode", lambda *arguments: pytest.fail("tried"))
    assert fusedopt.FusedAdamW(parameters([(3,)])).backend_in_use == "native"


# --- State in fewer bits -----------------------------------------------------------------------------------------

BRAIN, FLOAT = torch.bfloat16, torch.float32
KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "bfloat16 states": (FLOAT, {"state_dtype": "bfloat16"}),
    "bfloat16 states by chance": (FLOAT, {"state_dtype": "bfloat16", "stochastic_rounding": True}),
    "roots": (FLOAT, {"state_dtype": "float16", "ema": {"decay": 0.9}}),
    "codes": (FLOAT, {"state_dtype": "int8"}),
    "codes by chance of float64": (torch.float64, {"state_dtype": "int8", "stochastic_rounding": {"seed": 9}}),
    "weights by chance": (BRAIN, {"stochastic_rounding": True, "ema": {"momentum": 0.1, "begin": 50}}),
    "master": (torch.float16, {"master": "float32", "state_dtype": "float16"}),
    "split": (BRAIN, {"master": "split", "state_dtype": "bfloat16", "ema": {"decay": 0.99}}),
    "split8": (BRAIN, {"master": "split8", "state_dtype": "int8", "stochastic_rounding": True}),
}


def trial_of(kept: str, rule: Any = ADAM) -> tuple[torch.dtype, Precision]:
    dtype, settings = KEPT[kept]
    return dtype, selftest.on_trial(Precision.parse(rule, **settings))


@each_kind
@pytest.mark.parametrize("kept", KEPT)
def test_right_kernels_pass_with_state_in_fewer_bits(kept: str, kind: type[Any]) -> None:
    modes = selftest.MODES if kind is EmulatedBackend else ("full",) if kept in ("roots", "split8") else ()
    for rule in RULES.values() if kind is EmulatedBackend else [ADAM]:
        dtype, precision = trial_of(kept, rule)
        for mode in modes:
            assert selftest.try_mode(kind, rule, CPU, dtype, mode, precision) is None


def moves(key: str, by: Callable[[torch.Tensor], None]) -> Callable[..., StepReport]:
    """Does something to a column of the last parameter of the first group."""

    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        report = step(groups, state, request)
        param = groups[0]["params"][0]
        by(param.detach() if key == "param" else state[param][key])
        return report

    return act


def next_but_one(bits_of: torch.dtype, at: int = 7) -> Callable[[torch.Tensor], None]:
    def move(column: torch.Tensor) -> None:
        column.view(-1).view(bits_of)[at] += 2

    return move


def last_scale(column: torch.Tensor) -> None:
    column[-2:].view(torch.int16)[0] += 2


def padding(column: torch.Tensor) -> None:
    column[2085] = 1


def stays(key: str) -> Callable[..., StepReport]:
    """Does not write a column."""

    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        before = [{k: v.clone() for k, v in state.get(p, {}).items()} for g in groups for p in g["params"]]
        report = step(groups, state, request)
        for param, mine in zip((p for g in groups for p in g["params"]), before, strict=True):
            state[param][key].copy_(mine.get(key, torch.zeros_like(state[param][key])))
        return report

    return act


KEPT_FAULTS: dict[str, tuple[str, str, Callable[..., StepReport]]] = {
    "moment": ("bfloat16 states", r"exp_avg is .*, expected", moves("exp_avg", next_but_one(torch.int16))),
    "root": ("roots", r"exp_avg_sq_root is .*, expected", moves("exp_avg_sq_root", next_but_one(torch.int16))),
    "code": ("codes", r"exp_avg_codes is \d+, expected \d+", moves("exp_avg_codes", next_but_one(torch.uint8))),
    "scale": ("codes", r"exp_avg_sq_codes, a scale, is", moves("exp_avg_sq_codes", last_scale)),
    "padding": ("codes", r"exp_avg_codes is 1 after its last code, expected 0", moves("exp_avg_codes", padding)),
    "low bits": ("split", r"param with master_low is .*, expected", moves("master_low", lambda low: low.add_(999))),
    "no low bits": ("split8", r"param with master_low", stays("master_low")),
    "master": ("master", r"master is .*, expected", moves("master", lambda master: master.mul_(1 + 1e-5))),
    "rounded master": ("master", r"param is .*, expected", moves("param", next_but_one(torch.int16))),
    "average": ("roots", r"ema is .*, expected", stays("ema")),
    "average of a split": ("split", r"ema is .*, expected", moves("ema", lambda average: average.mul_(1 + 1e-5))),
    "half a skip": ("codes", r"\(step 3, which is to be skipped\)", updates_where_it_should_skip),
}


@needs_emulator
@pytest.mark.parametrize("fault", KEPT_FAULTS)
def test_a_kernel_that_keeps_state_wrongly_is_noticed_and_named(fault: str) -> None:
    kept, expect, act = KEPT_FAULTS[fault]
    dtype, precision = trial_of(kept)
    faulty = Fault("check", expect, act).planted_in(EmulatedBackend)
    found = selftest.try_mode(faulty, ADAM, CPU, dtype, "check", precision)
    assert found is not None
    assert found.startswith(f"rule adam, {selftest._name(dtype)}, mode check, ")
    assert "=" in found.split(":")[0]
    assert re.search(expect, found), found


@needs_emulator
@pytest.mark.parametrize(
    "kept", ["bfloat16 states by chance", "codes", "codes by chance of float64", "weights by chance", "split8"]
)
def test_other_random_bits_are_noticed(kept: str) -> None:
    class Otherwise(EmulatedBackend):
        name = "otherwise"

        def _how_state_is_kept(self) -> dict[str, Any]:
            keys, master, (draws, seed), average, numbers = super()._how_state_is_kept()["precision"]
            return {"precision": (keys, master, (draws, seed + 1), average, numbers)}

    dtype, precision = trial_of(kept)
    found = selftest.try_mode(Otherwise, ADAM, CPU, dtype, "full", precision)
    assert found is not None
    assert re.search(r"\d+ of \d+ were rounded otherwise than expected \(step 1\)", found), found


@needs_emulator
def test_rounding_to_nearest_in_the_place_of_chance_is_noticed() -> None:
    class Nearest(EmulatedBackend):
        name = "nearest"

        def _how_state_is_kept(self) -> dict[str, Any]:
            keys, master, _, average, numbers = super()._how_state_is_kept()["precision"]
            return {"precision": (keys, master, (False, 0), average, numbers)}

    for kept in ("bfloat16 states by chance", "weights by chance", "split8"):
        dtype, precision = trial_of(kept)
        assert "rounded otherwise" in (selftest.try_mode(Nearest, ADAM, CPU, dtype, "bare", precision) or "")


def test_each_precision_is_proved_once_whatever_its_seed_and_average(counted: type[Counted]) -> None:
    def make(**settings: Any) -> int:
        fusedopt.FusedAdamW(parameters([(3,)]), **settings)
        return counted.trials

    assert make(state_dtype="int8") == 3
    assert make(state_dtype="int8") == 3
    assert make(state_dtype="int8", stochastic_rounding=True) == 6
    assert make(state_dtype="int8", stochastic_rounding={"seed": 7}) == 6
    assert make(ema={"decay": 0.9}) == 9
    assert make(ema={"momentum": 0.2, "begin": 4}) == 9
    assert make() == 12


@needs_emulator
def test_a_fault_in_the_forms_that_an_optimizer_uses_costs_that_optimizer_the_backend(
    offer: Callable[..., None],
) -> None:
    def act(step: Any, groups: Any, state: Any, request: Any) -> StepReport:
        report = step(groups, state, request)
        for mine in state.values():
            if "exp_avg_codes" in mine:
                mine["exp_avg_codes"][0] += 2
        return report

    offer(Fault("bare", "", act).planted_in(EmulatedBackend))
    assert fusedopt.FusedAdamW(parameters([(3,)])).backend_in_use == "faulty-emulated"
    text = "rule adam, float32, mode bare, state_dtype=.*int8.*: exp_avg_codes is .*; using the slow reference backend"
    with pytest.warns(UserWarning, match=text):
        assert fusedopt.FusedAdamW(parameters([(3,)]), state_dtype="int8").backend_in_use == "reference"


# --- When it has to wait -----------------------------------------------------------------------------------------


def test_in_a_capture_it_waits_for_the_next_step_outside_of_one(
    counted: type[Counted], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "must_wait", lambda device: True)
    params = parameters([(3,)])
    optimizer = fusedopt.FusedAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    backend = optimizer._backend
    assert (counted.trials, optimizer.backend_in_use) == (0, "counted")
    monkeypatch.setattr(selftest, "must_wait", lambda device: False)
    optimizer.step()
    assert counted.trials == 3
    assert optimizer._backend is backend, "what a graph has captured is kept"
    optimizer.step()
    assert counted.trials == 3


@needs_emulator
def test_a_fault_that_is_found_after_a_capture_has_the_same_consequences(
    offer: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(FAULTS["count"].planted_in(EmulatedBackend))
    monkeypatch.setattr(selftest, "must_wait", lambda device: True)
    chosen, named = (fusedopt.FusedAdamW(parameters([(3,)]), backend=name) for name in ("auto", "faulty-emulated"))
    monkeypatch.setattr(selftest, "must_wait", lambda device: False)
    with pytest.warns(UserWarning, match="step is 0, expected 1"):
        chosen.step()
    assert chosen.backend_in_use == "reference"
    with pytest.raises(BackendUnavailable, match="step is 0, expected 1"):
        named.step()


def test_a_capture_is_looked_for_on_the_device_and_on_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        def __init__(self) -> None:
            self.current, self.captured = 0, -1

        def device(self, device: torch.device) -> Module:
            self.wanted = device.index
            return self

        def __enter__(self) -> None:
            self.previous, self.current = self.current, self.wanted

        def __exit__(self, *_: object) -> None:
            self.current = self.previous

        def is_current_stream_capturing(self) -> bool:
            return self.current == self.captured

    gpus = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: gpus)
    for gpus.captured, waits in ((-1, False), (0, True), (1, True), (2, False)):
        assert selftest.must_wait(torch.device("cuda", 1)) == waits
    assert gpus.current == 0


def test_where_tensors_are_not_real_it_waits(counted: type[Counted]) -> None:
    params = parameters([(3,)])
    with FakeTensorMode():
        optimizer = fusedopt.FusedAdamW(params)
    assert counted.trials == 0
    assert optimizer.backend_in_use == "counted"
    assert counted.trials == 3


def test_without_memory_it_waits(counted: type[Counted], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(selftest, "_run", no_memory)
        optimizer = fusedopt.FusedAdamW(parameters([(3,)]))
    assert optimizer.backend_in_use == "counted"
    assert counted.trials == 4


# --- What it leaves alone ----------------------------------------------------------------------------------------


def surroundings() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        [name, list(keys), *rest],
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
        module.cpu_isa(),
    ]


@needs_emulator
@pytest.mark.parametrize("around", ["nothing", "inference mode", "no grad", "meta", "float64", "deterministic"])
def test_it_disturbs_nothing_and_nothing_disturbs_it(around: str) -> None:
    def check() -> None:
        before = surroundings()
        for mode in selftest.MODES:
            assert selftest.try_mode(EmulatedBackend, ADAM, CPU, torch.float32, mode) is None
        assert surroundings() == before
        assert selftest.try_mode(FAULTS["launch"].planted_in(EmulatedBackend), ADAM, CPU, torch.float32, "full")
        assert surroundings() == before

    if around == "inference mode":
        with torch.inference_mode():
            check()
    elif around == "no grad":
        with torch.no_grad():
            check()
    elif around == "meta":
        with torch.device("meta"):
            check()
    elif around == "float64":
        torch.set_default_dtype(torch.float64)  # conftest.py puts it back
        check()
    elif around == "deterministic":
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            check()
        finally:
            torch.use_deterministic_algorithms(False)
    else:
        check()


def test_waiting_is_allowed_for_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [2]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with selftest._undisturbed(torch.device("cuda", 0)):
        assert modes == [2, 0]
    assert modes == [2, 0, 2]


def test_the_parameters_of_the_optimizer_are_not_touched(counted: type[Counted]) -> None:
    params = parameters([(3,), (5, 7)])
    set_gradients(params, 0)
    before = bits([*params, *(param.grad for param in params)])
    optimizer = fusedopt.FusedAdamW(params)
    assert counted.trials == 3
    assert bits([*params, *(param.grad for param in params)]) == before
    assert not optimizer.state


def test_tritons_launches_are_not_tuned_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if TRITON_PROBLEM:
        pytest.skip(TRITON_PROBLEM)
    known = triton_backend.Tuning(512, 4)
    monkeypatch.setattr(triton_backend, "_chosen", {})
    monkeypatch.setattr(triton_backend.Launcher, "_measure", lambda *arguments: pytest.fail("tuned"))
    monkeypatch.setattr(triton_backend.Launcher, "_kept_tuning", lambda self, key: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    made = []
    monkeypatch.setattr(triton_backend, "_make_plan", lambda launcher, shards: made.append(launcher))
    TritonBackend.for_trial(ADAM, torch.device("cuda", 0))
    (launcher,) = made
    launcher.interpreted = False
    dtypes = (0, 0, 0, 0, -1)
    assert launcher.tuning_for(0, dtypes) == triton_backend._TUNINGS[0]
    assert not triton_backend._chosen, "a later step finds it out"
    monkeypatch.setattr(triton_backend.Launcher, "_kept_tuning", lambda self, key: known)
    assert launcher.tuning_for(0, dtypes) == known


@needs_emulator
def test_it_is_a_few_launches() -> None:
    before = module.emulator.launch_count()
    for mode in selftest.MODES:
        selftest.try_mode(EmulatedBackend, ADAM, CPU, torch.float32, mode)
    assert module.emulator.launch_count() - before <= 60


# --- The table ---------------------------------------------------------------------------------------------------

#: Of a rule: all dtypes in all modes, and forms in fewer bits.
ROWS = 4 * 3 + len(selftest._KEPT)


@needs_emulator
def test_the_table_has_every_rule_dtype_and_mode() -> None:
    text, good = info.self_test([CPU], [EmulatedBackend])
    assert good
    rows = text.splitlines()
    assert len(rows) == len(RULES) * ROWS
    assert all(row.endswith("  ok") for row in rows)
    assert rows[0].startswith("emulated on cpu: sgd, float32, bare  ")


@needs_emulator
def test_a_difference_is_in_the_table_and_in_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], offer: Callable[..., None]
) -> None:
    faulty = FAULTS["norm"].planted_in(EmulatedBackend)
    monkeypatch.setattr(info, "BACKENDS", {"faulty": faulty, "reference": ReferenceBackend})
    monkeypatch.setattr(info, "_devices", lambda: [CPU, CPU])  # the first is left out: it is always the CPU
    monkeypatch.setattr(info, "info", lambda: "")
    assert main(["info", "--selftest"]) == 1
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("faulty-emulated on cpu: ")]
    assert len(rows) == len(RULES) * ROWS
    wrong = [row for row in rows if not row.endswith("  ok")]
    assert len(wrong) == len(RULES) * (4 + len(selftest._KEPT))
    assert all(re.search(r"mode full.*: grad_norm is [\d.]+, expected [\d.]+ \(step 1\)$", row) for row in wrong)


def test_a_backend_that_cannot_serve_is_listed_with_the_reason() -> None:
    text, good = info.self_test([torch.device("meta")], [NativeBackend])
    assert good
    assert re.fullmatch(r"native on meta +not tried: this build has no kernels for meta tensors", text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--selftest"]) == 0
    assert "self-test: there is no GPU here" in capsys.readouterr().out
