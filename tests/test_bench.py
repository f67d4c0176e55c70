"""The benchmark's own measures: right optimizers are let in, wrong ones are not."""

from __future__ import annotations

import itertools
import math
import shutil
import weakref
from typing import Any, ClassVar

import pytest
import torch
from bench_cases import (
    COMPILING,
    CPU,
    HERE,
    PEERS,
    TINY,
    Failing,
    SecondStepForgotten,
    _one_thread,  # noqa: F401  a fixture
    _short_collections,  # noqa: F401  a fixture
    _unmeasured,  # noqa: F401  a fixture
    each_dtype,
    each_grouping,
    each_optimizer,
    each_recipe,
    is_known_to_fail,
    register,  # noqa: F401  a fixture
    run_module,
    tiny,
    torch_fused_sgd_moves,
)

from fusedopt.bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, WORKLOADS, Case, Contender, Result, run
from fusedopt.bench.cases import SCALE
from fusedopt.bench.contenders import OURS, RIVAL, Fused, TorchFused, initial_tensors
from fusedopt.bench.measure import Times
from fusedopt.bench.run import CHECKED_STEPS, expected


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
