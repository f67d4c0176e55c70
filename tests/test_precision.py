"""State in fewer bits: what is stored is next to the exact result, by chance without a bias, and nothing else moves."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import precision_oracle as exactly
import pytest
import torch
from cases import BACKENDS, backend_name, bits, on_gpu, set_gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import FORMULAS, ROUNDINGS, steps_taken

import fusedopt
from fusedopt.rules import RULES, Precision, codes, keys_of
from fusedopt.shards import numbers_of

#: Where what is stored is compared with the formulas, on a GPU where there is one. The kernels of other devices, run on
#: this one, have the bits of the CPU's: see test_cuda_precision.py and test_triton_precision.py.
KEPT = [name for name in BACKENDS if name.startswith("native-") or name in ("reference", "triton-cuda")]
each_kept = pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.gpu] * on_gpu(name)) for name in KEPT]
)

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (17,), (3, 5, 7), (129,), (13, 50)]
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (fusedopt.FusedAdamW, {"lr": 0.05}),
    "amsgrad": (fusedopt.FusedAdam, {"lr": 0.05, "amsgrad": True, "weight_decay": 0.1}),
    "sgd": (fusedopt.FusedSGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
KEEPING: list[dict[str, Any]] = [
    {"state_dtype": "float32"},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "float16"},
    {"state_dtype": "int8"},
    {"state_dtype": "int8", "master": "float32"},
    {"state_dtype": "bfloat16", "master": "split"},
    {"state_dtype": "float32", "master": "split8"},
]


def made(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters, those of several dimensions with others than the usual strides."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    values = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]
    return [torch.nn.Parameter(value.transpose(0, -1) if value.dim() > 1 else value) for value in values]


def weights(optimizer: Any, param: torch.Tensor) -> np.ndarray:
    """A parameter with all bits that it has."""
    state = optimizer.state.get(param, {})
    value = param.detach().cpu().double().numpy()
    if "master" in state:
        return state["master"].cpu().double().numpy().copy()
    if "master_low" in state:
        low = state["master_low"].cpu().numpy()
        low = low.astype(np.int64) if optimizer.master == "split" else low.view(np.int8).astype(np.int64) * 256
        high = param.detach().cpu().view(torch.int16).numpy().astype(np.int64) << 16
        return (high + low).astype(np.int32).view(np.float32).astype(np.float64)
    return value.copy()


class Checked:
    """A step from the state it really starts from; see tests/oracle.py."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.rows = []
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = optimizer.state.get(param, {})
                columns = {}
                for column in optimizer.rule.columns:
                    key = next((key for key in keys_of(column.name) if key in state), None)
                    zeros = np.zeros(tuple(param.shape))
                    columns[column.name] = zeros if key is None else exactly.decoded(key, state[key], param)
                grad = param.grad.detach().cpu().double().numpy()
                if steps_taken_of(optimizer, param) == 0 and optimizer.rule.hides_step:
                    columns = {name: np.zeros_like(value) for name, value in columns.items()}
                step = steps_taken_of(optimizer, param) + 1
                want = FORMULAS[optimizer.rule.name](group, weights(optimizer, param), grad, columns, step)
                self.rows.append((group, param, want))

    def check(self) -> None:
        optimizer = self.optimizer
        nearest = optimizer.stochastic_rounding is False
        for group, param, want in self.rows:
            if not param.numel():
                continue
            state = optimizer.state[param]
            for name in optimizer.rule.needed_columns(group):
                key = next(key for key in keys_of(name) if key in state)
                self._check(key, state[key], param, want[name], nearest)
            if optimizer.master is None or param.dtype == torch.float32:
                self._check("param", param, param, want["param"], nearest)
            else:
                error = self._error(want["param"]) + abs(want["param"].exact) * 2.0**-15 * (
                    optimizer.master == "split8"
                )
                assert (abs(weights(optimizer, param) - want["param"].exact) <= error).all()
                rounded = torch.as_tensor(weights(optimizer, param), device=param.device).float()
                unit = 2.0 ** -(7 if param.dtype == torch.bfloat16 else 10)
                assert ((param.detach().float() - rounded).abs() <= unit / 2 * rounded.abs() + 2.0**-25).all()

    @staticmethod
    def _error(want: Any) -> np.ndarray:
        return ROUNDINGS * 2.0**-23 * want.magnitude + 1e-37

    def _check(self, key: str, stored: torch.Tensor, param: torch.Tensor, want: Any, nearest: bool) -> None:
        if stored.dtype == torch.float32:
            assert (abs(exactly.decoded(key, stored, param) - want.exact) <= self._error(want)).all(), key
        else:
            exactly.assert_neighbours(key, stored, param, want.exact, self._error(want), nearest)


def steps_taken_of(optimizer: Any, param: torch.Tensor) -> int:
    """The step count of a parameter, in whatever form its state is."""
    if optimizer._counts is None:
        return steps_taken(optimizer, param)
    return int(optimizer._counts.of_entry(param, optimizer.state.get(param, {})) or 0)


@each_kept
@pytest.mark.parametrize("by_chance", [False, True], ids=["nearest", "by-chance"])
@pytest.mark.parametrize("kept", KEEPING, ids=lambda kept: "-".join(kept.values()))
@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_stored_is_next_to_the_exact_result(
    option: str, kept: dict[str, Any], by_chance: bool, backend: str
) -> None:
    cls, options = OPTIONS[option]
    for dtype in (torch.bfloat16, torch.float16) if "split" not in kept.get("master", "") else (torch.bfloat16,):
        if by_chance and kept == {"state_dtype": "int8", "master": "float32"}:
            continue  # of codes by chance there is enough
        params = made(SHAPES, dtype)
        chance = {"seed": 2**40 + 7} if by_chance else False
        optimizer = cls(params, **options, **kept, stochastic_rounding=chance, backend=backend_name(backend))
        for seed in range(3):
            set_gradients(params, seed)
            checked = Checked(optimizer)
            optimizer.step()
            checked.check()


@each_kept
@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
def test_rounding_by_chance_has_no_bias(form: str, backend: str) -> None:
    """The frequency of the upper neighbour is the distance to the lower one, over 10^4 draws."""
    count = 10240
    values = torch.full((count,), 1.2345)
    if form == "int8":
        values[::64] = 40.0  # the largest of each block, which makes the scale
    param = torch.nn.Parameter(torch.zeros(count))
    optimizer = fusedopt.FusedSGD(
        [param], lr=0.1, momentum=0.9, state_dtype=form, stochastic_rounding=True, backend=backend_name(backend)
    )
    param.grad = values.clone()
    optimizer.step()
    key = "momentum_buffer_codes" if form == "int8" else "momentum_buffer"
    stored = exactly.decoded(key, optimizer.state[param][key], param)[(values == values[1]).cpu().numpy()]
    exact = float(values[1])
    low, high = float(stored.min()), float(stored.max())
    assert low < exact < high
    assert set(np.unique(stored)) == {low, high}
    wanted = (exact - low) / (high - low)
    spread = math.sqrt(wanted * (1 - wanted) / stored.size)
    assert abs((stored == high).mean() - wanted) < 5 * spread
    assert abs(stored.mean() - exact) < 5 * spread * (high - low)


@each_kept
def test_a_parameter_without_a_master_is_rounded_by_chance(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(10240, dtype=torch.bfloat16))
    optimizer = fusedopt.FusedAdamW(
        [param], lr=1e-4, weight_decay=0.0, stochastic_rounding=True, backend=backend_name(backend)
    )
    for _ in range(20):  # each step is a fortieth of the distance to the next bfloat16
        param.grad = torch.ones_like(param)
        optimizer.step()
    moved = 1 - param.detach().double().mean().item()
    assert abs(moved - 20e-4) < 5 * math.sqrt(20e-4 * 2.0**-8 / param.numel())


@each_kept
def test_a_bfloat16_second_moment_stands_still_unless_it_is_rounded_by_chance(backend: str) -> None:
    def after(chance: bool) -> float:
        param = torch.nn.Parameter(torch.zeros(4096))
        optimizer = fusedopt.FusedAdamW(
            [param], state_dtype="bfloat16", stochastic_rounding=chance, backend=backend_name(backend)
        )
        for step in range(60):
            param.grad = torch.full_like(param, 1.0 if step == 0 else 1.3)
            optimizer.step()
            if step == 0:
                optimizer.state[param]["exp_avg_sq"].fill_(1.0)
        return optimizer.state[param]["exp_avg_sq"].double().mean().item()

    exact = 1.69 + (1 - 1.69) * 0.999**59
    assert after(False) == 1.0
    assert abs(after(True) - exact) < 1e-3


def test_random_bits_are_those_of_philox() -> None:
    zeros, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 2**32 - 1)

    def words(counter: torch.Tensor, key: int, rounds: int) -> str:
        return " ".join(f"{int(word):08x}" for word in codes.philox((counter,) * 4, (key, key), rounds))

    # The authors' known answers.
    assert words(zeros, 0, 7) == "5f6fb709 0d893f64 4f121f81 4f730a48"
    assert words(ones, 2**32 - 1, 7) == "5207ddc2 45165e59 4d8ee751 8c52f662"
    assert words(zeros, 0, 10) == "6627e8d5 e169c58d bc57ac4c 9b00dbd8"
    numbers = torch.tensor([0, 1, 7, 8, 12345, 2**35 + 3, 2**40])
    for seed, stream, column, step in ((0, 0, 0, 1), (2**63 + 5, 3, 2, 7), (12, 2**31, 1, 2**32 + 1)):
        found = codes.random_halves(seed, stream, column, step, numbers).tolist()
        assert found == [exactly.random_half(seed, stream, column, step, int(n)) for n in numbers]


@each_kept
def test_random_bits_depend_on_seed_step_column_and_element_alone(backend: str) -> None:
    def buffers(order: list[int], seed: int = 0) -> list[torch.Tensor]:
        params = made([(100,), (100,)], torch.float32)
        for param in params:
            param.grad = torch.full_like(param, 0.3)
        optimizer = fusedopt.FusedSGD(
            [params[i] for i in order],
            momentum=0.9,
            state_dtype="bfloat16",
            stochastic_rounding={"seed": seed},
            backend=backend_name(backend),
        )
        optimizer.step()
        return [optimizer.state[params[i]]["momentum_buffer"] for i in order]

    first, second = buffers([0, 1])
    again, _ = buffers([1, 0])
    assert torch.equal(first, again)  # whoever it is, it is the first parameter
    assert not torch.equal(first, second)
    assert not torch.equal(first, buffers([0, 1], seed=1)[0])
    exact = np.float32(0.3).view(np.uint32)
    halves = np.array([exactly.random_half(0, 0, 1, 1, n) for n in range(100)], dtype=np.uint32)
    assert (first.view(torch.int16).cpu().numpy().view(np.uint16) == (exact + halves) >> 16).all()


@each_kept
@pytest.mark.parametrize("option", OPTIONS)
def test_split_is_a_float32_training_whose_parameter_is_rounded(option: str, backend: str) -> None:
    cls, options = OPTIONS[option]
    halves = made(SHAPES, torch.bfloat16)
    wholes = [torch.nn.Parameter(param.detach().float()) for param in halves]
    name = backend_name(backend)
    split = cls(halves, **options, master="split", state_dtype="float32", backend=name)
    float32 = cls(wholes, **options, backend=name)
    for seed in range(4):
        set_gradients(halves, seed)
        for half, whole in zip(halves, wholes, strict=True):
            assert half.grad is not None
            whole.grad = half.grad.float()
        split.step()
        float32.step()
        for half, whole in zip(halves, wholes, strict=True):
            assert weights(split, half).tolist() == whole.detach().double().cpu().numpy().tolist()
            high, low = codes.split(whole.detach(), 16)
            assert torch.equal(half.detach(), high)
            assert torch.equal(split.state[half]["master_low"], low) or not half.numel()
            assert bits([codes.join(high, low)]) == bits([whole])


@each_kept
@pytest.mark.parametrize("master", ["float32", "split", "split8"])
def test_what_somebody_writes_to_a_parameter_counts(master: str, backend: str) -> None:
    """Pruned, clamped or loaded weights: the bits beside them are of other numbers."""
    params = [torch.nn.Parameter((torch.arange(-256, 256) / 100).bfloat16())]
    optimizer = fusedopt.FusedAdamW(
        params, lr=1e-3, state_dtype="float32", master=master, backend=backend_name(backend), weight_decay=0.0
    )
    for seed in range(3):
        set_gradients(params, seed)
        optimizer.step()
    written = torch.zeros(512).bfloat16()
    written[::3] = -0.0
    written[::5] = 3.0
    params[0].data.copy_(written)
    params[0].grad = torch.zeros_like(params[0])
    for moment in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[0]][moment].zero_()
    optimizer.step()
    assert (params[0].detach().float() - written.float()).abs().max() <= 3.0 * 2.0**-8


@each_kept
def test_a_spike_beyond_float16_stops_no_weight(backend: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(70))]
    kept = {"exp_avg_sq": "float16"}
    optimizer = fusedopt.FusedAdamW(params, lr=0.1, state_dtype=kept, backend=backend_name(backend), weight_decay=0.0)
    for value in (1e7, 1e7):
        params[0].grad = torch.full((70,), value)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg_sq_root"].max() == 65504.0
    assert params[0].abs().min() > 0.1


@each_kept
def test_an_average_that_begins_is_the_weights_whatever_it_was(backend: str) -> None:
    params = made([(17,)], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, ema={"decay": 0.9, "begin": 3}, backend=backend_name(backend))
    set_gradients(params, 0)
    optimizer.step()
    optimizer.state[params[0]]["ema"].fill_(math.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["ema"], params[0].detach())


def test_a_maximum_is_not_coded() -> None:
    params = made([(100,)], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, amsgrad=True, state_dtype="int8")
    set_gradients(params, 0)
    optimizer.step()
    assert {"exp_avg_codes", "exp_avg_sq_codes", "max_exp_avg_sq"} < set(optimizer.state[params[0]])
    assert optimizer.state[params[0]]["max_exp_avg_sq"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a maximum would grow by rounding in 'int8'"):
        fusedopt.FusedAdamW(params, amsgrad=True, state_dtype={"max_exp_avg_sq": "int8"})


@pytest.mark.skipif("native-baseline" not in KEPT, reason="the compiled module is not there")
def test_pieces_in_other_strides_are_read_by_these() -> None:
    results = []
    for strided in (False, True):
        params = made([(6, 20)], torch.bfloat16)
        optimizer = fusedopt.FusedAdamW(params, lr=0.05, state_dtype="float32", master="split8", backend="native")
        for seed in range(3):
            set_gradients(params, seed)
            optimizer.step()
            low = optimizer.state[params[0]]["master_low"]
            if strided and seed == 0:
                wide = low.new_zeros(20, 18)[:, ::3]
                optimizer.state[params[0]]["master_low"] = wide.copy_(low)
        results.append(bits([params[0], optimizer.state[params[0]]["master_low"].contiguous()]))
    assert results[0] == results[1]
    optimizer.state[params[0]]["master_low"] = low.new_zeros(1, 1).expand(20, 6)
    with pytest.raises(RuntimeError, match="memory layout"):
        optimizer.step()


def test_pieces_of_special_numbers() -> None:
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 3.4028234e38, -1e-45, 1.0 + 2.0**-8, 1.0 - 2.0**-9])
    assert bits([codes.join(*codes.split(values, 16))]) == bits([values])
    high, low = codes.split(torch.tensor([math.nan, -math.nan]), 16)
    assert high.view(torch.int16).tolist() == [0x7FC0, 0x7FC0]
    assert low.tolist() == [0, 0]
    high, low = codes.split(values, 8)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.uint8)
    joined = codes.join(high, low)
    assert bits([joined[:4], joined[6:]]) == bits([values[:4], values[6:]])
    assert joined[4:6].tolist() == [math.inf, 0.0]


def test_float64_is_rounded_to_16_bits_once() -> None:
    doubles = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8, -1 - 3 * 2.0**-8 + 2.0**-40], dtype=torch.float64)
    assert doubles.bfloat16().tolist()[0] == 1.0  # torch rounds to float32 first
    assert codes.encode(codes.narrow(doubles), "bfloat16").tolist() == [1 + 2.0**-7, 1.0, -1 - 2.0**-7]


@pytest.mark.parametrize("form", ["bfloat16", "float16", "float16_root", "int8", "int8_unsigned"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-38, 1e30])
def test_to_decode_and_encode_again_changes_nothing(form: str, scale: float) -> None:
    generator = torch.Generator("cpu").manual_seed(1)
    values = torch.randn(1000, generator=generator) * torch.randn(1000, generator=generator).exp() * scale
    values[64:128] = 0
    values = values.abs() if form.endswith(("root", "unsigned")) else values
    once = codes.encode(values, form)
    again = codes.encode(codes.decode(once, form, 1000), form)
    # (A code of minus zero may become one of zero.)
    assert torch.equal(codes.decode(once, form, 1000), codes.decode(again, form, 1000))
    if form.startswith("int8"):
        assert torch.equal(once[codes.scales_at(1000) :], again[codes.scales_at(1000) :])
        assert once.numel() == codes.coded_bytes(1000) == 1008 + 32
    if form.endswith(("root", "unsigned")):
        tiny = codes.decode(codes.encode(torch.tensor([1e-12, 0.0, 1.0]), form), form, 3)
        assert tiny[0] > 0
        assert tiny[1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_with_what_is_not_finite_is_nan(bad: float) -> None:
    values = torch.ones(200)
    values[70] = bad
    for form in ("int8", "int8_unsigned"):
        stored = codes.decode(codes.encode(values, form), form, 200)
        assert stored[64:128].isnan().all()
        assert stored[:64].isfinite().all()
        assert stored[128:].isfinite().all()


@each_kept
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kept", [KEEPING[3], {**KEEPING[6], "ema": {"decay": 0.5}}], ids=["int8", "split8"])
def test_a_skipped_step_changes_nothing(option: str, kept: dict[str, Any], backend: str) -> None:
    cls, options = OPTIONS[option]
    params = made(SHAPES, torch.bfloat16)
    optimizer = cls(params, **options, **kept, stochastic_rounding=True, backend=backend_name(backend))

    def everything() -> list[bytes]:
        return bits([*params, *(v for p in params for v in optimizer.state[p].values())])

    set_gradients(params, 0)
    optimizer.step(found_inf=torch.ones(()))
    assert optimizer.state_dict()["state"] == {}
    optimizer.step()
    before, counts = everything(), [steps_taken_of(optimizer, param) for param in params]
    set_gradients(params, 1)
    optimizer.step(found_inf=torch.ones(()))
    assert everything() == before
    assert [steps_taken_of(optimizer, param) for param in params] == counts == [1] * len(params)


@each_kept
@pytest.mark.parametrize(
    "ema",
    [
        {"decay": 0.9},
        {"momentum": 0.6, "interval": 2},
        {"momentum": 0.01, "begin": 3, "gamma": 2.0},
        {"decay": 0.9, "begin": 2, "interval": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_average_is_mmengines(ema: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """BaseAveragedModel counts its calls from 0, copies at the first, and lerps at every interval-th."""
    params = made([(3, 5, 7), ()], dtype)
    master = {"master": "split"} if dtype == torch.bfloat16 else {}
    optimizer = fusedopt.FusedSGD(params, lr=0.1, ema=ema, **master, backend=backend_name(backend))
    momentum = ema.get("momentum", 1 - ema.get("decay", 0.0))
    wanted: list[np.ndarray] = []
    for step in range(9):
        set_gradients(params, step)
        optimizer.step()
        values = [weights(optimizer, param) for param in params]
        updates = step - ema.get("begin", 0)
        if updates <= 0:
            wanted = values
        elif updates % ema.get("interval", 1) == 0:
            weight = max(momentum, ema["gamma"] / (ema["gamma"] + updates)) if "gamma" in ema else momentum
            wanted = [(1 - weight) * old + weight * new for old, new in zip(wanted, values, strict=True)]
        for param, want in zip(params, wanted, strict=True):
            average = optimizer.state[param]["ema"]
            assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert average.stride() == param.stride()
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(average.double().cpu().numpy(), want, rtol=tolerance, atol=tolerance)


@each_kept
def test_a_parameter_that_somebody_changed_is_its_masters_new_value(backend: str) -> None:
    for master in ("float32", "split"):
        (param,) = made([(40,)], torch.bfloat16)
        optimizer = fusedopt.FusedSGD([param], lr=1e-3, master=master, backend=backend_name(backend))
        set_gradients([param], 0)
        optimizer.step()
        with torch.no_grad():
            param[3] = 5.0
        assert param.grad is not None
        optimizer.step()
        value = weights(optimizer, param)[3]
        assert abs(value - (5.0 - 1e-3 * param.grad[3].item())) < 0.04
        assert param[3].item() == pytest.approx(value, rel=2.0**-8)


BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "kept", "error", "message"),
    [
        (BF16, {"state_dtype": "int4"}, ValueError, "Invalid state_dtype: 'int4'"),
        (BF16, {"state_dtype": torch.float64}, ValueError, "Invalid state_dtype: torch.float64"),
        (BF16, {"state_dtype": 8}, TypeError, "state_dtype must be the name of a dtype"),
        (BF16, {"state_dtype": {"exp_av": "int8"}}, ValueError, "unknown state 'exp_av'; did you mean 'exp_avg'"),
        (BF16, {"state_dtype": {"exp_avg": "int9"}}, ValueError, r"Invalid state_dtype\['exp_avg'\]: 'int9'"),
        (BF16, {"master": "float64"}, ValueError, "Invalid master: 'float64'"),
        (BF16, {"master": True}, TypeError, "master must be None or one of"),
        (torch.float32, {"master": "split"}, ValueError, "master='split' is for bfloat16 and float16 parameters"),
        (
            torch.float16,
            {"master": "split"},
            ValueError,
            r"params'\]\[0\], shape \(3,\)\) is float16, and master='split'",
        ),
        (torch.float16, {"master": "split8"}, ValueError, "expected master='float32', or bfloat16 parameters"),
        (torch.float32, {"stochastic_rounding": True}, ValueError, "nothing is rounded to 16 or 8 bits here"),
        (BF16, {"stochastic_rounding": True, "master": "split", "state_dtype": "float32"}, ValueError, "nothing is"),
        (BF16, {"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True, False or dict"),
        (BF16, {"stochastic_rounding": {"sed": 1}}, ValueError, "unknown key 'sed'"),
        (BF16, {"stochastic_rounding": {"seed": -1}}, ValueError, "seed: -1"),
        (BF16, {"stochastic_rounding": {"seed": 0.5}}, TypeError, "seed: 0.5"),
        (BF16, {"ema": 0.99}, TypeError, "ema must be a dict or None, got float"),
        (BF16, {"ema": {}}, ValueError, "expected exactly one of decay and momentum"),
        (BF16, {"ema": {"decay": 0.9, "momentum": 0.1}}, ValueError, "exactly one of"),
        (BF16, {"ema": {"decay": 1.0}}, ValueError, "Invalid ema decay: 1.0"),
        (BF16, {"ema": {"momentum": 0.0}}, ValueError, "Invalid ema momentum: 0.0"),
        (BF16, {"ema": {"decay": 0.9, "begin": -1}}, ValueError, "ema begin"),
        (BF16, {"ema": {"decay": 0.9, "interval": 0}}, ValueError, "ema interval"),
        (BF16, {"ema": {"decay": 0.9, "gamma": 0}}, ValueError, "ema gamma"),
        (BF16, {"ema": {"decya": 0.9}}, ValueError, "unknown key 'decya'; did you mean 'decay'"),
    ],
)
def test_what_cannot_be(dtype: torch.dtype, kept: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.FusedAdamW([torch.nn.Parameter(torch.ones(3, dtype=dtype))], **kept, backend="reference")


def test_what_cannot_be_with_these_parameters() -> None:
    frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(ValueError, match="ema: no parameter of this optimizer requires grad"):
        fusedopt.FusedAdamW([frozen], ema={"decay": 0.9}, backend="reference")
    (param,) = made([(3,)], BF16)
    with pytest.raises(ValueError, match="SGD without momentum and without a master or ema does not"):
        fusedopt.FusedSGD([param], stochastic_rounding=True, backend="reference")
    optimizer = fusedopt.FusedSGD([param], stochastic_rounding=True, master="split8", backend="reference")
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="is float16, and master='split8'"):
        optimizer.add_param_group({"params": made([(2,)], torch.float16)})
    assert len(optimizer.param_groups) == groups
    optimizer.add_param_group({"params": made([(2,)], torch.float32)})


def test_state_in_another_form_or_half_there_is_an_error_at_a_step() -> None:
    def stepped(**kept: Any) -> Any:
        (param,) = made([(70,)], BF16)
        optimizer = fusedopt.FusedAdamW([param], **kept, backend="reference")
        set_gradients([param], 0)
        optimizer.step()
        return optimizer, param, optimizer.state[param]

    whole = stepped()[2]
    for kept, key in (
        ({"state_dtype": "int8"}, "exp_avg_codes"),
        ({"state_dtype": {"exp_avg_sq": "int8"}}, "exp_avg_sq_codes"),
    ):
        optimizer, param, state = stepped(**kept)
        state.clear()
        state.update(whole)
        before = bits([param])
        with pytest.raises(RuntimeError, match=f"where this optimizer keeps {key!r}"):
            optimizer.step()
        assert bits([param]) == before
    optimizer, param, state = stepped(state_dtype="float16", master="split", ema={"decay": 0.9})
    assert set(state) == {"step", "exp_avg", "exp_avg_sq_root", "master_low", "ema"}
    for key in state:
        broken = dict(state)
        del broken[key]
        optimizer.state[param] = broken
        with pytest.raises(RuntimeError, match=f"has no {key!r}"):
            optimizer.step()
    optimizer.state[param] = {**state, "master_low": state["master_low"].to(torch.uint8)}
    with pytest.raises(RuntimeError, match=r"'master_low' of .* is torch.uint8 .* expected torch.int16"):
        optimizer.step()
    optimizer, param, state = stepped(state_dtype="int8")
    state["exp_avg_codes"] = state["exp_avg_codes"][:-2]
    with pytest.raises(RuntimeError, match=r"expected torch.uint8 of shape \(84,\)"):
        optimizer.step()


def test_settings_are_shown_kept_and_copied() -> None:
    kept: dict[str, Any] = {
        "state_dtype": {"exp_avg": torch.bfloat16, "exp_avg_sq": "int8"},
        "master": "split8",
        "stochastic_rounding": {"seed": 5},
        "ema": {"decay": 0.99, "interval": 2},
    }
    (param,) = made([(9,)], BF16)
    optimizer = fusedopt.FusedAdamW([param], **kept, backend="reference")
    set_gradients([param], 0)
    optimizer.step()
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert each.state_dtype == {"exp_avg": "bfloat16", "exp_avg_sq": "int8"}
        assert (each.master, each.stochastic_rounding) == ("split8", {"seed": 5})
        assert each.ema == {"decay": 0.99, "begin": 0, "interval": 2}
        (mine,) = each.param_groups[0]["params"]
        mine.grad = torch.ones_like(mine)
        each.step()
        assert bits([*each.state[mine].values(), mine]) == bits([*optimizer.state[param].values(), param])
        settings = {name: getattr(each, name) for name in kept}
        assert Precision.parse(each.rule, **settings) == optimizer._precision
    assert "stochastic_rounding: {'seed': 5}" in repr(optimizer)
    with pytest.raises(AttributeError):
        optimizer.master = None
    assert Precision.parse(RULES["sgd"], "int8").settings(RULES["sgd"])["state_dtype"] == "int8"
    plain = fusedopt.FusedAdamW([param], backend="reference")
    assert (plain.state_dtype, plain.master, plain.stochastic_rounding, plain.ema) == (None, None, False, None)
    old = plain.__getstate__()
    del old["_precision"]
    restored = fusedopt.FusedAdamW.__new__(fusedopt.FusedAdamW)
    restored.__setstate__(old)
    assert restored._precision.is_plain


def test_a_twin_of_torchs_optimizer_keeps_its_state_so() -> None:
    (param,) = made([(9,)], BF16)
    twin = fusedopt.fuse(torch.optim.AdamW([param]), state_dtype="int8", master="split", backend="reference")
    set_gradients([param], 0)
    twin.step()
    assert set(twin.state[param]) == {"step", "exp_avg_codes", "exp_avg_sq_codes", "master_low"}


@pytest.fixture
def mesh() -> Any:
    """Four processes, of which only one is here."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    torch.distributed.destroy_process_group()


def test_numbers_of_a_shards_elements(mesh: Any) -> None:
    """They are those that the elements have in the whole: found by dealing out the numbers themselves."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = [Shard(0), Shard(1), Replicate()]
    for size in ((8, 6), (5, 7), (7, 3, 4), (3, 1, 2)):
        for transposed in (False, True):
            shape = tuple(reversed(size)) if transposed else size
            whole = torch.arange(math.prod(size)).view(size)
            whole = whole.permute(*reversed(range(len(size)))) if transposed else whole
            assert whole.shape == shape
            for first in kinds:
                for second in kinds:
                    tensor = distribute_tensor(whole.double(), mesh, [first, second], src_data_rank=None)
                    local = tensor.to_local()
                    found = numbers_of(tensor)
                    start, sizes, steps = found or (0, (local.numel(),), (1,))
                    numbers = np.add.outer(start, 0)
                    for n, step in zip(sizes, steps, strict=True):
                        numbers = np.add.outer(numbers, np.arange(n) * step)
                    want = exactly.canonical(local, local.numpy())
                    assert numbers.reshape(-1)[: want.size].tolist() == want.tolist(), (shape, first, second)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_sequence_of_steps_stores_what_is_next_to_the_exact_results(data: st.DataObject) -> None:
    cls, options = OPTIONS[data.draw(st.sampled_from(sorted(OPTIONS)))]
    forms = st.sampled_from(["float32", "bfloat16", "float16", "int8"])
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    masters = [None, "float32"] + (["split", "split8"] if dtype == torch.bfloat16 else [])
    kept = {
        "state_dtype": {column.name: data.draw(forms) for column in cls.rule.columns if not column.only_grows},
        "master": data.draw(st.sampled_from(masters)),
        "ema": data.draw(st.sampled_from([None, {"decay": 0.9}])),
    }
    params = made(data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)), dtype)
    backend = backend_name(data.draw(st.sampled_from(KEPT)))
    chance = data.draw(st.booleans())
    nothing = set(kept["state_dtype"].values()) == {"float32"} and kept["master"] in ("float32", "split")
    optimizer = cls(params, **options, **kept, stochastic_rounding=chance and not nothing, backend=backend)
    for seed in range(4):
        set_gradients(params, seed)
        if data.draw(st.booleans()):
            params[0].grad = None
        if data.draw(st.booleans()):
            optimizer.step(found_inf=torch.ones(()))
        checked = Checked(optimizer)
        optimizer.step()
        checked.check()
