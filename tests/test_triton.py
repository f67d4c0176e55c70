"""The Triton backend: bits, launches, two devices, captures, numbers.

The kernels run in Triton's interpreter, on CPU tensors. The tests of every backend run so as well; these are about what
only this backend has. What the compiler makes of the kernels is looked at without a GPU, in processes of their own.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, INF, bits, global_norm, module, parameters, set_gradients, whole_state
from cuda_cases import CLIPS, LOOSE, NORMS, contents, each_clip, make, mixed, placed, reported
from torch import nn
from triton_cases import (
    ADAM,
    BARE,
    CPU,
    FEW,
    FULL,
    SHAPES,
    Watched,
    _watch,  # noqa: F401  for every test here
    arithmetic,
    each_option,
    each_short_option,
    launches_of,
    memory,
    prepare,
    settings_of,
    tl,
    triton,
    twins,
)

import fusedopt
from fusedopt import backends
from fusedopt.backends import BackendUnavailable, NativeBackend, TritonBackend
from fusedopt.backends import triton as backend
from fusedopt.rules import CLIP_EPS, RULES

pytestmark = pytest.mark.skipif(
    TritonBackend.unavailable(torch.device("cpu")) is not None,
    reason=f"{TritonBackend.unavailable(torch.device('cpu'))}",
)


@each_option
def test_without_clipping_the_bits_are_those_of_the_cpu_kernels(option: str) -> None:
    pair = twins(option, lambda: mixed(SHAPES))
    for step, scale in enumerate([None, 4.0, 3.0]):
        for optimizer, params in pair:
            set_gradients(params, step, scale or 1.0)
            if step == 1:
                params[3].grad = params[8].grad = None
            optimizer.step(grad_scale=scale)
        assert contents(pair[0][0]) == contents(pair[1][0])
        assert reported(pair[0][0]) == reported(pair[1][0])


@each_short_option
def test_value_clip_unscaling_and_write_back_give_the_same_bits(option: str) -> None:
    pair = twins(option, lambda: mixed(SHAPES), clip_grad=CLIPS["value"], write_back_grads=True)
    for step, scale in enumerate([2.0, 3.0]):
        for optimizer, params in pair:
            set_gradients(params, step, scale=scale)
            optimizer.step(grad_scale=scale)
        assert contents(pair[0][0]) == contents(pair[1][0])
        assert bits(param.grad for param in pair[0][1]) == bits(param.grad for param in pair[1][1])


@each_short_option
def test_any_dtypes_of_parameter_gradient_and_states_give_the_same_bits(option: str) -> None:
    """One parameter for each dtype of it and of its first state; the others' follow in turns."""
    pair = twins(
        option, lambda: [nn.Parameter(p.detach().to(DTYPES[i // 4])) for i, p in enumerate(parameters([(37,)] * 16))]
    )
    for optimizer, params in pair:
        for param in params:
            param.grad_dtype = None
        set_gradients(params, 0)
        optimizer.step()
        for i, param in enumerate(params):
            for number, (name, value) in enumerate(sorted(optimizer.state[param].items())):
                if value.dim():
                    optimizer.state[param][name] = value.to(DTYPES[(i + number) % 4])
    for step in (1, 2):
        for optimizer, params in pair:
            set_gradients(params, step)
            for i, param in enumerate(params):
                param.grad = param.grad.to(DTYPES[(i + i // 4 + step) % 4])
            optimizer.step(grad_scale=2.0)
        assert contents(pair[0][0]) == contents(pair[1][0])
    mixes = {tuple(launch[c] for c in ("PARAM", "GRAD", "A", "B", "C")) for launch in settings_of("update")}
    assert len(mixes) > 32, "each step has its own"


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_any_alignment_gives_the_same_bits(offset: int) -> None:
    pair = twins("adam-amsgrad", lambda: mixed([(2500,)] * 4))
    for step in range(2):
        for optimizer, params in pair:
            set_gradients(params, step)
            for number, param in enumerate(params):
                if step == 0:
                    param.data = placed(param.data, offset * number % 9)
                param.grad = placed(param.grad, (offset + number) % 9)
            optimizer.step()
        assert contents(pair[0][0]) == contents(pair[1][0])


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_exact_to_a_few_digits_of_float64(norm_type: float) -> None:
    optimizer, params = twins("adamw", lambda: mixed(SHAPES), clip_grad={"max_norm": 0.5, "norm_type": norm_type})[0]
    set_gradients(params, 0, scale=4.0)
    optimizer.step(grad_scale=4.0)
    exact = global_norm(params, norm_type) / 4
    tolerance = 4 * 2**-52 if norm_type in (1.0, 2.0, INF) else 1e-13
    assert float(optimizer.last_step.grad_norm) == pytest.approx(exact, rel=tolerance)
    assert float(optimizer.last_step.clip_coef) == pytest.approx(0.5 / (exact + 1e-6), rel=tolerance)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, INF])
@each_short_option
def test_with_equal_coefficients_clipping_gives_the_same_bits(option: str, norm_type: float) -> None:
    """Small whole numbers: their sums are exact in any order."""
    clip = {"max_norm": 0.7, "norm_type": norm_type}
    pair = twins(option, lambda: mixed(SHAPES), clip_grad=clip, write_back_grads=True)
    for _ in range(2):
        for optimizer, params in pair:
            for number, param in enumerate(params):
                param.grad = ((torch.arange(param.numel()) + number) % 7 - 3).to(param.dtype).view(param.shape)
            optimizer.step(grad_scale=2.0)
        assert reported(pair[0][0]) == reported(pair[1][0])
        assert float(pair[0][0].last_step.clip_coef) < 1
        assert contents(pair[0][0]) == contents(pair[1][0])
        assert bits(param.grad for param in pair[0][1]) == bits(param.grad for param in pair[1][1])


@pytest.mark.parametrize("tuning", backend._TUNINGS, ids=lambda tuning: f"{tuning.block}-{tuning.warps}")
def test_every_tuning_gives_the_same_bits(tuning: backend.Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "Launcher", lambda rule, device, **_: Watched(rule, device, tuning))
    pair = twins("adamw", lambda: parameters([(2048,), (2048 + 777,), (3, 700)]))
    for optimizer, params in pair:
        set_gradients(params, 0)
        optimizer.step()
    assert contents(pair[0][0]) == contents(pair[1][0])
    (settings,) = settings_of("update")
    assert (settings["BLOCK"], settings["num_warps"]) == tuning


# --- Launches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "kernels"), {"bare": BARE, "value": BARE, "check": FULL, "norm": FULL}.items())
def test_a_step_launches_what_it_needs(mode: str, kernels: list[str]) -> None:
    optimizer, params = make("adamw", "triton", FEW, clip_grad=CLIPS.get(mode))
    scale = 2.0 if mode == "check" else None

    def step() -> list[str]:
        return launches_of(lambda: optimizer.step(grad_scale=scale))

    set_gradients(params, 0)
    assert step() == ["map", *kernels]
    assert step() == kernels
    held = [param.grad for param in params]
    set_gradients(params, 1)
    assert step() == kernels, "gradients have moved"
    optimizer.param_groups[0]["lr"] = 0.02
    assert step() == kernels, "a hyperparameter has changed"
    params[0].grad = None
    assert step() == kernels, "a gradient has gone"
    optimizer.add_param_group({"params": parameters([(7,)])})
    assert step() == ["map", *kernels], "one more, if only without gradient"
    optimizer.zero_grad()
    assert step() == []
    assert len(held) == len(params)


def test_many_groups_are_one_launch() -> None:
    Watched.dry = True
    groups = [{"params": [param], "lr": 0.1 / (1 + i % 7)} for i, param in enumerate(parameters([(3,)] * 400))]
    optimizer = fusedopt.FusedSGD(groups, momentum=0.9, backend="triton")
    for group in groups:
        set_gradients(group["params"], 0)
    assert launches_of(optimizer.step) == ["map", *BARE]
    assert [launch.programs for launch in Watched.launched] == [400, math.ceil(400 / 128), 400]


def test_one_update_for_each_combination_of_dtypes_whatever_comes_between() -> None:
    """Gradients come and go, so that rows are sorted anew."""
    pair = twins("adamw", lambda: mixed([(5,), (9,), (17,), (3,)] * 3))
    present = [range(12), (0, 1, 5), (2,), range(12), (1, 4, 8), range(0, 12, 2)]
    for step, indices in enumerate(present):
        for _, params in pair:
            set_gradients(params, step)
            for index in set(range(12)) - set(indices):
                params[index].grad = None
        launched = launches_of(pair[0][0].step)
        pair[1][0].step()
        assert launched.count("update") == len({index % 4 for index in indices})
        assert [launch.programs for launch in Watched.launched if launch.kernel == "prepare"] == [1]
        assert contents(pair[0][0]) == contents(pair[1][0]), f"step {step}"


def test_after_a_norm_the_last_dtypes_come_first() -> None:
    """What the statistics pass has left in the cache is of the last rows."""
    params = mixed([(5,), (9,)] * 4)
    optimizer = fusedopt.FusedAdamW(params, backend="triton")
    for clip in (None, LOOSE):
        optimizer.clip_grad = clip
        set_gradients(params, 0)
        optimizer.step()
        Watched.launched.clear()
        optimizer.step()
        order = [settings["PARAM"] for settings in settings_of("update")]
        assert order == ([0, 1, 2, 3] if clip is None else [3, 2, 1, 0])


@pytest.mark.parametrize("clip", [None, LOOSE], ids=["bare", "norm"])
def test_without_elements_nothing_is_loaded_or_updated(
    clip: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("there is nothing to load")

    monkeypatch.setattr(Watched, "load", refuse)
    params = parameters([(0,), (3, 0)])
    optimizer = fusedopt.FusedAdamW(params, clip_grad=clip, backend="triton")
    set_gradients(params, 0)
    assert launches_of(optimizer.step) == ["map", "prepare"]
    assert [float(optimizer.state[param]["step"]) for param in params] == [1, 1]
    assert clip is None or (optimizer.last_step.grad_norm, optimizer.last_step.clip_coef) == (0, 1)


@pytest.mark.parametrize("clip", [None, LOOSE], ids=["bare", "norm"])
def test_parameters_that_share_memory_are_updated_one_after_the_other(clip: dict[str, Any] | None) -> None:
    results = []
    for name in ("triton", "native"):
        base, other = torch.zeros(3000), torch.zeros(7, dtype=torch.float64)
        views = [base, other, base[1000:2500], base[::2], torch.zeros(3, dtype=torch.bfloat16), base]
        params = [nn.Parameter(view) for view in views]
        optimizer = fusedopt.FusedSGD(params, lr=0.1, weight_decay=0.3, clip_grad=clip, backend=name)
        for step in range(2):
            set_gradients(params, step)
            if step == 1:
                params[1].grad = None
            launched = launches_of(optimizer.step)
            assert name == "native" or launched.count("update") == len(params) - step
        results.append(contents(optimizer))
    assert results[0] == results[1]


# --- Two devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_that_of_all_devices(norm_type: float) -> None:
    optimizer, params = make(
        "adamw", "triton-pair", SHAPES[:6], torch.float64, clip_grad={"max_norm": 0.5, "norm_type": norm_type}
    )
    for step in range(2):
        set_gradients(params, step, scale=4.0)
        launched = launches_of(lambda: optimizer.step(grad_scale=4.0))
        exact = global_norm(params, norm_type) / 4
        assert float(optimizer.last_step.grad_norm) == pytest.approx(exact, rel=1e-13)
        assert float(optimizer.last_step.clip_coef) == pytest.approx(0.5 / (exact + 1e-6), rel=1e-13)
        assert float(optimizer.last_step.found_inf) == 0
    assert launched == ["statistics", "total"] * 2 + ["prepare"] * 2 + ["update"] * 2


@pytest.mark.parametrize("clip", [None, LOOSE, CLIPS["value"]], ids=["bare", "norm", "value"])
def test_two_devices_give_the_same_bits(clip: dict[str, Any] | None) -> None:
    """Also when one of them has no gradients."""
    pair, native = (make("adamw", name, FEW * 2, clip_grad=clip) for name in ("triton-pair", "native"))
    for step, missing in enumerate([(), (0, 2, 4), (1, 3, 5), range(6), ()]):
        for optimizer, params in (pair, native):
            set_gradients(params, step)
            for index in missing:
                params[index].grad = None
            optimizer.step()
        assert contents(pair[0]) == contents(native[0])
    assert launches_of(pair[0].step).count("update") == 2


@pytest.mark.parametrize("victim", [2, 3])
@each_clip
def test_an_overflow_on_one_device_skips_the_step_on_both(clip: str, victim: int) -> None:
    optimizer, params = make("adamw", "triton-pair", [(5,), (33,)] * 2, clip_grad=CLIPS[clip])
    for step, bad in enumerate([None, INF, math.nan, None]):
        set_gradients(params, step)
        if bad is not None:
            params[victim].grad[4] = bad
        before = contents(optimizer)
        optimizer.step(grad_scale=2.0)
        assert (contents(optimizer) == before) == (bad is not None)
        assert float(optimizer.last_step.found_inf) == (bad is not None)
    assert all(float(optimizer.state[param]["step"]) == 2 for param in params)


# --- Captures ----------------------------------------------------------------------------------------------------
# A graph's launches are run when it is replayed. Uploads of tables are no launches here: they happen at the capture, to
# memory that is the capture's own. How they get into a graph of a GPU cannot be seen without one.


class Captured:
    """Launches within a ``with`` block are recorded, and run by ``replay()``."""

    def __enter__(self) -> Captured:
        self.launches = Watched.graph = []
        return self

    def __exit__(self, *failure: object) -> None:
        Watched.graph = None

    def replay(self) -> None:
        for launch in self.launches:
            launch()


def refill(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    """New contents for gradients that stay where they are."""
    before = [param.grad for param in params]
    set_gradients(params, seed, scale)
    for param, grad in zip(params, before, strict=True):
        if grad is not None:
            param.grad = grad.copy_(param.grad)


@each_clip
@pytest.mark.parametrize("option", ["sgd-momentum", "adam-amsgrad", "adamw-tensor-lr"])
def test_a_replayed_step_is_a_step(option: str, clip: str) -> None:
    replayed, eager = (make(option, "triton", FEW, clip_grad=CLIPS[clip]) for _ in range(2))
    scale = torch.tensor(2.0)
    for optimizer, params in (replayed, eager):
        refill(params, 9)
        optimizer.step(grad_scale=scale)
    before = contents(replayed[0])
    with Captured() as graph:
        replayed[0].step(grad_scale=scale)
    assert contents(replayed[0]) == before, "nothing has run"
    assert len(graph.launches) == 4, "chunk map, statistics, prepare, update"
    report = replayed[0].last_step
    for seed, bad in enumerate([None, INF, None]):
        scale.fill_(seed + 2.0)
        for optimizer, params in (replayed, eager):
            refill(params, seed)
            if bad is not None:
                params[2].grad[1, 1, 1] = bad
            if option == "adamw-tensor-lr":
                optimizer.param_groups[0]["lr"].fill_(0.1 * (seed + 1))
        graph.replay()
        eager[0].step(grad_scale=scale)
        assert contents(replayed[0]) == contents(eager[0])
        assert float(report.found_inf) == (bad is not None)
        if clip == "norm":
            assert bits([report.grad_norm, report.clip_coef]) == bits(
                [eager[0].last_step.grad_norm, eager[0].last_step.clip_coef]
            )
    assert float(whole_state(replayed[0], replayed[1][0])["step"]) == 3, "each replay counts, but for the overflow"


def test_a_step_between_replays_does_not_disturb_the_graph() -> None:
    (replayed, params), (eager, others) = (make("adamw", "triton", FEW) for _ in range(2))
    for optimizer, these in ((replayed, params), (eager, others)):
        refill(these, 9)
        optimizer.step()
    with Captured() as graph:
        replayed.step()
    for seed in range(3):
        refill(params, seed)
        refill(others, seed)
        graph.replay()
        eager.step()
        assert contents(replayed) == contents(eager)
        for optimizer, these in ((replayed, params), (eager, others)):
            known = [param.grad for param in these]
            set_gradients(these, 100 + seed)  # elsewhere
            these[0].grad = None
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.01
            for param, grad in zip(these, known, strict=True):
                param.grad = grad
        assert contents(replayed) == contents(eager)


@pytest.mark.parametrize(
    ("refused", "message"),
    {
        "no state": r"params'\]\[0\].*has no state yet",
        "no gradient": r"params'\]\[2\].*no gradient while.*captured",
        "error_if_nonfinite": "error_if_nonfinite=True reads the norm",
        "two devices": "several devices cannot be captured",
    }.items(),
)
def test_what_a_capture_cannot_hold_is_refused(refused: str, message: str) -> None:
    clip = {"max_norm": 1.0, "error_if_nonfinite": refused == "error_if_nonfinite"}
    optimizer, params = make("adamw", "triton-pair" if refused == "two devices" else "triton", FEW, clip_grad=clip)
    set_gradients(params, 0)
    if refused != "no state":
        optimizer.step()
    if refused == "no gradient":
        params[2].grad = None
    before = contents(optimizer)
    with Captured() as graph, pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert graph.launches == []
    assert contents(optimizer) == before
    optimizer.step()
    assert contents(optimizer) != before


# --- The norm where double arithmetic is slow --------------------------------------------------------------------


def norm_step(values: torch.Tensor, norm_type: float, *, slow: bool, **asked: Any) -> tuple[Any, nn.Parameter]:
    """One step of SGD with these gradients, and a report in float64 due to a second parameter without weight."""
    Watched.slow = slow
    param, wide = nn.Parameter(torch.zeros_like(values)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad, wide.grad = values, torch.zeros(1, dtype=torch.float64)
    clip = {"max_norm": 1.0, "norm_type": norm_type}
    optimizer = fusedopt.FusedSGD([param, wide], lr=1.0, clip_grad=clip, backend="triton")
    optimizer.step(**asked)
    assert settings_of("statistics")[-1]["SLOW_DOUBLE"] == slow
    return optimizer, param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", NORMS)
def test_slow_double_norm_of_random_gradients(norm_type: float, dtype: torch.dtype) -> None:
    values = torch.randn(5003).to(dtype)
    found = {slow: float(norm_step(values, norm_type, slow=slow)[0].last_step.grad_norm) for slow in (False, True)}
    param = nn.Parameter(values)
    param.grad = values
    exact = global_norm([param], norm_type)
    assert found[False] == pytest.approx(exact, rel=1e-13)
    assert found[True] == pytest.approx(exact, rel=1e-7)
    if dtype in (torch.float32, torch.float64):  # sums of a few 16-bit numbers may be exact in float
        assert (found[True] != found[False]) == (dtype == torch.float32 and norm_type in (1.0, 2.0))


@pytest.mark.parametrize("length", [1, 8, 1024, 2051])
@pytest.mark.parametrize(
    ("norm_type", "value", "dtype"),
    [
        (1.0, 3e38, torch.float32),
        (1.0, 3e38, torch.bfloat16),
        (2.0, 1e30, torch.float32),
        (2.0, 1e-25, torch.bfloat16),
        (2.0, 6e-8, torch.float16),
        (2.0, 1e-21, torch.float32),  # squares are subnormal
        (2.0, 1e-40, torch.float32),
    ],
)
def test_slow_double_norm_is_exact_where_float_overflows_or_underflows(
    norm_type: float, value: float, dtype: torch.dtype, length: int
) -> None:
    values = torch.full((length,), value, dtype=dtype)
    slow, param = norm_step(values, norm_type, slow=True, grad_scale=1.0)
    assert float(slow.last_step.found_inf) == 0, "the sum overflows, no gradient does"
    assert float(slow.last_step.grad_norm) == pytest.approx(global_norm([param], norm_type), rel=1e-12, abs=0)


def test_slow_double_norm_of_one_chunk_that_overflows_among_others() -> None:
    values = torch.randn(7000)
    values[3000] = 1e25
    values[5000:] = 1e-24
    optimizer, param = norm_step(values, 2.0, slow=True)
    assert float(optimizer.last_step.grad_norm) == pytest.approx(global_norm([param]), rel=1e-7)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
def test_a_single_nonfinite_gradient_is_found_anywhere(bad: float, slow: bool) -> None:
    for dtype, place in zip(DTYPES, (0, 1023, 2048, 3002), strict=True):
        values = torch.full((3003,), 0.5, dtype=dtype)
        values[place] = bad
        optimizer, param = norm_step(values, 2.0, slow=slow, grad_scale=2.0)
        assert float(optimizer.last_step.found_inf) == 1
        assert not param.any()


# --- Numbers -----------------------------------------------------------------------------------------------------


@triton.jit
def power_kernel(bases, exponents, results, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(results + i, arithmetic.power(tl.load(bases + i), tl.load(exponents + i)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2**-20, 1 - 2**-53])
def test_powers_are_right_to_the_last_digit(beta: float) -> None:
    steps = [*range(1, 1800), *(2**k + by for k in range(11, 21) for by in (-1, 0, 1)), *range(2000, 10**6, 4567)]
    steps = (steps + [10**6] * 2048)[:2048]
    exponents = torch.tensor(steps, dtype=torch.float64)
    found = torch.empty_like(exponents)
    with np.errstate(all="ignore"):
        power_kernel[(1,)](torch.full_like(exponents, beta), exponents, found, BLOCK=2048)
    exact = Context(prec=80, Emin=-(10**9))
    want = np.array([float(exact.power(Decimal(beta), step)) for step in steps])
    assert np.array_equal(1 - found.numpy(), 1 - want), "what the update makes of it"
    normal = want > 1e-280
    assert normal.any() or beta == 0
    assert np.array_equal(found.numpy()[normal], want[normal])
    assert np.allclose(found.numpy()[~normal], 0, atol=1e-279)


@triton.jit
def live_kernel(groups, results, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    group = groups.to(tl.int64) + i * memory.GROUP_SIZE
    tl.store(results + i, memory.hyper(group, 0, i < BLOCK - 1))


@triton.jit
def low_digits(address, dtype, mask):
    """In place of what lies at an address."""
    return tl.where(mask, (address & 255).to(tl.float64), 0.0)


@pytest.mark.parametrize("address", [7, 2**47 + 7, 2**63 + 7, 2**64 - 249])
def test_a_hyperparameter_may_lie_at_any_address(address: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "number", low_digits)
    words = memory.GROUP_SIZE.value // 8
    groups = torch.zeros(4, words, dtype=torch.int64)
    groups[:, memory.GROUP_VALUE.value] = torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64).view(torch.int64)
    groups[1, memory.GROUP_LIVE.value] = address - 2**64 if address >= 2**63 else address
    found = torch.full((4,), math.nan, dtype=torch.float64)
    live_kernel[(1,)](groups, found, BLOCK=4)
    assert found.tolist() == [0.5, 7.0, 2.5, 0.0], "the last is masked"


CODES = {
    torch.float32: memory.F32,
    torch.float64: memory.F64,
    torch.bfloat16: memory.BF16,
    torch.float16: memory.F16,
}
each_half = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
each_wide = pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)


@triton.jit
def convert_kernel(source: tl.int64, target: tl.int64, FROM: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
    """Elements of one column to those of another."""
    i = tl.arange(0, BLOCK)
    memory.store(
        target, i, i >= 0, memory.load(source, i, i >= 0, FROM, tl.float64 if FROM == memory.F64 else tl.float32), TO
    )


def converted(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the kernels store of these values."""
    count = triton.next_power_of_2(values.numel())
    source, target = torch.zeros(count, dtype=values.dtype), torch.empty(count, dtype=dtype)
    source[: values.numel()] = values
    with np.errstate(all="ignore"):
        convert_kernel[(1,)](source.data_ptr(), target.data_ptr(), CODES[values.dtype], CODES[dtype], count)
    return target[: values.numel()]


def every(half: torch.dtype) -> torch.Tensor:
    """All numbers of a 16-bit dtype, infinities and NaN included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(half)


@each_wide
@each_half
def test_every_16_bit_number_is_read_as_it_is(half: torch.dtype, wide: torch.dtype) -> None:
    torch.testing.assert_close(converted(every(half), wide), every(half).to(wide), rtol=0, atol=0, equal_nan=True)


@each_wide
@each_half
def test_16_bit_numbers_are_rounded_once_to_nearest_even(half: torch.dtype, wide: torch.dtype) -> None:
    """Halfway between any two neighbours, subnormal or not, and right beside that; beyond the last one is infinity."""
    numbers = torch.arange(torch.tensor(INF, dtype=half).view(torch.int16)).to(torch.int16)  # zero and all above it
    low = numbers.view(half).to(wide)
    gaps = low.diff()
    middle = low + torch.cat([gaps, gaps[-1:]]) / 2
    infinity = torch.tensor(INF, dtype=wide)
    even = numbers + (numbers & 1)
    for values, want in [
        (low, numbers),
        (torch.nextafter(middle, -infinity), numbers),
        (middle, even),
        (torch.nextafter(middle, infinity), numbers + 1),
    ]:
        assert torch.equal(converted(values, half).view(torch.int16), want)
        assert torch.equal(converted(-values, half).view(torch.int16), want | -(2**15))


@each_wide
@each_half
def test_what_is_no_number_stays_so_in_16_bits(half: torch.dtype, wide: torch.dtype) -> None:
    largest = torch.finfo(wide).max
    values = torch.tensor([INF, -INF, largest, -largest, math.nan, -math.nan], dtype=wide)
    assert converted(values, half)[:4].tolist() == [INF, -INF, INF, -INF]
    payloads = torch.arange(1, 2**12, dtype=torch.int32)
    odd = torch.cat([payloads + 0x7F800000, payloads - 0x800000]).view(torch.float32)
    assert odd.isnan().all()
    for nans in (values[4:], odd.to(wide)):
        assert converted(nans, half).isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_numbers_may_be_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    def number(value: float) -> torch.Tensor:
        return torch.tensor(value).to(dtype)

    clip = {"max_norm": number(1.0)}
    pair = [
        make("adam-decay", name, FEW, lr=number(1.0), weight_decay=number(1.0), clip_grad=clip)
        for name in ("triton", "native")
    ]
    for step, value in enumerate((1.0, 0.0, 1.0)):
        for optimizer, params in pair:
            for param in params:
                param.grad = torch.full_like(param, 2.0 * step)
            optimizer.param_groups[0]["weight_decay"].fill_(value)
            optimizer.step(grad_scale=number(1.0), found_inf=number(0.0))
        assert contents(pair[0][0]) == contents(pair[1][0])
        assert reported(pair[0][0]) == reported(pair[1][0])
    before = contents(pair[0][0])
    pair[0][0].step(grad_scale=number(1.0), found_inf=number(1.0))
    assert (contents(pair[0][0]) == before) == (pair[0][0].last_step.found_inf == 1)


@pytest.mark.parametrize("taken", [0, 1, 1000, 2**24 - 1, 2**24])
def test_steps_are_counted_in_the_dtype_of_the_counter(taken: int) -> None:
    """In float32 the count stays where it is at 2^24, as torch's does."""
    pair = twins("adamw", lambda: parameters([(5,), (9,)]))
    for optimizer, params in pair:
        set_gradients(params, 0)
        optimizer.step()
        for param, dtype in zip(params, (torch.float32, torch.float64), strict=True):
            optimizer.state[param]["step"] = torch.tensor(taken, dtype=dtype)
        optimizer.step()
        single, double = (float(optimizer.state[param]["step"]) for param in params)
        assert double == taken + 1
        assert single == min(taken + 1, 2**24)
    assert contents(pair[0][0]) == contents(pair[1][0])


def test_more_rows_than_one_program_prepares() -> None:
    pair = twins("adamw", lambda: parameters([(2 * (index % 16 == 1),) for index in range(130)]))
    for optimizer, params in pair:
        set_gradients(params, 0)
        optimizer.step()
        for index, param in enumerate(params):
            optimizer.state[param]["step"].fill_(index)
        params[97].grad = None
        optimizer.step()
    assert [launch.programs for launch in Watched.launched if launch.kernel == "prepare"] == [2, 2]
    assert contents(pair[0][0]) == contents(pair[1][0])
    (optimizer, params), _ = pair
    before = contents(optimizer)
    params[129].grad[1] = math.nan
    optimizer.step(grad_scale=2.0)
    assert contents(optimizer) == before
    optimizer.step(found_inf=torch.tensor(1.0))
    assert contents(optimizer) == before


# --- What is written twice ---------------------------------------------------------------------------------------


def test_constants_of_the_kernels_are_those_of_the_others() -> None:
    assert prepare.CLIP_EPS.value == CLIP_EPS == module.CLIP_EPS  # type: ignore[union-attr]
    least = module.device_chunk_elements(1)  # type: ignore[union-attr]
    for tuning in (*backend._TUNINGS, backend.Tuning(2048, 1)):
        assert least % tuning.block == 0
        assert tuning.block % (64 * tuning.warps) == 0 or tuning.warps == 1


def test_dtypes_have_the_plans_numbers() -> None:
    assert [CODES[dtype].value for dtype in backend.DTYPES] == list(range(len(DTYPES)))
    for dtype in DTYPES:
        optimizer, params = make("sgd", "triton", [(3,)], dtype)
        set_gradients(params, 0)
        optimizer.step()
        settings = settings_of("update")[-1]
        want = CODES[dtype].value
        assert [settings[name] for name in ("PARAM", "GRAD", "A", "B", "C")] == [
            want,
            want,
            *[memory.ABSENT.value] * 3,
        ]


def test_norms_have_the_plans_numbers() -> None:
    orders = {None: memory.NONE, 1.0: memory.ONE, 2.0: memory.TWO, INF: memory.INF, 3.0: memory.P, 0.5: memory.P}
    for order, kind in orders.items():
        clip = None if order is None else {"max_norm": 1.0, "norm_type": order}
        optimizer, params = make("sgd", "triton", [(3,)], clip_grad=clip)
        set_gradients(params, 0)
        optimizer.step(grad_scale=2.0)
        for kernel in ("statistics", "prepare"):
            assert settings_of(kernel)[-1]["KIND"] == kind.value


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 3)])
def test_slow_doubles_are_on_the_devices_of_the_cuda_kernels(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    device = SimpleNamespace(major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(torch.version, "hip", None)
    slow = backend._has_slow_double.__wrapped__(0)
    assert slow == module.has_slow_double(10 * major + minor) == (capability in [(8, 6), (10, 3)])  # type: ignore[union-attr]


def test_a_rule_without_kernels_is_left_to_others() -> None:
    class Other(type(ADAM)):  # type: ignore[misc]
        name = "other"

    assert TritonBackend.unavailable_for(ADAM) is None
    with pytest.raises(BackendUnavailable, match="'triton' is not available: triton has no kernels for the rule other"):
        backends.create_backend("triton", Other(), [CPU])
    backends._note_fallback.cache_clear()
    told = "native: this build has no kernels for the rule other; .*; triton: triton has no kernels .*reference"
    with pytest.warns(UserWarning, match=told):
        assert backends.create_backend("auto", Other(), [CPU]).name == "reference"
    backends._note_fallback.cache_clear()
    tried = {result.rule for result in backends.selftest.table(NativeBackend, CPU)}
    assert tried == set(RULES)
