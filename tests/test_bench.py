"""The benchmark's own measures: right optimizers are let in, wrong ones are not, and figures are what they say."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import math
import os
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from test_cli import mistake

from benchmarks.peers import Apex, Peer
from fusedopt.backends import NativeBackend
from fusedopt.bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS, Case, Contender, Result, run
from fusedopt.bench import measure as measure_module
from fusedopt.bench.cases import SCALE
from fusedopt.bench.contenders import OURS, RIVAL, Fused, TorchFused, initial_tensors
from fusedopt.bench.measure import BandwidthProbe, CacheFlush, Quantiles, QueuedTimer, Times, interleave, paired_ratio
from fusedopt.bench.run import CHECKED_STEPS, expected
from fusedopt.bench.tables import case_table, markdown, times
from fusedopt.bench.workloads import Workload
from fusedopt.cli import main

# `fusedopt.bench.run` is the function.
run_module = importlib.import_module("fusedopt.bench.run")

CPU = torch.device("cpu")
TINY = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (3, 11), "scale": ()}
#: One that takes seconds to compile, and one that needs a GPU.
ELSEWHERE = ["torch-compiled", "torch-graphed"]
#: Those that are always here, but for these.
HERE = [name for name in CONTENDERS if name.startswith((OURS, "torch-")) and name not in ELSEWHERE]
#: Those that compile something for each case, or at first.
COMPILING = ["torch-compiled", "deepspeed", "torchao", "torchao-8bit"]
PEERS = [name for name, contender in CONTENDERS.items() if issubclass(contender, Peer)]

each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_grouping = pytest.mark.parametrize("grouping", GROUPINGS)


@pytest.fixture(scope="module", autouse=True)
def _short_collections() -> Iterator[None]:
    """Every run collects garbage, which takes a tenth of a second with all that torch's optimizers import."""
    run(tiny(), [OURS, RIVAL], 2)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small operations, and other tests at the same time: threads that wait for each other would only be slower."""
    torch.set_num_threads(1)


@pytest.fixture
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run`` checks the results, and that is all."""
    monkeypatch.setattr(run_module, "interleave", lambda contenders, *_, **__: {name: Times() for name in contenders})
    monkeypatch.setattr(run_module, "_extra_memory", lambda contender: None)


def tiny(grouping: str = "two", optimizer: str = "adamw", recipe: str = "amp-clip", dtype: str = "fp32") -> Case:
    return Case("tiny", grouping, optimizer, recipe, dtype, warm=True, custom=lambda: TINY)


def make(name: str, case: Case) -> Contender:
    return CONTENDERS[name](case, {parameter: grad for parameter, _, grad in initial_tensors(case)})


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, type[Contender]], str]:
    """Adds a contender for the time of a test; returns its name."""

    def add(name: str, contender: type[Contender]) -> str:
        monkeypatch.setitem(CONTENDERS, name, contender)
        return name

    return add


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], None]:
    """Makes a package look installed, or missing."""
    original = importlib.util.find_spec
    installed: dict[str, bool] = {}

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        if name not in installed:
            return original(name, package)
        return ModuleSpec(name, None) if installed[name] else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return installed.__setitem__


@functools.cache
def torch_fused_sgd_moves(dtype: torch.dtype) -> bool:
    """Whether torch's fused SGD updates parameters of a 16-bit type, which that of torch 2.13 does not on a CPU."""
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    param.grad = torch.ones_like(param)
    torch.optim.SGD([param], lr=0.5, momentum=0.9, fused=True).step()
    return not bool((param == 1).any())


def is_known_to_fail(name: str, case: Case) -> bool:
    fused = getattr(CONTENDERS[name], "flags", {}).get("fused", False)
    return fused and case.optimizer == "sgd" and not torch_fused_sgd_moves(DTYPES[case.dtype][0])


class TestCase:
    @pytest.mark.parametrize(
        ("field", "known"),
        [
            ("workload", WORKLOADS),
            ("grouping", GROUPINGS),
            ("optimizer", OPTIMIZERS),
            ("recipe", RECIPES),
            ("dtype", DTYPES),
            ("device", ["cpu", "cuda"]),
        ],
    )
    def test_unknown_key(self, field, known):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared in full
            Case(**{"workload": "vit-b", field: "nope"})
        assert str(caught.value) == f"{field} is 'nope'; expected one of {', '.join(known)}"

    def test_custom_shapes_take_any_name_but_no_other_key(self):
        assert Case("mine", custom=lambda: {"a": (2, 3), "b": ()}).parameters == 7
        with pytest.raises(ValueError, match="grouping is 'nope'"):
            Case("mine", "nope", custom=lambda: TINY)

    @pytest.mark.parametrize(
        ("case", "name"),
        [
            (Case("vit-b"), "vit-b/one/adamw/amp-clip"),
            (Case("vit-b", "each", "sgd", "bare", "bf16"), "vit-b/each/sgd/bare/bf16"),
            (Case("400x64", device="cuda", warm=True), "400x64/one/adamw/amp-clip/cuda/warm"),
            (Case("400x64", dtype="fp16-grads", device="cuda"), "400x64/one/adamw/amp-clip/fp16-grads/cuda"),
            (tiny("two"), "tiny/two/adamw/amp-clip/warm"),
        ],
    )
    def test_name(self, case, name):
        assert case.name == name

    @pytest.mark.parametrize(
        ("optimizer", "recipe", "dtype", "count"),
        [
            # Once each: read gradient for the norm; read gradient; read and write parameter and each state.
            ("adamw", "amp-clip", "fp32", 32),
            ("adamw", "amp", "fp32", 32),
            ("adamw", "clip", "fp32", 32),
            ("adamw", "bare", "fp32", 28),
            ("adam", "amp-clip", "fp32", 32),
            ("sgd", "amp-clip", "fp32", 24),
            ("sgd", "bare", "fp32", 20),
            ("amsgrad", "amp-clip", "fp32", 40),
            ("adamw", "amp-clip", "bf16", 16),
            ("adamw", "bare", "fp16", 14),
            ("adamw", "amp-clip", "bf16-grads", 28),
            ("adamw", "bare", "fp16-grads", 26),
            # Three more micro-batches, each read and added to what is read and written.
            ("adamw", "amp-clip-accumulate", "fp32", 32 + 3 * 12),
            ("adamw", "amp-clip-accumulate", "bf16-grads", 28 + 3 * 6),
        ],
    )
    def test_bytes_per_parameter(self, optimizer, recipe, dtype, count):
        assert tiny("one", optimizer, recipe, dtype).bytes_per_parameter == count

    @pytest.mark.parametrize(
        ("grouping", "decay"), [("one", [0.05]), ("two", [0.05, 0.0]), ("each", [0.05, 0.0, 0.05, 0.0])]
    )
    def test_vectors_are_not_decayed_unless_in_one_group(self, grouping, decay):
        case = tiny(grouping)
        assert [case.settings(group)["weight_decay"] for group in case.groups] == decay
        assert OPTIMIZERS["adamw"].settings["weight_decay"] == 0.05  # as it was

    @pytest.mark.parametrize("workload", ["400x64", "vit-tiny"])
    def test_clipping_recipes_clip_to_a_third(self, workload):
        case = Case(workload, recipe="clip")
        norm = math.sqrt(sum(float(grad.double().square().sum()) for _, _, grad in initial_tensors(case)))
        assert 0.3 < case.max_norm / norm < 0.4

    @each_recipe
    @each_dtype
    def test_tensors_are_the_same_each_time(self, recipe, dtype):
        case = tiny(recipe=recipe, dtype=dtype)
        for (name, *left), (same, *right) in zip(initial_tensors(case), initial_tensors(case), strict=True):
            assert name == same
            assert [tensor.dtype for tensor in left] == list(DTYPES[dtype])
            assert all(map(torch.equal, left, right))
            assert all(tuple(tensor.shape) == TINY[name] for tensor in left)


class TestExpected:
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_is_adamw_by_hand(self, recipe):
        case = Case("tiny", recipe=recipe, custom=lambda: {"a": (4, 9)})
        lr, decay = OPTIMIZERS["adamw"].settings["lr"], OPTIMIZERS["adamw"].settings["weight_decay"]
        eps = OPTIMIZERS["adamw"].settings.get("eps", 1e-8)
        ((_, start, grad),) = initial_tensors(case)
        param, first, second = start.double(), 0.0, 0.0
        for step, factor in enumerate(CHECKED_STEPS, start=1):
            total = grad.double() * (factor + RECIPES[recipe].accumulate - 1)
            total /= SCALE if RECIPES[recipe].amp else 1.0
            if RECIPES[recipe].clip:
                total *= min(1.0, float(case.max_norm / (total.norm() + 1e-6)))
            param = param * (1 - lr * decay)
            first = 0.9 * first + 0.1 * total
            second = 0.999 * second + 0.001 * total**2
            param = param - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + eps)
        ((name, before, after),) = expected(case)
        assert name == "a"
        assert torch.equal(before, start)
        torch.testing.assert_close(after, param, rtol=1e-12, atol=1e-15)

    def test_has_each_group_s_own_weight_decay(self):
        (one, two) = ({name: after for name, _, after in expected(tiny(grouping))} for grouping in ("one", "two"))
        assert [name for name in TINY if not torch.equal(one[name], two[name])] == ["a.bias", "scale"]

    @each_dtype
    def test_is_float64_from_the_contenders_tensors(self, dtype):
        case = tiny(dtype=dtype)
        for (name, before, after), (same, start, _) in zip(expected(case), initial_tensors(case), strict=True):
            assert name == same
            assert before.dtype == DTYPES[dtype][0] and torch.equal(before, start)
            assert after.dtype == torch.float64 and not after.requires_grad


@pytest.mark.usefixtures("_unmeasured")
class TestRightContenders:
    @each_grouping
    @each_dtype
    @each_recipe
    @each_optimizer
    def test_take_part(self, optimizer, recipe, dtype, grouping):
        case = tiny(grouping, optimizer, recipe, dtype)
        result = run(case, HERE, 2)
        unavailable = {name: why for name in HERE if (why := CONTENDERS[name].unavailable(case))}
        wrong = {name: why for name, why in result.left_out.items() if name not in unavailable}
        assert result.left_out == unavailable | wrong
        assert set(wrong) == {name for name in HERE if name not in unavailable and is_known_to_fail(name, case)}
        assert list(result.times) == [name for name in HERE if name not in result.left_out]
        assert OURS in result.times

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_torch_fused_sgd_is_found_to_leave_16_bit_parameters_alone(self, dtype):
        if torch_fused_sgd_moves(DTYPES[dtype][0]):
            pytest.skip("this torch's fused SGD updates 16-bit parameters")
        result = run(tiny("one", "sgd", "clip", dtype), [OURS, RIVAL, "torch-foreach"], 2)
        assert list(result.times) == [OURS, "torch-foreach"]
        assert list(result.left_out) == [RIVAL]
        assert result.left_out[RIVAL].startswith("wrong result: a.weight is off by 1 of its change (allowed: ")

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", COMPILING)
    def test_that_compile_take_part(self, name):
        case = tiny("each", "adamw", "amp-clip")
        if reason := CONTENDERS[name].unavailable(case):
            pytest.skip(reason)
        if shutil.which("c++") is None:
            pytest.skip("compiling takes a compiler")
        assert run(case, [name], 2).left_out == {}

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("name", "optimizer"),
        [(name, optimizer) for name in PEERS if name not in COMPILING for optimizer in CONTENDERS[name].classes],
    )
    def test_of_other_packages_take_part(self, name, optimizer):
        case = tiny("two", optimizer)
        if reason := CONTENDERS[name].unavailable(case):
            pytest.skip(reason)
        assert run(case, [name], 2).left_out == {}

    @pytest.mark.filterwarnings("ignore")
    @each_recipe
    @each_optimizer
    def test_of_mmengine_take_part(self, optimizer, recipe):
        for module in ("mmengine", "cv2"):
            pytest.importorskip(module, reason=f"the package {module} is not installed")
        assert run(tiny("two", optimizer, recipe), [f"mmengine-{RIVAL}"], 2).left_out == {}


class DecayForgotten(TorchFused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return super().build([{**group, "weight_decay": 0.0} for group in groups])


class DecayOfVectors(TorchFused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay = max(group["weight_decay"] for group in groups)
        return super().build([{**group, "weight_decay": decay} for group in groups])


class UnscaleForgotten(Fused):
    def make_scaler(self) -> Any:
        return torch.amp.GradScaler(self.case.device, enabled=False)


class ClipForgotten(Fused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        self.max_norm = None
        return super().build(groups)


class AccumulationForgotten(Fused):
    def __call__(self) -> None:
        self.step()


class MomentumForgotten(TorchFused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        none = {"momentum": 0.0} if self.case.optimizer == "sgd" else {"betas": (0.0, 0.999)}
        return super().build([{**group, **none} for group in groups])


class AmsgradForgotten(TorchFused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return super().build([{**group, "amsgrad": False} for group in groups])


class OtherLearningRate(Fused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return super().build([{**group, "lr": 1.01 * group["lr"]} for group in groups])


class CoupledDecay(TorchFused):
    """Adam for AdamW."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, fused=True)


class ParameterForgotten(Fused):
    def step(self) -> None:
        last = self.params["scale"].detach().clone()
        super().step()
        self.params["scale"].data.copy_(last)


class SecondStepForgotten(Fused):
    done = False

    def step(self) -> None:
        if not self.done:
            super().step()
        self.done = True


class Spoiled(Fused):
    """Leaves a value in the first element of a parameter."""

    parameter: ClassVar[str]
    value: ClassVar[float]

    def step(self) -> None:
        super().step()
        self.params[self.parameter].data.view(-1)[0] = self.value


ADAMS = ["adam", "adamw", "amsgrad"]
#: A wrong contender and a recipe in which it is wrong; the optimizers where it is noticed, and where it is not yet.
WRONG: list[tuple[type[Contender], str, list[str]]] = [
    (DecayForgotten, "bare", list(OPTIMIZERS)),
    (DecayForgotten, "amp-clip", list(OPTIMIZERS)),
    (DecayOfVectors, "amp-clip", list(OPTIMIZERS)),
    (CoupledDecay, "amp-clip", ["adamw"]),
    (UnscaleForgotten, "amp", list(OPTIMIZERS)),
    (ClipForgotten, "clip", list(OPTIMIZERS)),
    (ClipForgotten, "amp-clip", list(OPTIMIZERS)),
    (AccumulationForgotten, "amp-clip-accumulate", list(OPTIMIZERS)),
    (MomentumForgotten, "bare", list(OPTIMIZERS)),
    (AmsgradForgotten, "bare", ["amsgrad"]),
    (OtherLearningRate, "amp-clip", list(OPTIMIZERS)),
    (ParameterForgotten, "amp-clip", list(OPTIMIZERS)),
    (SecondStepForgotten, "amp-clip", list(OPTIMIZERS)),
]


class TestWrongContenders:
    @pytest.mark.parametrize(
        ("wrong", "recipe", "optimizer"),
        [
            pytest.param(wrong, recipe, optimizer, id=f"{wrong.__name__}-{recipe}-{optimizer}")
            for wrong, recipe, optimizers in WRONG
            for optimizer in optimizers
        ],
    )
    def test_are_left_out(self, register, wrong, recipe, optimizer):
        result = run(tiny("two", optimizer, recipe), [OURS, register("wrong", wrong)], 2)
        assert list(result.left_out) == ["wrong"]
        assert result.left_out["wrong"].startswith("wrong result: ")
        assert list(result.times) == list(result.extra_memory) == [OURS]

    @pytest.mark.parametrize(
        ("parameter", "value"),
        [(name, value) for name in TINY for value in (math.nan, math.inf, 1e3)],
    )
    def test_one_element_tells(self, register, parameter, value):
        about = {"parameter": parameter, "value": value}
        result = run(tiny(), [OURS, register("wrong", type("Wrong", (Spoiled,), about))], 2)
        assert result.left_out["wrong"].startswith(f"wrong result: {parameter} is off by ")
        assert list(result.times) == [OURS]

    def test_of_ours_are_left_out_too(self, register):
        name = register("fusedopt-wrong", OtherLearningRate)
        result = run(tiny(), [name, RIVAL], 2)
        assert result.left_out[name].startswith("wrong result: ")
        assert result.left_out[name].endswith(" is off by 0.01 of its change (allowed: 2e-05)")
        assert list(result.times) == [RIVAL]

    def test_approximate_ones_have_a_free_hand(self, register):
        approximate = register("near", type("Near", (OtherLearningRate,), {"approximate": True}))
        far = register("far", type("Far", (SecondStepForgotten,), {"approximate": True}))
        result = run(tiny(), [approximate, far], 2)
        assert list(result.times) == [approximate]
        assert "(allowed: 0.3)" in result.left_out[far]

    def test_without_anyone_right_there_are_no_times(self, register):
        result = run(tiny(), [register("wrong", SecondStepForgotten)], 2)
        assert (result.times, result.extra_memory, list(result.left_out)) == ({}, {}, ["wrong"])


class Failing(TorchFused):
    def step(self) -> None:
        raise RuntimeError("no luck\nwith a second line")


class FailingToBuild(TorchFused):
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        raise ImportError("no symbol")


class TestFailures:
    @pytest.mark.parametrize(
        ("failing", "reason"),
        [(Failing, "fails: RuntimeError: no luck"), (FailingToBuild, "fails: ImportError: no symbol")],
    )
    def test_of_other_packages_are_told(self, register, failing, reason):
        result = run(tiny(), [register("theirs", failing), OURS], 2)
        assert result.left_out == {"theirs": reason}
        assert list(result.times) == [OURS]

    @pytest.mark.parametrize("failing", [Failing, FailingToBuild])
    def test_of_ours_are_errors(self, register, failing):
        with pytest.raises((RuntimeError, ImportError), match=r"no luck|no symbol"):
            run(tiny(), [RIVAL, register("fusedopt-failing", failing)], 2)


class TestRun:
    @pytest.mark.parametrize(("warm", "flushes"), [(False, 2 * (3 + 4)), (True, 0)])
    def test_flushes_before_each_timed_step_unless_warm(self, warm, flushes):
        calls: list[None] = []
        case = Case("tiny", warm=warm, custom=lambda: TINY)
        result = run(case, [OURS, RIVAL], 4, lambda: calls.append(None))
        assert len(calls) == flushes
        assert [len(times.total) for times in result.times.values()] == [4, 4]
        assert list(result.extra_memory) == [OURS, RIVAL]

    def test_leaves_no_contender_behind(self, register):
        made: list[weakref.ref[Contender]] = []

        class InACycle(TorchFused):
            def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
                made.append(weakref.ref(self))
                self.cycle = self
                return super().build(groups)

        run(tiny(), [register("cycle", InACycle), OURS], 2)
        assert [reference() for reference in made] == [None]

    def test_figures(self):
        result = Result(tiny("one"), {OURS: Times([0.01, 0.02, 0.03]), RIVAL: Times([0.03, 0.06, 0.09])})
        assert result.seconds(OURS).median == 0.02
        ratio, interval = result.ratio(RIVAL)
        assert ratio.median == pytest.approx(3) and interval == pytest.approx((3, 3))
        assert result.ratio(OURS, RIVAL)[0].median == pytest.approx(1 / 3)
        # 74 parameters of 32 bytes in 20 ms.
        assert result.bytes_per_second(OURS) == pytest.approx(74 * 32 / 0.02)

    def test_bandwidth_is_measured_in_the_rounds_of_a_large_case(self):
        calls: list[None] = []

        class Probe:
            moved = 10**9

            def __call__(self) -> None:
                calls.append(None)

        for shape, count in (((1000, 1000), 2), ((999, 1000), 0)):
            case = Case("large", custom=lambda shape=shape: {"a": shape})
            result = run(case, [OURS], 2, lambda: None, Probe())
            assert list(result.times) == [OURS]
            assert len(result.bandwidth) == count
        assert len(calls) == 3 + 2

    def test_bandwidth_is_what_the_probe_moves(self, monkeypatch):
        def timed(functions, rounds, prepare, device, prepare_queued):
            assert prepare_queued is None, "that is for a GPU"
            for name in functions:
                prepare(name)
            seconds = {OURS: [0.01, 0.02], "bandwidth": [0.5, 0.25]}
            return {name: Times(seconds[name], seconds[name]) for name in functions}

        class Probe:
            moved = 10**9

        monkeypatch.setattr(run_module, "interleave", timed)
        case = Case("large", custom=lambda: {"a": (1000, 1000)})
        result = run(case, [OURS], 2, list, Probe())
        assert result.bandwidth == [2e9, 4e9]
        # 32 MB in each round: of 20 and of 80 MB.
        assert result.share_of_bandwidth(OURS) == pytest.approx((1.6 + 0.4) / 2)

    def test_extra_memory_is_the_median_of_three_steps(self, monkeypatch):
        peaks = itertools.cycle([5, 1, 3])

        class Fake:
            def __init__(self, device: torch.device):
                assert device == CPU

            def start(self) -> None:
                pass

            def stop(self) -> int:
                return next(peaks)

        monkeypatch.setattr(run_module, "PeakMemory", Fake)
        assert run(tiny(), [OURS, RIVAL], 2).extra_memory == {OURS: 3, RIVAL: 3}
        monkeypatch.setattr(Fake, "stop", lambda self: None)
        assert run(tiny(), [OURS], 2).extra_memory == {OURS: None}

    def test_extra_memory_sees_what_a_step_takes(self, register):
        class Hungry(TorchFused):
            def step(self) -> None:
                torch.ones(16 * 2**20)  # 64 MiB
                super().step()

        used = run(tiny(), [register("hungry", Hungry)], 2).extra_memory["hungry"]
        if used is None:
            pytest.skip("this system does not report the peak of the resident set")
        assert 60 * 2**20 < used < 100 * 2**20


class TestContender:
    @pytest.mark.parametrize(
        ("name", "recipe"),
        [
            (name, recipe)
            for name in HERE
            for recipe in RECIPES
            if CONTENDERS[name].unavailable(tiny("each", recipe=recipe)) is None
        ],
    )
    def test_each_step_begins_with_the_gradients_of_a_micro_batch(self, name, recipe):
        case = tiny("each", recipe=recipe)
        gradients = {parameter: grad for parameter, _, grad in initial_tensors(case)}
        originals = {parameter: grad.clone() for parameter, grad in gradients.items()}
        contender = CONTENDERS[name](case, gradients)
        for _ in range(3):
            contender.prepare()
            for parameter, param in contender.params.items():
                assert param.grad is not None and torch.equal(param.grad, originals[parameter])
            contender()
        assert all(torch.equal(gradients[parameter], original) for parameter, original in originals.items())

    def test_accumulates_micro_batches(self):
        contender = make(OURS, tiny(recipe="amp-clip-accumulate"))
        contender.prepare()
        contender()
        for parameter, _, grad in initial_tensors(contender.case):
            torch.testing.assert_close(contender.params[parameter].grad, 4 * grad)

    @pytest.mark.parametrize("grouping", ["two", "each"])
    @pytest.mark.parametrize("name", [name for name in HERE if CONTENDERS[name].unavailable(tiny()) is None])
    def test_has_the_case_s_groups(self, name, grouping):
        contender = make(name, tiny(grouping))
        names = {id(param): parameter for parameter, param in contender.params.items()}
        groups = [
            ([names[id(param)] for param in group["params"]], group["weight_decay"])
            for group in contender.optimizer.param_groups
        ]
        if grouping == "two" or name == "torch-merged":
            assert groups == [(["a.weight", "b.weight"], 0.05), (["a.bias", "scale"], 0.0)]
        else:
            assert groups == [([parameter], 0.05 if len(shape) > 1 else 0.0) for parameter, shape in TINY.items()]

    @pytest.mark.parametrize(
        ("name", "case", "reason"),
        [
            ("torch-merged", tiny("one"), "there is one group"),
            ("torch-graphed", tiny(), "CUDA graphs need a GPU"),
            ("torch-grad-scale", tiny(recipe="amp"), "without clipping it is torch-fused"),
            (
                "torch-compiled",
                Case("many", custom=lambda: dict.fromkeys(map(str, range(501)), ())),
                "torch.compile takes many minutes for so many tensors",
            ),
            *(
                (name, tiny(dtype="fp16"), "torch's GradScaler does not unscale gradients of fp16 parameters")
                for name in HERE
                if name.startswith("torch-")
            ),
        ],
    )
    def test_unavailable(self, name, case, reason):
        assert CONTENDERS[name].unavailable(case) == reason
        result = run(case, [name], 2)
        assert (result.left_out, result.times) == ({name: reason}, {})

    def test_a_backend_that_is_not_here(self, monkeypatch):
        monkeypatch.setattr(NativeBackend, "unavailable", classmethod(lambda cls, device: f"not built for {device}"))
        assert CONTENDERS["fusedopt-native"].unavailable(tiny()) == "not built for cpu"
        assert CONTENDERS["fusedopt-reference"].unavailable(tiny()) is None

    @pytest.mark.parametrize(
        ("name", "flags"),
        [
            ("torch-for-loop", (False, False)),
            ("torch-foreach", (True, None)),
            (RIVAL, (None, True)),
            ("torch-merged", (None, True)),
            ("torch-grad-scale", (None, True)),
        ],
    )
    def test_flags_of_torch(self, name, flags):
        defaults = make(name, tiny()).optimizer.defaults
        assert (defaults["foreach"], defaults["fused"]) == flags

    @pytest.mark.parametrize("name", CONTENDERS)
    def test_describes_itself_in_a_line(self, name):
        assert CONTENDERS[name].description
        assert "\n" not in CONTENDERS[name].description


COMMON = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 0.1}
#: What each package's class is called with, beside the groups.
ARGUMENTS: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("deepspeed", "adam", "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": False, "bias_correction": True}),
    ("deepspeed", "adamw", "deepspeed.ops.adam", "DeepSpeedCPUAdam", {"adamw_mode": True, "bias_correction": True}),
    (
        "optimi",
        "sgd",
        "optimi",
        "SGD",
        {"decouple_lr": False, "kahan_sum": False, "decouple_wd": False, "dampening": False},
    ),
    ("optimi", "adam", "optimi", "Adam", {"decouple_lr": False, "kahan_sum": False, "decouple_wd": False}),
    ("optimi", "adamw", "optimi", "AdamW", {"decouple_lr": False, "kahan_sum": False}),
    ("torchao", "adamw", "torchao.optim", "_AdamW", {"amsgrad": False}),
    ("torchao", "amsgrad", "torchao.optim", "_AdamW", {"amsgrad": True}),
    ("torchao-8bit", "adamw", "torchao.optim", "AdamW8bit", {}),
    ("bitsandbytes", "sgd", "bitsandbytes.optim", "SGD32bit", {"momentum": 0.9}),
    ("bitsandbytes", "adamw", "bitsandbytes.optim", "AdamW32bit", {}),
    ("bitsandbytes-8bit", "sgd", "bitsandbytes.optim", "SGD8bit", {"momentum": 0.9}),
    ("bitsandbytes-8bit", "adamw", "bitsandbytes.optim", "AdamW8bit", {}),
    (
        "flashoptim",
        "sgd",
        "flashoptim",
        "FlashSGD",
        {"quantize": False, "master_weight_bits": None, "fused": False, "momentum": 0.9},
    ),
    ("flashoptim", "adam", "flashoptim", "FlashAdam", {"quantize": False, "master_weight_bits": None, "fused": False}),
    (
        "flashoptim",
        "adamw",
        "flashoptim",
        "FlashAdamW",
        {"quantize": False, "master_weight_bits": None, "fused": False, "decouple_lr": False},
    ),
]


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, type], list[dict[str, Any]]]:
    """Installs a module with one optimizer, in truth torch's; returns the list of what it is called with."""

    def inject(path: str, name: str, stock: type) -> list[dict[str, Any]]:
        received: list[dict[str, Any]] = []
        known = inspect.signature(stock).parameters

        def __init__(self: Any, params: Any, **arguments: Any) -> None:  # noqa: N807
            print("Welcome!")
            received.append(arguments)
            stock.__init__(self, params, **{key: value for key, value in arguments.items() if key in known})

        for end in [*(i for i, letter in enumerate(path) if letter == "."), len(path)]:
            module = ModuleType(path[:end])
            module.__spec__ = ModuleSpec(path[:end], None)
            monkeypatch.setitem(sys.modules, path[:end], module)
        setattr(module, name, type(name, (stock,), {"__init__": __init__}))
        return received

    return inject


class TestPeers:
    def test_arguments_of_all_are_here(self):
        tested = {(name, optimizer) for name, optimizer, *_ in ARGUMENTS}
        assert tested == {
            (name, optimizer)
            for name in PEERS
            if name != "apex"
            for optimizer in CONTENDERS[name].classes  # type: ignore[attr-defined]
        }

    @pytest.mark.parametrize(
        ("name", "optimizer", "path", "cls", "own"), [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in ARGUMENTS]
    )
    def test_are_built_with_torch_s_settings(self, fake_package, monkeypatch, capsys, name, optimizer, path, cls, own):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        received = fake_package(path, cls, getattr(torch.optim, OPTIMIZERS[optimizer].name))
        result = run(tiny("two", optimizer), [OURS, name], 2)
        assert result.left_out == {}
        assert list(result.times) == [OURS, name]
        assert received == [({"lr": 0.01} if optimizer == "sgd" else COMMON) | own]
        assert capsys.readouterr() == ("", "Welcome!\n")

    @pytest.mark.parametrize(
        ("optimizer", "arguments"),
        [
            ("sgd", {"lr": 0.01, "momentum": 0.9}),
            ("adam", COMMON | {"adam_w_mode": False}),
            ("adamw", COMMON | {"adam_w_mode": True}),
        ],
    )
    def test_arguments_of_apex(self, optimizer, arguments):
        apex = Apex.__new__(Apex)  # building one takes CUDA
        apex.case = Case("400x64", optimizer=optimizer, device="cuda")
        assert apex.arguments() == arguments

    def test_flashoptim_is_fused_on_cuda(self):
        contender = CONTENDERS["flashoptim"].__new__(CONTENDERS["flashoptim"])
        contender.case = Case("400x64", device="cuda")
        assert contender.arguments()["fused"] is True  # type: ignore[attr-defined]

    def test_deepspeed_is_told_to_stay_on_the_cpu_unless_told_otherwise(self, fake_package, monkeypatch):
        fake_package("deepspeed.ops.adam", "DeepSpeedCPUAdam", torch.optim.AdamW)
        for before, after in ((None, "cpu"), ("cuda", "cuda")):
            monkeypatch.setenv("DS_ACCELERATOR", "any")  # to be restored
            if before is None:
                monkeypatch.delenv("DS_ACCELERATOR")
            else:
                monkeypatch.setenv("DS_ACCELERATOR", before)
            make("deepspeed", tiny())
            assert os.environ["DS_ACCELERATOR"] == after

    def test_one_that_does_not_compute_what_torch_does(self, fake_package):
        fake_package("optimi", "AdamW", torch.optim.SGD)
        result = run(tiny(), [OURS, "optimi"], 2)
        assert list(result.times) == [OURS]
        assert result.left_out["optimi"].startswith("wrong result: ")

    def test_a_package_without_its_class(self, fake_package):
        fake_package("optimi", "Other", torch.optim.SGD)
        reason = run(tiny(), [OURS, "optimi"], 2).left_out["optimi"]
        assert reason.startswith("fails: AttributeError: module 'optimi' has no attribute 'AdamW'")

    @pytest.mark.parametrize("name", [*PEERS, f"mmengine-{RIVAL}"])
    def test_not_installed(self, install, name):
        package = getattr(CONTENDERS[name], "module", "mmengine")
        install(package, False)
        case = tiny()
        assert CONTENDERS[name].unavailable(case) == f"the package {package} is not installed"
        assert run(case, [name], 2).left_out == {name: f"the package {package} is not installed"}

    @pytest.mark.parametrize(
        ("name", "case", "reason"),
        [
            ("deepspeed", Case("400x64", device="cuda"), "needs cpu"),
            ("apex", Case("400x64"), "needs cuda"),
            ("apex", Case("400x64", device="cuda", optimizer="amsgrad"), "apex has no amsgrad equal to torch's"),
            ("deepspeed", tiny(optimizer="sgd"), "deepspeed has no sgd equal to torch's"),
            ("optimi", tiny(optimizer="amsgrad"), "optimi has no amsgrad equal to torch's"),
            ("torchao", tiny(optimizer="adam"), "torchao has no adam equal to torch's"),
            ("torchao-8bit", tiny(optimizer="amsgrad"), "torchao has no amsgrad equal to torch's"),
            ("bitsandbytes", tiny(optimizer="adam"), "bitsandbytes has no adam equal to torch's"),
            ("flashoptim", tiny(optimizer="amsgrad"), "flashoptim has no amsgrad equal to torch's"),
            ("optimi", tiny(dtype="fp16"), "torch's GradScaler does not unscale gradients of fp16 parameters"),
            (
                f"mmengine-{RIVAL}",
                tiny(dtype="fp16"),
                "torch's GradScaler does not unscale gradients of fp16 parameters",
            ),
            (f"mmengine-{RIVAL}", tiny(dtype="bf16-grads"), "mmengine's wrappers do not cast gradients"),
            ("optimi", tiny(dtype="fp16", recipe="clip"), None),
            ("optimi", Case("400x64", device="cuda"), None),
            ("apex", Case("400x64", device="cuda"), None),
            (f"mmengine-{RIVAL}", tiny(dtype="bf16"), None),
        ],
    )
    def test_unavailable_although_installed(self, install, name, case, reason):
        for package in (getattr(CONTENDERS[name], "module", "mmengine"), "cv2"):
            install(package, True)
        assert CONTENDERS[name].unavailable(case) == reason

    def test_mmengine_without_opencv(self, install):
        install("mmengine", True)
        install("cv2", False)
        assert CONTENDERS[f"mmengine-{RIVAL}"].unavailable(tiny()) == "the package cv2 is not installed"

    def test_only_quantized_states_are_approximate(self):
        assert [name for name in CONTENDERS if CONTENDERS[name].approximate] == ["torchao-8bit", "bitsandbytes-8bit"]


class TestInterleave:
    @staticmethod
    def record(rounds: int, warmup: int = 3) -> tuple[list[tuple[str, str]], dict[str, Times]]:
        events: list[tuple[str, str]] = []
        functions = {name: functools.partial(events.append, ("run", name)) for name in "abc"}
        return events, interleave(functions, rounds, lambda name: events.append(("prepare", name)), CPU, warmup)

    @pytest.mark.parametrize("warmup", [0, 3])
    def test_every_round_prepares_and_runs_each_once(self, warmup):
        events, taken = self.record(20, warmup)
        assert len(events) == 2 * 3 * (20 + warmup)
        for (first, prepared), (second, called) in zip(events[::2], events[1::2], strict=True):
            assert (first, second) == ("prepare", "run")
            assert prepared == called
        calls = [name for _, name in events[1::2]]
        rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        assert {order[0] for order in rounds} == {"a", "b", "c"}
        assert {name: (len(times.total), len(times.host)) for name, times in taken.items()} == dict.fromkeys(
            "abc", (20, 20)
        )

    def test_the_order_is_the_same_in_each_run(self):
        assert self.record(8)[0] == self.record(8)[0]

    def test_on_a_cpu_the_host_does_the_work(self):
        for taken in self.record(4)[1].values():
            assert taken.total == taken.host

    def test_without_functions(self):
        assert interleave({}, 3, lambda name: None, CPU) == {}

    def test_garbage_is_not_collected_meanwhile(self):
        collecting: list[bool] = []
        interleave(
            {"a": lambda: collecting.append(gc.isenabled())}, 2, lambda _: collecting.append(gc.isenabled()), CPU
        )
        assert collecting == [False] * 2 * 5
        assert gc.isenabled()

    @pytest.mark.parametrize("place", ["function", "prepare"])
    def test_garbage_is_collected_again_after_an_error(self, place):
        def fail(*_: object) -> None:
            raise RuntimeError("no luck")

        function, prepare = (fail, len) if place == "function" else (list, fail)
        with pytest.raises(RuntimeError, match="no luck"):
            interleave({"a": function}, 2, prepare, CPU)
        assert gc.isenabled()

    def test_garbage_stays_uncollected_where_it_was(self):
        gc.disable()
        try:
            interleave({"a": list}, 2, len, CPU)
            assert not gc.isenabled()
        finally:
            gc.enable()


class Gpu:
    """A device beside a host that is slow to launch, as far as torch.cuda shows it to a timer; times in seconds."""

    CLOCK = 1e9

    def __init__(self) -> None:
        self.now = self.done = 0.0  # of the host, and when all that is in the queue will be through
        self.sleeps: list[float] = []

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.done = max(self.done, self.now) + device

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / self.CLOCK)
        self.launch(0, cycles / self.CLOCK)

    def synchronize(self, *_: object) -> None:
        self.now = max(self.now, self.done)

    def event(self, enable_timing: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.time = max(gpu.done, gpu.now)

            def query(self) -> bool:
                return self.time <= gpu.now

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.time)

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.time - self.time)

        return Event()


class TestOnAGpu:
    """What is timed of work that a host hands to a device."""

    DEVICE = torch.device("cuda")

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> Gpu:
        gpu = Gpu()
        monkeypatch.setattr(torch.cuda, "Event", gpu.event)
        monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        return gpu

    def step(self, gpu: Gpu, host: float = 50e-6, device: float = 10e-6, kernels: int = 3) -> None:
        for _ in range(kernels):
            gpu.launch(host, device)

    def times(self, gpu: Gpu, **functions: Any) -> dict[str, Times]:
        flush = functools.partial(gpu.launch, 20e-6, 60e-6)
        return interleave(functions, 5, lambda _: flush(), self.DEVICE, prepare_queued=lambda _: flush())

    def test_a_step_on_an_idle_device_has_the_host_s_work_in_it_and_a_queued_one_has_not(self, gpu):
        times = self.times(gpu, ours=lambda: self.step(gpu))["ours"]
        assert times.total == pytest.approx([3 * 50e-6 + 10e-6] * 5)
        assert times.queued == pytest.approx([3 * 10e-6] * 5)
        assert times.work == times.queued
        assert gpu.sleeps[0] > QueuedTimer.LEAST, "clocks are slower than it assumes"

    def test_a_launch_is_no_part_of_a_copy(self, gpu):
        times = self.times(gpu, copy=lambda: gpu.launch(10e-6, 500e-6), step=lambda: self.step(gpu))
        assert times["copy"].queued == pytest.approx([500e-6] * 5)

    def test_a_slow_host_gets_a_longer_start(self, gpu):
        times = self.times(gpu, slow=lambda: self.step(gpu, host=9e-3), quick=lambda: self.step(gpu))
        assert times["slow"].queued == pytest.approx([3 * 10e-6] * 5)
        assert len(set(gpu.sleeps)) > 1
        assert len(gpu.sleeps) == 2 * 8 + len(set(gpu.sleeps)) - 1, "found out once"

    def test_one_that_waits_for_the_device_is_timed_as_it_is(self, gpu):
        def waits() -> None:
            gpu.launch(50e-6, 10e-6)
            gpu.synchronize()
            gpu.launch(50e-6, 10e-6)

        times = self.times(gpu, waits=waits)["waits"]
        assert times.queued == pytest.approx([10e-6 + 50e-6 + 10e-6] * 5, abs=60e-6)
        assert len(gpu.sleeps) <= 8, "not tried for ever"

    def test_ratios_need_no_queue(self, gpu):
        times = interleave({"a": lambda: self.step(gpu)}, 5, len, self.DEVICE)["a"]
        assert not gpu.sleeps and not times.queued
        assert times.work == times.total


class TestStatistics:
    @pytest.mark.parametrize(
        ("values", "quantiles"),
        [
            ([float(value) for value in range(11, 0, -1)], (2, 6, 10)),
            ([1.0, 3.0], (1.2, 2, 2.8)),
            ([5.0, 5.0, 5.0], (5, 5, 5)),
        ],
    )
    def test_quantiles(self, values, quantiles):
        found = Quantiles.of(values)
        assert (found.p10, found.median, found.p90) == pytest.approx(quantiles)

    def test_constant_ratio_is_a_point(self):
        ratio, interval = paired_ratio([2.0, 4.0, 6.0, 1.0], [1.0, 2.0, 3.0, 0.5])
        assert ratio == Quantiles(2.0, 2.0, 2.0)
        assert interval == (2.0, 2.0)

    def test_ratios_are_round_by_round(self):
        # The medians are 3 and 3.
        ratio, _ = paired_ratio([1.0, 3.0, 8.0], [4.0, 1.0, 3.0])
        assert ratio.median == pytest.approx(8 / 3)

    def test_interval_brackets_the_median(self):
        slow = [float(value) for value in range(1, 42)]
        ratio, (low, high) = paired_ratio(slow, [1.0] * 41)
        assert ratio == Quantiles(5.0, 21.0, 37.0)
        # Of the binomial distribution: the 14th and the 28th of 41 are a 95 % interval.
        assert 11 <= low <= 17
        assert 25 <= high <= 31
        assert paired_ratio(slow, [1.0] * 41) == (ratio, (low, high))  # no chance in it

    def test_interval_shrinks_with_more_rounds(self):
        _, (low, high) = paired_ratio([1.0, 2.0, 3.0] * 2, [1.0] * 6)
        _, (low_of_many, high_of_many) = paired_ratio([1.0, 2.0, 3.0] * 40, [1.0] * 120)
        assert low_of_many == high_of_many == 2.0
        assert low < 2.0 < high

    def test_rounds_have_to_match(self):
        with pytest.raises(ValueError, match="zip"):
            paired_ratio([1.0, 2.0], [1.0])

    def test_probe_reads_two_arrays_and_writes_one(self):
        probe = BandwidthProbe(CPU)
        assert probe.moved == 3 * 128 * 2**20
        probe()
        probe()
        assert probe._a[0] == 2 and probe._a[-1] == 2
        assert probe._b[0] == 1

    def test_flush_writes_twice_the_cache(self, monkeypatch):
        monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)
        flush = CacheFlush(CPU)
        flush()
        assert flush._buffer.nbytes == 8192
        assert torch.equal(flush._buffer, torch.ones(2048))

    def test_flush_can_read_instead(self, monkeypatch):
        monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)
        flush = CacheFlush(CPU)
        versions = []
        for _ in range(2):
            flush.read()
            versions.append((flush._buffer._version, flush._read._version))
        assert flush._read.nbytes == 8192
        assert versions[0] == versions[1], "nothing is written"

    def test_bandwidth_is_of_the_device_s_work(self):
        case = Case("tiny", custom=lambda: {"a": (1000, 1000)})
        times = Times([0.5] * 3, [0.5] * 3, [0.01] * 3)
        result = Result(case, {OURS: times}, bandwidth=[6.4e9] * 3)
        assert result.share_of_bandwidth(OURS) == pytest.approx(0.5)
        assert result.bytes_per_second(OURS) == pytest.approx(3.2e9)
        assert result.seconds(OURS).median == 0.5


def table_of(text: str) -> tuple[list[str], list[list[str]], list[str]]:
    """(head, rows, lines after them) of the table in ``text``."""
    lines = text.splitlines()
    marked = [i for i, line in enumerate(lines) if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in marked)
    return head, rows, [line for line in lines[marked[-1] + 1 :] if line]


class TestTables:
    @pytest.mark.parametrize(
        ("seconds", "text"),
        [
            (123.4, "123 s"),
            (2.0, "2 s"),
            (0.0569, "56.9 ms"),
            (0.001, "1 ms"),
            (0.000793, "793 µs"),
            (12.34e-6, "12.3 µs"),
            (0.5e-6, "0.5 µs"),
            (0.0, "0 µs"),
        ],
    )
    def test_times(self, seconds, text):
        assert times(seconds) == text

    def test_markdown(self):
        assert markdown(["a", "longer"], [["1", "2"], ["three", "4"]]) == (
            "| a     | longer |\n| ----- | ------ |\n| 1     | 2      |\n| three | 4      |"
        )

    def test_markdown_without_rows(self):
        assert markdown(["a", "b"], iter(())) == "| a | b |\n| - | - |"

    def test_small_case(self):
        result = Result(
            tiny(),
            {RIVAL: Times([0.004, 0.002]), OURS: Times([0.002, 0.001]), "torchao-8bit": Times([0.001, 0.0005])},
            {"optimi": "the package optimi is not installed", "apex": "needs cuda"},
            {RIVAL: 2 * 2**20, OURS: 4096, "torchao-8bit": None},
        )
        text = case_table(result)
        assert text.splitlines()[:2] == [
            "tiny/two/adamw/amp-clip/warm: 4 tensors in 2 groups, 74 parameters, 32 bytes each to move; "
            "warm caches, 2 rounds",
            "",
        ]
        head, rows, rest = table_of(text)
        assert head == ["contender", "median", "p10 – p90", f"× {OURS} [95 %]", "extra memory"]
        assert rows == [
            ["torchao-8bit (approximate)", "750 µs", "550 µs – 950 µs", "0.50 [0.50, 0.50]", "?"],
            [OURS, "1.5 ms", "1.1 ms – 1.9 ms", "1", "4 KiB"],
            [RIVAL, "3 ms", "2.2 ms – 3.8 ms", "2.00 [2.00, 2.00]", "2.0 MiB"],
        ]
        assert rest == ["left out: optimi: the package optimi is not installed", "left out: apex: needs cuda"]

    def test_large_case_has_bandwidths(self):
        case = Case("tiny", custom=lambda: {"a": (1000, 1000)})
        # 32 MB in 10 ms, where the memory moves twice as much.
        result = Result(case, {OURS: Times([0.01] * 3, [0.01] * 3)}, bandwidth=[6.4e9] * 3)
        text = case_table(result)
        assert text.startswith("tiny/one/adamw/amp-clip: 1 tensors in 1 group, 1,000,000 parameters, 32 bytes ")
        assert "cold caches, 3 rounds" in text
        head, rows, rest = table_of(text)
        assert head[4:] == ["GB/s", "of the memory's", "extra memory"]
        assert rows == [[OURS, "10 ms", "10 ms – 10 ms", "1", "3.2", "50%", "?"]]
        assert rest == []

    def test_gpu_case_has_the_host_s_time(self):
        case = Case("tiny", device="cuda", custom=lambda: TINY)
        result = Result(case, {OURS: Times([0.01] * 3, [0.003, 0.001, 0.002])}, {}, {OURS: 2**20})
        head, rows, _ = table_of(case_table(result))
        assert head[4:] == ["host", "extra memory"]
        assert rows == [[OURS, "10 ms", "10 ms – 10 ms", "1", "2 ms", "1.0 MiB"]]
        large = Case("tiny", device="cuda", custom=lambda: {"a": (1000, 1000)})
        head, rows, _ = table_of(case_table(Result(large, result.times, bandwidth=[1e12] * 3)))
        assert head[4:] == ["GB/s", "of the memory's", "host", "extra memory"]
        assert rows[0][4:] == ["3.2", "0%", "2 ms", "?"]

    def test_without_ours_the_first_is_the_measure(self):
        result = Result(tiny(), {RIVAL: Times([0.004] * 2), "torch-foreach": Times([0.002] * 2)})
        head, rows, _ = table_of(case_table(result))
        assert head[3] == f"× {RIVAL} [95 %]"
        assert [(row[0], row[3]) for row in rows] == [("torch-foreach", "0.50 [0.50, 0.50]"), (RIVAL, "1")]

    def test_without_times(self):
        text = case_table(Result(tiny("one"), left_out={RIVAL: "fails: RuntimeError: no luck"}))
        headline, empty, left_out = text.splitlines()
        assert headline.endswith("4 tensors in 1 group, 74 parameters, 32 bytes each to move; warm caches, 0 rounds")
        assert (empty, left_out) == ("", f"left out: {RIVAL}: fails: RuntimeError: no luck")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small workload by name, and a small cache to flush."""
    monkeypatch.setitem(WORKLOADS, "tiny", Workload("for tests", lambda: TINY))
    monkeypatch.setattr(measure_module, "_last_level_cache", lambda: 4096)


def bench(*arguments: str) -> int:
    return main(["bench", "--workload", "tiny", "--rounds", "2", "--threads", "1", *arguments])


def tables_of(text: str) -> list[str]:
    """The headline of each case, up to the colon."""
    return [line.partition(":")[0] for line in text.splitlines() if " to move; " in line]


class TestCommand:
    def test_list(self, capsys):
        assert main(["bench", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        words = {line.split()[0]: line for line in lines}
        for name, workload in WORKLOADS.items():
            assert workload.description in words[name]
            assert words[name].endswith(" (for GPUs)") == workload.gpu_only
        for name, contender in CONTENDERS.items():
            assert words[name].endswith(contender.description)
        for names in (GROUPINGS, OPTIMIZERS, RECIPES, DTYPES):
            assert f"  {', '.join(names)}" in lines

    def test_a_small_run(self, capsys):
        assert main(["bench", "--workload", "400x64", "--rounds", "2", "--contender", OURS, "--contender", RIVAL]) == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert output.out.startswith("400x64/one/adamw/amp-clip: 400 tensors in 1 group, 25,600 parameters, ")
        assert "cold caches, 2 rounds" in output.out
        head, rows, rest = table_of(output.out)
        assert head == ["contender", "median", "p10 – p90", f"× {OURS} [95 %]", "extra memory"]
        assert sorted(row[0] for row in rows) == [OURS, RIVAL]
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_usual_contenders(self, capsys):
        assert bench("--grouping", "two", "--warm") == 0
        output = capsys.readouterr().out
        assert tables_of(output) == ["tiny/two/adamw/amp-clip/warm"]
        names = [OURS, *(name for name in CONTENDERS if name.startswith("torch-") and name not in ELSEWHERE)]
        _, rows, rest = table_of(output)
        assert sorted(row[0] for row in rows) == sorted(names)
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_usual_contenders_that_cannot_take_part_are_not_missed(self, capsys):
        assert bench("--dtype", "fp16") == 0
        _, rows, rest = table_of(capsys.readouterr().out)
        assert [row[0] for row in rows] == [OURS]
        assert rest == []

    @pytest.mark.usefixtures("quick")
    def test_repeated_options_are_combined(self, capsys):
        options = {
            "grouping": ["one", "each"],
            "optimizer": ["sgd", "adam"],
            "recipe": ["bare", "clip"],
            "dtype": ["fp32", "bf16"],
        }
        arguments = [word for option, values in options.items() for value in values for word in (f"--{option}", value)]
        assert bench(*arguments, "--contender", OURS, "--contender", OURS) == 0
        output = capsys.readouterr().out
        assert tables_of(output) == [
            "/".join(["tiny", *parts]).removesuffix("/fp32") for parts in itertools.product(*options.values())
        ]
        assert output.count(f"| {OURS} ") == 16

    @pytest.mark.usefixtures("quick")
    def test_all_contenders(self, capsys, install, monkeypatch):
        for name in ("torch-compiled", "torchao", "torchao-8bit", "deepspeed"):
            monkeypatch.setattr(CONTENDERS[name], "unavailable", classmethod(lambda cls, case: "slow"))
        for package in ("optimi", "bitsandbytes", "flashoptim", "mmengine"):
            install(package, False)
        assert bench("--contender", "all") == 0
        _, rows, rest = table_of(capsys.readouterr().out)
        missing = {line.split(": ")[1]: line.split(": ", 2)[2] for line in rest}
        assert sorted([*missing, *(row[0] for row in rows)]) == sorted(CONTENDERS)
        assert missing["optimi"] == "the package optimi is not installed"
        assert missing["torch-merged"] == "there is one group"

    @pytest.mark.usefixtures("quick")
    def test_a_contender_that_is_not_installed(self, capsys, install):
        install("optimi", False)
        assert bench("--contender", OURS, "--contender", "optimi") == 1
        _, rows, rest = table_of(capsys.readouterr().out)
        assert [row[0] for row in rows] == [OURS]
        assert rest == ["left out: optimi: the package optimi is not installed"]

    @pytest.mark.usefixtures("quick")
    def test_nobody_is_here(self, capsys, install):
        install("optimi", False)
        assert bench("--contender", "optimi") == 1
        assert capsys.readouterr().out.endswith("\n\nleft out: optimi: the package optimi is not installed\n\n")

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("named", [True, False])
    def test_a_wrong_result(self, capsys, register, named):
        wrong = register("torch-wrong", SecondStepForgotten)
        assert bench(*(["--contender", OURS, "--contender", wrong] if named else [])) == 1
        _, rows, rest = table_of(capsys.readouterr().out)
        assert wrong not in [row[0] for row in rows]
        assert any(line.startswith("left out: torch-wrong: wrong result: ") for line in rest)

    @pytest.mark.usefixtures("quick")
    def test_a_fault_of_ours_is_not_hidden(self, register):
        with pytest.raises(RuntimeError, match="no luck"):
            bench("--contender", register("fusedopt-failing", Failing))

    @pytest.mark.parametrize(
        ("option", "known"),
        [
            ("workload", WORKLOADS),
            ("grouping", GROUPINGS),
            ("optimizer", OPTIMIZERS),
            ("recipe", RECIPES),
            ("dtype", DTYPES),
            ("contender", CONTENDERS),
        ],
    )
    def test_unknown_names(self, capsys, option, known):
        error = mistake(capsys, "bench", f"--{option}", "nope")
        assert option in error and "nope" in error
        assert error.endswith(f"one of {', '.join(known)}\n")

    def test_one_unknown_name_among_others(self, capsys):
        assert "'nope'" in mistake(capsys, "bench", "--recipe", "bare", "--recipe", "nope")
        assert "nope" in mistake(capsys, "bench", "--contender", OURS, "--contender", "nope")

    def test_no_cuda(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        error = mistake(capsys, "bench", "--device", "cuda")
        assert error == "fusedopt: --device cuda: torch finds no usable CUDA device here\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--rounds", "1"], "argument --rounds: '1' is not a whole number above 1"),
            (["--rounds", "0"], "argument --rounds: '0' is not a whole number above 1"),
            (["--rounds", "many"], "argument --rounds: 'many' is not a whole number above 1"),
            (["--threads", "0"], "argument --threads: '0' is not a whole number above 0"),
            (["--device", "gpu"], "argument --device: invalid choice: 'gpu'"),
            (["--contender"], "argument --contender: expected one argument"),
        ],
    )
    def test_arguments(self, capsys, argv, message):
        error = mistake(capsys, "bench", *argv)
        assert message in error
        assert "--help" in error

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit:
            main(["bench", "--help"])
        assert exit.value.code == 0
        assert "usage: fusedopt bench" in capsys.readouterr().out
