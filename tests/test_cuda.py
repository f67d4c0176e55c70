"""The CUDA kernels and all that drives them, run as host code: bits, launches, uploads, graphs and two devices.

Here CPU tensors play the part of GPU tensors, and hyperparameters given as tensors are read where they lie. The tests
of every backend run emulated as well; these are about what only the GPU path has. The same on a GPU: test_gpu.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    HAS_EMULATOR,
    INF,
    OPTIONS,
    PTX,
    PTX_BACKENDS,
    RAGGED,
    SMALL,
    bits,
    bits_but_for_nan,
    each_dtype,
    each_option,
    each_short_option,
    global_norm,
    module,
    parameters,
    set_gradients,
    use_ptx,
    whole_state,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fusedopt
from fusedopt.amp import GradScaler

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

emulator: Any = getattr(module, "emulator", None)

NORMS = [1.0, 2.0, 3.0, 0.5, INF]
#: A bound that no gradient of these tests reaches: the coefficient is 1, so results are those without clipping.
LOOSE = {"max_norm": 1e9}
CLIPS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "norm": {"max_norm": 0.5},
    "value": {"type": "value", "clip_value": 0.25},
}
each_clip = pytest.mark.parametrize("clip", CLIPS)
each_emulated = pytest.mark.parametrize("backend", ["emulated", "emulated-pair"])


@pytest.fixture(
    autouse=True,
    params=["host", *(pytest.param(name, marks=pytest.mark.ptx) for name in PTX_BACKENDS if PTX == "nvcc")],
)
def _code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels as host code, or their PTX in the interpreter; a NaN that a GPU makes has another payload."""
    if request.param != "host":
        use_ptx(request.param)
        monkeypatch.setitem(globals(), "bits", bits_but_for_nan)


def make(
    option: str,
    backend: str,
    shapes: list[tuple[int, ...]] | None = None,
    dtype: torch.dtype = torch.float32,
    **extra: Any,
) -> tuple[Any, list[nn.Parameter]]:
    cls, options = OPTIONS[option]
    params = parameters(SMALL if shapes is None else shapes, dtype)
    return cls(params, **{**copy.deepcopy(options), **extra}, backend=backend), params


def contents(optimizer: Any) -> list[tuple[bytes, dict[str, bytes]]]:
    """The bits of each parameter and of its state, the step count of any rule included."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [
        (bits([param])[0], {name: bits([value])[0] for name, value in whole_state(optimizer, param).items()})
        for param in params
    ]


def reported(optimizer: Any) -> list[bytes | None]:
    report = optimizer.last_step
    return [
        None if value is None else bits([value])[0] for value in (report.grad_norm, report.clip_coef, report.found_inf)
    ]


def mixed(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    """Parameters of all dtypes in turns."""
    values = parameters(shapes, seed=seed)
    return [nn.Parameter(value.detach().to(DTYPES[index % 4])) for index, value in enumerate(values)]


# --- The same bits -----------------------------------------------------------------------------------------------


@each_dtype
@each_option
def test_without_clipping_the_bits_are_those_of_the_cpu_kernels(option: str, dtype: torch.dtype) -> None:
    emulated, native = (make(option, backend, RAGGED, dtype) for backend in ("emulated", "native"))
    for step, scale in enumerate([None, 4.0, None, 3.0]):
        for optimizer, params in (emulated, native):
            set_gradients(params, step, scale or 1.0)
            if step == 2:
                params[4].grad = params[18].grad = None
            optimizer.step(grad_scale=scale)
        assert contents(emulated[0]) == contents(native[0])
        assert reported(emulated[0]) == reported(native[0])


@each_dtype
@pytest.mark.parametrize("norm_type", NORMS)
@each_short_option
def test_below_the_bound_too(option: str, norm_type: float, dtype: torch.dtype) -> None:
    clip = {"max_norm": 1e30, "norm_type": norm_type}
    emulated, native = (make(option, backend, RAGGED, dtype, clip_grad=clip) for backend in ("emulated", "native"))
    for step in range(2):
        for optimizer, params in (emulated, native):
            set_gradients(params, step)
            optimizer.step()
        assert contents(emulated[0]) == contents(native[0])
        report = emulated[0].last_step
        assert float(report.clip_coef) == 1
        exact = global_norm(emulated[1], norm_type)
        assert float(report.grad_norm) == pytest.approx(exact, rel=1e-12 if dtype == torch.float64 else 1e-7)


@each_dtype
@each_short_option
def test_value_clip_and_write_back_give_the_same_bits(option: str, dtype: torch.dtype) -> None:
    extra = {"clip_grad": CLIPS["value"], "write_back_grads": True}
    emulated, native = (make(option, backend, RAGGED, dtype, **extra) for backend in ("emulated", "native"))
    for step in range(2):
        for optimizer, params in (emulated, native):
            set_gradients(params, step, scale=2.0)
            optimizer.step(grad_scale=2.0)
        assert contents(emulated[0]) == contents(native[0])
        assert bits(param.grad for param in emulated[1]) == bits(param.grad for param in native[1])


@each_emulated
@pytest.mark.parametrize("norm_type", [None, 0.0, *NORMS])
def test_any_order_of_blocks_and_threads_gives_the_same_bits(norm_type: float | None, backend: str) -> None:
    """None is a bare step, 0 one that looks for non-finite gradients only."""

    def run(order: int) -> list[Any]:
        emulator.configure(order=order)
        params = mixed([*RAGGED, (9, 1000)])
        clip = {"max_norm": 0.5, "norm_type": norm_type} if norm_type else None
        optimizer = fusedopt.FusedAdamW(params, lr=0.01, clip_grad=clip, backend=backend)
        results: list[Any] = []
        for step in range(3):
            set_gradients(params, step, scale=2.0)
            if step == 1 and norm_type == 0.0:
                params[-1].grad[5, 777] = INF
            optimizer.step(grad_scale=None if norm_type is None else 2.0)
            results += [contents(optimizer), reported(optimizer)]
        return results

    want = run(0)
    for order in (1, 2, 3):
        assert run(order) == want


@pytest.mark.parametrize("clip", ["bare", "norm"])
def test_parameters_that_share_memory_are_updated_one_after_the_other(clip: str) -> None:
    for order in (0, 1, 2):
        emulator.configure(order=order)
        results = []
        for backend in ("emulated", "native"):
            base = torch.zeros(6000)
            params = [nn.Parameter(base), nn.Parameter(base[1000:5000]), nn.Parameter(base[::2]), nn.Parameter(base)]
            settings = LOOSE if CLIPS[clip] else None
            optimizer = fusedopt.FusedSGD(params, lr=0.1, weight_decay=0.3, clip_grad=settings, backend=backend)
            for step in range(2):
                set_gradients(params, step)
                optimizer.step()
            results.append(bits([base]))
        assert results[0] == results[1]


@pytest.mark.parametrize("mode", ["bare", "norm", "check"])
def test_a_counter_left_behind_heals_within_two_steps(mode: str) -> None:
    """See Note [Tickets]. Blocks that never ran stand for those of a step that nobody ordered after this one."""
    clip, scale = (LOOSE if mode == "norm" else None), (2.0 if mode == "check" else None)
    optimizer, params = make("adamw", "emulated", RAGGED, clip_grad=clip)
    for lost in (1, 5):
        set_gradients(params, 0)
        optimizer.step(grad_scale=scale)
        params[-1].grad.view(-1)[0] = INF
        emulator.configure(lost=lost)
        optimizer.step(grad_scale=scale)
        emulator.configure()
        set_gradients(params, 1)
        optimizer.step(grad_scale=scale)  # whatever it did
        native, others = make("adamw", "native", RAGGED, clip_grad=clip)
        for other, param in zip(others, params, strict=True):
            for tensor in (param, *optimizer.state[param].values()):
                tensor.detach().nan_to_num_(1.0, 1.0, 1.0)
            other.data.copy_(param)
        native.load_state_dict(optimizer.state_dict())
        for step in range(2, 6):
            for opt, these in ((optimizer, params), (native, others)):
                set_gradients(these, step)
                if mode == "check" and step % 2:
                    these[-1].grad.view(-1)[-1] = INF
                opt.step(grad_scale=scale)
            assert contents(optimizer) == contents(native)
            got, want = optimizer.last_step, native.last_step
            assert reported(optimizer)[2] == reported(native)[2]
            assert mode != "norm" or float(got.grad_norm) == pytest.approx(float(want.grad_norm), rel=1e-6)


# --- The norm where double arithmetic is slow --------------------------------------------------------------------


def norm_step(values: torch.Tensor, norm_type: float, *, slow: bool, **asked: Any) -> tuple[Any, nn.Parameter]:
    """One step of SGD with these gradients and a report in float64, due to a second parameter without weight."""
    emulator.configure(slow_double=slow)
    param, wide = nn.Parameter(torch.zeros_like(values)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    param.grad, wide.grad = values, torch.zeros(1, dtype=torch.float64)
    clip = {"max_norm": 1.0, "norm_type": norm_type}
    optimizer = fusedopt.FusedSGD([param, wide], lr=1.0, clip_grad=clip, backend="emulated")
    optimizer.step(**asked)
    assert optimizer.last_step.grad_norm.dtype == torch.float64
    return optimizer, param


@each_dtype
@pytest.mark.parametrize("norm_type", NORMS)
def test_slow_double_norm_of_random_gradients(norm_type: float, dtype: torch.dtype) -> None:
    values = torch.randn(50_001).to(dtype)
    found = {slow: float(norm_step(values, norm_type, slow=slow)[0].last_step.grad_norm) for slow in (False, True)}
    exact = global_norm([norm_step(values, norm_type, slow=True)[1]], norm_type)
    assert found[False] == pytest.approx(exact, rel=1e-12)
    assert found[True] == pytest.approx(exact, rel=1e-6)
    if dtype in (torch.float32, torch.float64):  # sums of a few 16-bit numbers may be exact in float
        assert (found[True] != found[False]) == (dtype == torch.float32 and norm_type in (1.0, 2.0))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 2048, 2049, 10_000])
@pytest.mark.parametrize(
    ("norm_type", "value", "dtype"),
    [
        (1.0, 3e38, torch.float32),
        (1.0, 3e38, torch.bfloat16),
        (2.0, 1e30, torch.float32),
        (2.0, 1e30, torch.bfloat16),
        (2.0, 1e-25, torch.float32),
        (2.0, 1e-25, torch.bfloat16),
        (2.0, 1e-40, torch.float32),
    ],
)
def test_slow_double_norm_is_exact_where_float_overflows_or_underflows(
    norm_type: float, value: float, dtype: torch.dtype, length: int
) -> None:
    values = torch.full((length,), value, dtype=dtype)
    slow, param = norm_step(values, norm_type, slow=True, grad_scale=1.0)
    assert float(slow.last_step.found_inf) == 0, "the sum overflows, no gradient does"
    fast, _ = norm_step(values, norm_type, slow=False)
    assert reported(slow)[:2] == reported(fast)[:2]
    assert float(slow.last_step.grad_norm) == pytest.approx(global_norm([param], norm_type), rel=1e-12)


def test_double_is_slow_on_gpus_not_made_for_computing_centers() -> None:
    slow = [known for known in (80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121) if module.has_slow_double(known)]  # type: ignore[union-attr]
    assert slow == [86, 87, 88, 89, 103, 110, 120, 121]


def test_slow_double_norm_of_one_chunk_that_overflows_among_others() -> None:
    values = torch.randn(20_000)
    values[9000] = 1e25
    values[15_000:] = 1e-24
    optimizer, param = norm_step(values, 2.0, slow=True)
    assert float(optimizer.last_step.grad_norm) == pytest.approx(global_norm([param]), rel=1e-6)


@each_dtype
@pytest.mark.parametrize("norm_type", [None, *NORMS])
@pytest.mark.parametrize("slow", [False, True])
def test_a_single_nonfinite_gradient_is_found_anywhere(slow: bool, norm_type: float | None, dtype: torch.dtype) -> None:
    emulator.configure(slow_double=slow)
    param = nn.Parameter(torch.zeros(5003, dtype=dtype))
    clip = {"max_norm": 1.0, "norm_type": norm_type} if norm_type else None
    optimizer = fusedopt.FusedSGD([param], lr=1.0, momentum=0.9, clip_grad=clip, backend="emulated")
    for place in (None, 0, 7, 2047, 2048, 4095, 4999, 5000, 5002, None):
        for bad in (math.nan, INF, -INF):
            param.grad = torch.full((5003,), 0.5, dtype=dtype)
            if place is not None:
                param.grad[place] = bad
            before = contents(optimizer)
            optimizer.step(grad_scale=2.0)
            assert float(optimizer.last_step.found_inf) == (place is not None)
            assert place is None or not optimizer.state[param] or contents(optimizer) == before
    assert float(whole_state(optimizer, param)["step"]) == 6
    assert param.isfinite().all()


# --- Chunks ------------------------------------------------------------------------------------------------------


def test_chunk_elements_grow_with_the_model() -> None:
    ends = [0, *(2048 * 4096 * 2**k for k in range(8)), 2**40]
    totals = sorted({max(0, end + by) for end in ends for by in (-2049, -1, 0, 1, 2048, 4097)})
    sizes = [module.device_chunk_elements(total) for total in totals]  # type: ignore[union-attr]
    assert sizes[0] == 2048
    assert sizes[-1] == 16384
    assert sizes == sorted(sizes)
    for total, size in zip(totals, sizes, strict=True):
        assert 2048 <= size <= 16384
        assert size & (size - 1) == 0
        assert size == 16384 or total // size <= 4096
        assert size == 2048 or total // (size // 2) > 4096, "no larger than needed"


@each_dtype
@each_clip
def test_every_element_is_updated_once_around_the_ends_of_chunks(clip: str, dtype: torch.dtype) -> None:
    lengths = [n for k in (1, 2, 3, 8) for n in (2048 * k - 9, 2048 * k - 1, 2048 * k, 2048 * k + 1, 2048 * k + 7)]
    params = [nn.Parameter(torch.zeros(length, dtype=dtype)) for length in lengths]
    optimizer = fusedopt.FusedSGD(params, lr=1.0, clip_grad=CLIPS[clip] and LOOSE, backend="emulated")
    for param in params:
        param.grad = (torch.arange(param.numel()) % 251 + 1).to(dtype)
    optimizer.step()
    for param in params:
        assert torch.equal(param, -param.grad)
    if CLIPS[clip]:
        assert float(optimizer.last_step.grad_norm) == pytest.approx(global_norm(params), rel=1e-7)


def test_larger_chunks() -> None:
    count = 9_000_001
    assert module.device_chunk_elements(count + 4095 + 4097) == 4096  # type: ignore[union-attr]
    params = [nn.Parameter(torch.zeros(length)) for length in (4095, count, 4097)]
    optimizer = fusedopt.FusedSGD(params, lr=1.0, backend="emulated")
    for param in params:
        param.grad = torch.arange(param.numel(), dtype=torch.float32)
    optimizer.step()
    for param in params:
        assert torch.equal(param, -param.grad)


# --- Launches ----------------------------------------------------------------------------------------------------


def launches_of(step: Callable[[], Any]) -> int:
    before = emulator.launch_count()
    step()
    return emulator.launch_count() - before


def model(many: bool) -> list[dict[str, Any]]:
    """Groups of one small model, or of 1000 tensors of all dtypes in 400 groups with 7 sets of hyperparameters."""
    if not many:
        return [{"params": parameters(SMALL)}]
    params = mixed([((index * 7) % 40,) for index in range(1000)])
    return [{"params": params[g::400], "weight_decay": 0.01 * (g % 7)} for g in range(400)]


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("mode", ["bare", "value", "norm", "check"])
def test_a_step_makes_two_launches_and_a_bare_one_one(mode: str, many: bool) -> None:
    emulator.configure(dry=many)  # launches are counted, not run
    groups = model(many)
    optimizer = fusedopt.FusedAdamW(groups, lr=0.01, clip_grad=CLIPS.get(mode), backend="emulated")
    params = [param for group in groups for param in group["params"]]
    scale = 2.0 if mode == "check" else None
    kernels = 2 if mode in ("norm", "check") else 1

    def step() -> int:
        return launches_of(lambda: optimizer.step(grad_scale=scale))

    set_gradients(params, 0)
    step()
    assert step() == kernels
    assert step() == kernels
    for param in params:
        param.grad.mul_(0.5)
    assert step() == kernels, "the same gradients with other contents"
    held = [param.grad for param in params]
    set_gradients(params, 1)
    assert step() == kernels + 1, "gradients have moved"
    assert step() == kernels
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    assert step() == kernels + 1, "a hyperparameter has changed"
    assert step() == kernels
    params[1].grad = None
    assert step() == kernels + 1, "a gradient has gone"
    assert step() == kernels
    assert len(held) == len(params)


def test_numbers_given_as_tensors_cost_no_launch_when_they_change() -> None:
    lr, decay, bound, scale = torch.tensor(0.1), torch.tensor(0.2), torch.tensor(0.5), torch.tensor(2.0)
    params = parameters(SMALL)
    optimizer = fusedopt.FusedAdamW(
        params, lr=lr, weight_decay=decay, clip_grad={"max_norm": bound}, backend="emulated"
    )
    set_gradients(params, 0)
    optimizer.step(grad_scale=scale)
    for number in (lr, decay, bound, scale):
        number.mul_(0.5)
        assert launches_of(lambda: optimizer.step(grad_scale=scale)) == 2


@pytest.mark.parametrize("given", ["argument", "attribute"])
def test_found_inf_handed_in_costs_no_launch(given: str) -> None:
    optimizer, params = make("adamw", "emulated")
    set_gradients(params, 0)
    found = torch.tensor(0.0)

    def step() -> int:
        if given == "argument":
            return launches_of(lambda: optimizer.step(grad_scale=2.0, found_inf=found))
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), found
        try:
            return launches_of(optimizer.step)
        finally:
            del optimizer.grad_scale, optimizer.found_inf

    step()
    assert step() == 1
    found.fill_(1.0)
    assert step() == 1


# --- Uploads -----------------------------------------------------------------------------------------------------


def move_one_gradient(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        middle = optimizer.param_groups[0]["params"][300]
        middle.grad = middle.grad.clone()


def add_a_group(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        more = parameters([(5,), (17,)], seed=9)
        set_gradients(more, 9)
        optimizer.add_param_group({"params": more, "lr": 0.3})


def drop_gradients(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        for index in (0, 17, 599):
            optimizer.param_groups[0]["params"][index].grad = None


def drop_all_gradients(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()


def gradients_again(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            set_gradients(group["params"], 5)


def change_two_far_apart(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        params = optimizer.param_groups[0]["params"]
        params[3].data, params[590].data = params[3].data.clone(), params[590].data.clone()


def other_layouts(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        for param in optimizer.param_groups[0]["params"][100:103]:
            param.grad = torch.cat([param.grad, param.grad]).view(2, -1).t().contiguous()[:, 0]


def grow_a_parameter(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        param = optimizer.param_groups[0]["params"][50]
        del optimizer.state[param]
        param.data = torch.linspace(0, 1, 5000)
        param.grad = torch.linspace(1, 0, 5000)


def remove_parameters(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        del optimizer.param_groups[0]["params"][200:400]


@pytest.mark.parametrize("clip", [None, LOOSE], ids=["bare", "norm"])
@each_emulated
def test_tables_follow_every_change(backend: str, clip: dict[str, Any] | None) -> None:
    optimizers = []
    for name in (backend, "native"):
        params = parameters([(index % 30,) for index in range(600)])
        optimizers.append(fusedopt.FusedAdamW(params, lr=0.01, clip_grad=clip, backend=name))
        set_gradients(params, 0)
    changes: list[Callable[[list[Any]], None]] = [
        lambda optimizers: None,
        move_one_gradient,
        drop_gradients,
        move_one_gradient,
        gradients_again,
        add_a_group,
        other_layouts,
        grow_a_parameter,
        drop_all_gradients,
        gradients_again,
        change_two_far_apart,
        remove_parameters,
        gradients_again,
    ]
    for number, change in enumerate(changes):
        change(optimizers)
        for optimizer in optimizers:
            optimizer.step()
        got, want = (contents(optimizer) for optimizer in optimizers)
        assert got == want, f"change {number}: {getattr(change, '__name__', '')}"


@each_emulated
def test_sets_of_hyperparameters_grow_and_shrink(backend: str) -> None:
    optimizers = []
    for name in (backend, "native"):
        groups = [{"params": [param]} for param in parameters([(9,)] * 300)]
        optimizers.append(fusedopt.FusedSGD(groups, lr=0.1, momentum=0.5, backend=name))
    for step, distinct in enumerate([1, 300, 300, 7, 1, 150, 299]):
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                group["lr"] = 0.1 / (1 + index % distinct)
                set_gradients(group["params"], step * 1000 + index)
            optimizer.step()
        assert contents(optimizers[0]) == contents(optimizers[1]), f"{distinct} sets"


def test_another_optimizer_in_between_does_no_harm() -> None:
    """Freed tables serve the next allocation."""
    optimizer, params = make("adamw", "emulated", RAGGED)
    other, others = make("adamw", "native", RAGGED)
    for step in range(4):
        for opt, these in ((optimizer, params), (other, others)):
            set_gradients(these, step)
            opt.step()
        passing, more = make("sgd-momentum", "emulated", RAGGED[step:])
        set_gradients(more, step)
        passing.step()
        del passing
        if step == 1:  # larger tables, in other memory
            for opt in (optimizer, other):
                opt.add_param_group({"params": parameters([(3,)] * 50, seed=2)})
    assert contents(optimizer) == contents(other)


# --- Alignment and layouts ---------------------------------------------------------------------------------------


def placed(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that starts ``offset`` elements after a 16-byte boundary, amid a bucket of sevens."""
    bucket = torch.full((tensor.numel() + 24,), 7.0, dtype=tensor.dtype)
    assert bucket.data_ptr() % 16 == 0
    view = bucket[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def whole(tensor: torch.Tensor) -> bytes:
    """Everything in the storage that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()).numpy().tobytes()


@each_dtype
@pytest.mark.parametrize("offset", range(1, 9))
@each_short_option
def test_any_alignment_of_each_column_gives_the_same_bits(option: str, offset: int, dtype: torch.dtype) -> None:
    """Parameter, gradient and states each start elsewhere; what lies around them stays."""
    results = []
    for backend in ("emulated", "native"):
        optimizer, params = make(option, backend, [(2500,), (1037,)], dtype, clip_grad=LOOSE, write_back_grads=True)
        params[0].data = placed(params[0].data, offset)
        found: list[Any] = []
        for step in range(3):
            set_gradients(params, step, scale=2.0)
            params[0].grad = placed(params[0].grad, (3 * offset + step) % 9)
            params[1].grad = placed(params[1].grad, offset)
            optimizer.step(grad_scale=2.0)
            found += [whole(params[0]), whole(params[0].grad), whole(params[1].grad)]
            for index, param in enumerate(params):
                for number, (name, value) in enumerate(sorted(optimizer.state[param].items())):
                    found.append(whole(value))
                    if value.dim():
                        optimizer.state[param][name] = placed(value, (offset * (number + 1) + index) % 9)
        results.append([*found, contents(optimizer)])
        exact = global_norm(params) if backend == "emulated" else None
        if exact is not None:  # the gradients were written back unscaled, and not clipped
            assert float(optimizer.last_step.grad_norm) == pytest.approx(exact, rel=1e-6)
    assert results[0] == results[1]


@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("param_dtype", DTYPES, ids=str)
def test_states_of_other_dtypes_and_alignments_give_the_same_bits(
    param_dtype: torch.dtype, state_dtype: torch.dtype, offset: int
) -> None:
    for option in ("adam-amsgrad", "adamw"):
        results = []
        for backend in ("emulated", "native"):
            optimizer, params = make(option, backend, [(1037,)], param_dtype)
            set_gradients(params, 0)
            optimizer.step()
            for number, (name, value) in enumerate(sorted(optimizer.state[params[0]].items())):
                if value.dim():
                    optimizer.state[params[0]][name] = placed(value.to(state_dtype), (offset * number) % 9)
            for step in (1, 2):
                set_gradients(params, step)
                params[0].grad = placed(params[0].grad, offset)
                optimizer.step()
            results.append(contents(optimizer))
        assert results[0] == results[1]


def with_holes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], -1)[..., ::2].copy_(tensor)


def rows_of_one_number(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[..., :1].clone().expand(tensor.shape)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "with holes": with_holes,
    "expanded": rows_of_one_number,
}


@each_dtype
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", [name for name in LAYOUTS if name != "expanded"])
def test_any_layout_gives_the_same_bits(param_layout: str, grad_layout: str, dtype: torch.dtype) -> None:
    results = []
    for backend in ("emulated", "native"):
        torch.manual_seed(0)
        param = nn.Parameter(LAYOUTS[param_layout](torch.randn(5, 8, 9, 7).to(dtype)))
        optimizer = fusedopt.FusedAdamW([param], lr=0.01, clip_grad=LOOSE, backend=backend)
        for _ in range(2):
            param.grad = LAYOUTS[grad_layout](torch.randn(5, 8, 9, 7).to(dtype))
            optimizer.step()
            assert float(optimizer.last_step.grad_norm) == pytest.approx(global_norm([param]), rel=1e-6)
            optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].contiguous()
        results.append([contents(optimizer), whole(param), whole(param.grad)])
    assert results[0] == results[1]


# --- Graphs ------------------------------------------------------------------------------------------------------


class Capture:
    """Records launches within a ``with`` block, which ends also when it fails; then ``replay()`` runs them."""

    graph: Any = None

    def __enter__(self) -> Capture:
        emulator.begin_capture()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graph = emulator.end_capture()

    def replay(self) -> None:
        self.graph.replay()


@pytest.fixture(autouse=True)
def _no_capture_goes_on() -> Iterator[None]:
    yield
    if emulator is not None:
        emulator.end_capture()


class Twins:
    """Two optimizers of equal parameters: one whose step is captured and replayed, one that steps eagerly.

    Gradients stay where they are and get new contents. What kernels write to is held on to: a real graph's memory pool
    does so.
    """

    def __init__(
        self,
        option: str,
        clip: str = "bare",
        dtype: torch.dtype = torch.float32,
        shapes: list[tuple[int, ...]] = SMALL,
        **live: Any,
    ):
        self.bounds = [torch.tensor(0.5), torch.tensor(0.5)]
        self.optimizers, self.params = [], []
        for bound in self.bounds:
            settings = CLIPS[clip]
            if clip == "norm":
                settings = {"max_norm": bound}
            optimizer, params = make(option, "emulated", shapes, dtype, clip_grad=settings, **copy.deepcopy(live))
            self.optimizers.append(optimizer)
            self.params.append(params)
        self.replayed, self.eager = self.optimizers
        self.held: list[Any] = []

    def set_gradients(self, seed: int, scale: float = 1.0) -> None:
        for params in self.params:
            before = [param.grad for param in params]
            set_gradients(params, seed, scale)
            for param, grad in zip(params, before, strict=True):
                if grad is not None:
                    param.grad = grad.copy_(param.grad)

    def warm_up(self, **asked: Any) -> None:
        self.set_gradients(1000)
        for optimizer in self.optimizers:
            optimizer.step(**asked)
            self.held.append(optimizer.last_step)

    def capture(self, **asked: Any) -> Capture:
        before = contents(self.replayed)
        with Capture() as capture:
            self.replayed.step(**asked)
        self.held.append(self.replayed.last_step)
        assert contents(self.replayed) == before, "nothing has run"
        return capture

    def assert_alike(self) -> None:
        assert contents(self.replayed) == contents(self.eager)


@each_clip
@each_dtype
@each_option
def test_a_replayed_step_is_a_step(option: str, dtype: torch.dtype, clip: str) -> None:
    twins = Twins(option, clip, dtype)
    twins.warm_up()
    capture = twins.capture()
    report = twins.replayed.last_step
    for seed in range(3):
        twins.set_gradients(seed)
        capture.replay()
        twins.eager.step()
        twins.assert_alike()
        if clip == "norm":
            assert bits([report.grad_norm, report.clip_coef]) == bits(
                [twins.eager.last_step.grad_norm, twins.eager.last_step.clip_coef]
            )
    state = whole_state(twins.replayed, twins.params[0][0])
    if state:
        assert float(state["step"]) == 4, "each replay counts"


@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas", "eps", "momentum", "dampening"])
@each_clip
def test_tensors_are_live_in_a_graph(clip: str, key: str) -> None:
    first = 0.25
    if key in ("momentum", "dampening"):
        twins = Twins("sgd-momentum", clip, **{key: torch.tensor(first)})
    elif key == "betas":
        twins = Twins("adamw", clip, betas=(torch.tensor(first), torch.tensor(0.9)))
    else:
        twins = Twins("adamw", clip, **{key: torch.tensor(first)})
    twins.warm_up()
    capture = twins.capture()
    for seed, value in enumerate([first, 0.5, 0.125]):
        twins.set_gradients(seed)
        for optimizer in twins.optimizers:
            given = optimizer.param_groups[0][key]
            (given[0] if key == "betas" else given).fill_(value)
        before = contents(twins.replayed)
        capture.replay()
        twins.eager.step()
        twins.assert_alike()
        assert contents(twins.replayed) != before
    # And the value matters, so that this test can fail.
    for optimizer, value in zip(twins.optimizers, (0.0, 0.75), strict=True):
        given = optimizer.param_groups[0][key]
        (given[0] if key == "betas" else given).fill_(value)
    capture.replay()
    twins.eager.step()
    assert contents(twins.replayed) != contents(twins.eager)


def test_the_bound_and_the_scale_are_live_in_a_graph() -> None:
    twins = Twins("adamw", "norm")
    scale = torch.tensor(4.0)
    twins.warm_up(grad_scale=scale)
    capture = twins.capture(grad_scale=scale)
    report = twins.replayed.last_step
    norms = set()
    for seed, (bound, factor) in enumerate([(0.5, 4.0), (0.1, 4.0), (1e9, 1.0), (0.5, 8.0)]):
        twins.set_gradients(7)
        scale.fill_(factor)
        for tensor in twins.bounds:
            tensor.fill_(bound)
        capture.replay()
        twins.eager.step(grad_scale=scale)
        twins.assert_alike()
        assert bits([report.clip_coef]) == bits([twins.eager.last_step.clip_coef])
        norms.add((float(report.grad_norm), float(report.clip_coef)))
        assert len(norms) == seed + 1


def test_numbers_are_frozen_in_a_graph() -> None:
    twins = Twins("adamw")
    twins.warm_up()
    capture = twins.capture()
    twins.replayed.param_groups[0].update(lr=0.7, betas=(0.1, 0.2), weight_decay=0.4, maximize=True)
    for seed in range(2):
        twins.set_gradients(seed)
        capture.replay()
        twins.eager.step()
        twins.assert_alike()
    # A new step takes them.
    twins.eager.param_groups[0].update(lr=0.7, betas=(0.1, 0.2), weight_decay=0.4, maximize=True)
    for optimizer in twins.optimizers:
        optimizer.step()
    twins.assert_alike()


@each_clip
def test_an_overflow_in_a_replay_skips_that_step_only(clip: str) -> None:
    twins = Twins("adam-amsgrad", clip)
    scale = torch.tensor(2.0)
    twins.warm_up(grad_scale=scale)
    capture = twins.capture(grad_scale=scale)
    report = twins.replayed.last_step
    for seed, bad in enumerate([None, INF, None, math.nan, -INF, None]):
        twins.set_gradients(seed, 2.0)
        if bad is not None:
            for params in twins.params:
                params[5].grad[100] = bad
        before = contents(twins.replayed)
        capture.replay()
        assert (contents(twins.replayed) == before) == (bad is not None)
        assert float(report.found_inf) == (bad is not None)
        twins.eager.step(grad_scale=scale)
        twins.assert_alike()
    assert float(twins.replayed.state[twins.params[0][0]]["step"]) == 4


def test_found_inf_handed_in_is_live_in_a_graph() -> None:
    for clip in CLIPS:
        twins = Twins("adamw", clip)
        found, scale = torch.tensor(0.0), torch.tensor(2.0)
        twins.warm_up(grad_scale=scale, found_inf=found)
        capture = twins.capture(grad_scale=scale, found_inf=found)
        report = twins.replayed.last_step
        for seed, value in enumerate([0.0, 1.0, 2.0, 0.0]):
            twins.set_gradients(seed)
            found.fill_(value)
            before = contents(twins.replayed)
            capture.replay()
            twins.eager.step(grad_scale=scale, found_inf=found)
            twins.assert_alike()
            assert float(report.found_inf) == (value != 0)
            assert (contents(twins.replayed) == before) == (value != 0)


def test_a_graph_of_an_amp_iteration() -> None:
    """What the scaler does on the device is the step's, but for torch._amp_update_scale_, which a graph would hold."""
    twins = Twins("adamw", "norm")
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for scaler, optimizer in zip(scalers, twins.optimizers, strict=True):
        scaler.scale(torch.zeros(()))
        twins.set_gradients(0, scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        twins.held.append(optimizer.last_step)
    scaler, eager = scalers
    with Capture() as capture:
        scaler.step(twins.replayed)
    report = twins.replayed.last_step
    scales = []
    for seed in range(9):
        twins.set_gradients(seed, eager.get_scale())
        if seed in (2, 3, 7):
            for params in twins.params:
                params[3].grad[-1] = INF
        capture.replay()
        torch._amp_update_scale_(scaler._scale, scaler._growth_tracker, report.found_inf, 2.0, 0.5, 2)
        eager.step(twins.eager)
        eager.update()
        twins.assert_alike()
        scales.append(float(scaler._scale))
        assert scales[-1] == eager.get_scale()
    assert min(scales) < 2.0**10 <= max(scales), "the scale has shrunk and grown"


@each_clip
def test_an_eager_step_between_replays_does_not_disturb_the_graph(clip: str) -> None:
    twins = Twins("adamw", clip)
    twins.warm_up()
    capture = twins.capture()
    for seed in range(4):
        twins.set_gradients(seed)
        capture.replay()
        twins.eager.step()
        for optimizer, params in zip(twins.optimizers, twins.params, strict=True):
            known = [param.grad for param in params]
            set_gradients(params, 100 + seed)  # elsewhere
            if seed == 2:
                params[2].grad = None
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.01
            twins.held.append(optimizer.last_step)
            for param, grad in zip(params, known, strict=True):
                param.grad = grad
        twins.assert_alike()


def test_several_graphs_of_one_optimizer() -> None:
    twins = Twins("adamw", lr=torch.tensor(0.1))
    twins.warm_up()
    plain = twins.capture()
    twins.replayed.clip_grad = {"max_norm": 0.5}
    twins.replayed.param_groups[0]["weight_decay"] = 0.3
    clipped = twins.capture()
    for seed in (0, 1, 1, 0, 1):
        twins.set_gradients(seed)
        (plain, clipped)[seed].replay()
        twins.eager.clip_grad = (None, {"max_norm": 0.5})[seed]
        twins.eager.param_groups[0]["weight_decay"] = (0.1, 0.3)[seed]
        twins.eager.step()
        twins.assert_alike()


def test_a_graph_holds_uploads_of_its_tables_and_the_two_kernels() -> None:
    twins = Twins("adamw", "norm")
    twins.warm_up()
    for _ in range(2):
        assert len(twins.capture().graph) == 4, "tables, chunk map, statistics, update"
    assert launches_of(twins.replayed.step) == 2, "the usual tables are as they were"


@each_clip
def test_a_graph_of_many_parameters_holds_several_uploads(clip: str) -> None:
    """Their tables are larger than the arguments of one launch; each replay writes all of them anew."""
    twins = Twins("adamw", clip, shapes=[(17 + index % 5,) for index in range(400)])
    twins.warm_up()
    few = Twins("adamw", clip)
    few.warm_up()
    captures = [twins.capture(), twins.capture()]
    assert len(captures[0].graph) == len(few.capture().graph) + 1, "32000 bytes, and the rest of the tables"
    for seed in range(4):
        twins.set_gradients(seed)
        captures[seed % 2].replay()
        twins.eager.step()
        twins.assert_alike()


@each_clip
def test_a_frozen_parameter_without_gradient_may_be_captured(clip: str) -> None:
    twins = Twins("adamw", clip)
    for params in twins.params:
        params[3].requires_grad_(False)
    twins.warm_up()
    for params in twins.params:
        params[3].grad = None
    capture = twins.capture()
    for seed in range(2):
        twins.set_gradients(seed)
        for params in twins.params:
            params[3].grad = None
        capture.replay()
        twins.eager.step()
        twins.assert_alike()


@each_emulated
def test_a_capture_before_the_first_step_is_refused(backend: str) -> None:
    optimizer, params = make("adamw", backend)
    set_gradients(params, 0)
    before = bits(params)
    with Capture() as capture, pytest.raises(RuntimeError, match=r"params'\]\[0\].*has no state yet"):
        optimizer.step()
    assert len(capture.graph) == 0
    assert bits(params) == before
    assert not optimizer.state
    optimizer.step()
    assert len(optimizer.state) == len(params)


def test_rules_without_state_can_be_captured_at_once() -> None:
    twins = Twins("sgd-decay", "norm")
    twins.set_gradients(0)
    capture = twins.capture()
    capture.replay()
    twins.eager.step()
    twins.assert_alike()


@each_clip
def test_a_missing_gradient_is_refused_in_a_capture(clip: str) -> None:
    optimizer, params = make("adamw", "emulated", clip_grad=CLIPS[clip])
    set_gradients(params, 0)
    optimizer.step()
    params[4].grad = None
    before = contents(optimizer)
    with Capture() as capture, pytest.raises(RuntimeError, match=r"params'\]\[4\].*no gradient while.*captured"):
        optimizer.step()
    assert len(capture.graph) == 0
    assert contents(optimizer) == before
    optimizer.step()
    assert contents(optimizer)[4] == before[4]
    assert contents(optimizer)[3] != before[3]


def test_error_if_nonfinite_is_refused_in_a_capture() -> None:
    clip = {"max_norm": 1.0, "error_if_nonfinite": True}
    optimizer, params = make("adamw", "emulated", clip_grad=clip)
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    with Capture() as capture, pytest.raises(RuntimeError, match="error_if_nonfinite=True reads the norm"):
        optimizer.step()
    capture.replay()
    assert contents(optimizer) == before
    optimizer.step()
    assert contents(optimizer) != before


@each_clip
def test_a_capture_over_several_devices_is_refused(clip: str) -> None:
    optimizer, params = make("adamw", "emulated-pair", clip_grad=CLIPS[clip])
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    with Capture() as capture, pytest.raises(RuntimeError, match="several devices cannot be captured"):
        optimizer.step()
    capture.replay()
    assert contents(optimizer) == before
    optimizer.step()
    assert contents(optimizer) != before


# --- Two devices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", NORMS)
def test_the_norm_is_that_of_all_devices(norm_type: float) -> None:
    clip = {"max_norm": 0.5, "norm_type": norm_type}
    pair, one = (make("adamw", name, RAGGED, torch.float64, clip_grad=clip) for name in ("emulated-pair", "emulated"))
    for step in range(2):
        for optimizer, params in (pair, one):
            set_gradients(params, step, scale=4.0)
            optimizer.step(grad_scale=4.0)
        exact = global_norm(pair[1], norm_type) / 4
        assert float(pair[0].last_step.grad_norm) == pytest.approx(exact, rel=1e-12)
        assert float(pair[0].last_step.clip_coef) == pytest.approx(0.5 / (exact + 1e-6), rel=1e-12)
        assert float(pair[0].last_step.found_inf) == 0
        torch.testing.assert_close(pair[1], one[1], rtol=1e-12, atol=1e-14)


@each_option
def test_two_devices_give_the_same_bits_without_clipping(option: str) -> None:
    pair, native = (make(option, name, RAGGED) for name in ("emulated-pair", "native"))
    for step, scale in enumerate([None, 2.0, None]):
        for optimizer, params in (pair, native):
            set_gradients(params, step, scale=scale or 1.0)
            optimizer.step(grad_scale=scale)
        assert contents(pair[0]) == contents(native[0])
        assert reported(pair[0]) == reported(native[0])


def test_value_clip_on_two_devices() -> None:
    pair, native = (make("adamw", name, RAGGED, clip_grad=CLIPS["value"]) for name in ("emulated-pair", "native"))
    for optimizer, params in (pair, native):
        set_gradients(params, 0)
        optimizer.step()
    assert contents(pair[0]) == contents(native[0])


@pytest.mark.parametrize("victim", [4, 5])
@pytest.mark.parametrize("bad", [math.nan, INF])
@each_clip
def test_an_overflow_on_one_device_skips_the_step_on_both(clip: str, bad: float, victim: int) -> None:
    optimizer, params = make("adamw", "emulated-pair", clip_grad=CLIPS[clip])
    for step in range(2):
        set_gradients(params, step)
        optimizer.step(grad_scale=2.0)
    before = contents(optimizer)
    params[victim].grad.view(-1)[77] = bad
    optimizer.step(grad_scale=2.0)
    assert contents(optimizer) == before
    assert float(optimizer.last_step.found_inf) == 1
    set_gradients(params, 3)
    optimizer.step(grad_scale=2.0)
    assert float(optimizer.last_step.found_inf) == 0
    assert all(float(optimizer.state[param]["step"]) == 3 for param in params)


@each_clip
def test_one_device_may_have_no_gradient(clip: str) -> None:
    settings = CLIPS[clip] and {**CLIPS[clip], **({"max_norm": 1e9} if clip == "norm" else {})}  # type: ignore[dict-item]
    pair, native = (make("adamw", name, clip_grad=settings) for name in ("emulated-pair", "native"))
    for step, missing in enumerate([(1, 3, 5), (0, 2, 4), (), (0, 1, 2, 3, 4, 5), (0, 2, 4)]):
        for optimizer, params in (pair, native):
            set_gradients(params, step)
            for index in missing:
                params[index].grad = None
            optimizer.step(grad_scale=2.0)
        assert contents(pair[0]) == contents(native[0])
        reports = [optimizer.last_step for optimizer in (pair[0], native[0])]
        if clip == "norm":
            assert float(reports[0].grad_norm) == pytest.approx(float(reports[1].grad_norm), rel=1e-6)
        assert (reports[0].found_inf is None) == (reports[1].found_inf is None) == (len(missing) == 6)


@pytest.mark.parametrize("wide", [0, 1])
def test_a_float64_parameter_on_one_device_makes_the_report_float64(wide: int) -> None:
    params = parameters([(33,), (17,), (9,), (5,)])
    params[wide].data = params[wide].data.double()
    optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 0.5}, backend="emulated-pair")
    set_gradients(params, 0)
    optimizer.step(grad_scale=2.0)
    report = optimizer.last_step
    assert report.grad_norm.dtype == report.clip_coef.dtype == torch.float64
    assert report.found_inf.dtype == torch.float32
    assert float(report.grad_norm) == pytest.approx(global_norm(params) / 2, rel=1e-12)
    params[wide].grad = None
    optimizer.step(grad_scale=2.0)
    assert optimizer.last_step.grad_norm.dtype == torch.float32


@pytest.mark.parametrize("norm_type", NORMS)
def test_nan_and_inf_on_one_device_reach_the_other(norm_type: float) -> None:
    for victim in range(2):
        params = parameters([(33,), (17,)])
        clip = {"max_norm": 1.0, "norm_type": norm_type}
        optimizer = fusedopt.FusedSGD(params, lr=1.0, clip_grad=clip, backend="emulated-pair")
        set_gradients(params, 0)
        params[victim].grad[3] = INF
        before = bits(params)
        optimizer.step()
        assert optimizer.last_step.grad_norm == INF
        assert optimizer.last_step.clip_coef == 0
        assert bits(params)[1 - victim] == before[1 - victim], "gradients are multiplied with 0"
        params[victim].grad[3] = math.nan
        optimizer.step()
        assert optimizer.last_step.grad_norm.isnan()
        assert all(param.isnan().all() for param in params)


@each_emulated
@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("victim", [2, 3])
def test_error_if_nonfinite_changes_nothing_on_any_device(victim: int, bad: float, backend: str) -> None:
    optimizer, params = make("adamw", backend, clip_grad={"max_norm": 1.0, "error_if_nonfinite": True})
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    params[victim].grad[0] = bad
    grads = bits(param.grad for param in params)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="total norm"):
            optimizer.step()
        assert contents(optimizer) == before
    assert bits(param.grad for param in params) == grads
    set_gradients(params, 1)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [2.0] * len(params)


# --- Numbers as tensors ------------------------------------------------------------------------------------------


@each_emulated
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_hyperparameters_may_be_tensors_of_any_dtype(dtype: torch.dtype, shape: tuple[int, ...], backend: str) -> None:
    def number(value: float) -> torch.Tensor:
        return torch.full(shape, value).to(dtype)

    results = []
    for name in (backend, "native"):
        optimizer, params = make("adam-decay", name, lr=number(1.0), weight_decay=number(1.0))
        for step, value in enumerate((1.0, 0.0, 1.0)):
            set_gradients(params, step, 2.0)
            optimizer.param_groups[0]["weight_decay"].fill_(value)
            optimizer.step(grad_scale=torch.full(shape, 2.0), found_inf=number(0.0))
        results.append(contents(optimizer))
    assert results[0] == results[1]


@each_emulated
def test_a_scale_and_a_bound_of_any_dtype(backend: str) -> None:
    for dtype in (*DTYPES, torch.int64):
        scale, bound = torch.tensor([2]).to(dtype), torch.tensor(1).to(dtype)
        optimizer, params = make("sgd", backend, dtype=torch.float64, clip_grad={"max_norm": bound})
        set_gradients(params, 0)
        optimizer.step(grad_scale=scale)
        norm = global_norm(params) / 2
        assert float(optimizer.last_step.grad_norm) == pytest.approx(norm, rel=1e-12)
        assert float(optimizer.last_step.clip_coef) == pytest.approx(1 / (norm + 1e-6), rel=1e-12)


@each_emulated
@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_tensor_of_two_elements_is_refused_by_name(key: str, backend: str) -> None:
    optimizer, params = make("adamw", backend)
    set_gradients(params, 0)
    optimizer.step()
    before = contents(optimizer)
    known = optimizer.param_groups[0][key]
    two = torch.tensor([0.1, 0.2])
    optimizer.param_groups[0][key] = (0.9, two) if key == "betas" else two
    with pytest.raises(TypeError, match=rf"param_groups\[0\]\['{key}'\] is"):
        optimizer.step()
    assert contents(optimizer) == before
    optimizer.param_groups[0][key] = known
    optimizer.step()
    assert contents(optimizer) != before


def test_a_frozen_parameter_that_no_kernel_knows_takes_no_part() -> None:
    """As one that was quantized, or that left the device, between making the optimizer and its first step."""
    optimizer, params = make("adamw", "emulated-pair", clip_grad={"max_norm": 1.0})
    plain, others = make("adamw", "emulated-pair", clip_grad={"max_norm": 1.0})
    for frozen in (params[0], others[0]):
        frozen.requires_grad_(False)
    params[0].data = torch.zeros(params[0].shape, dtype=torch.int8)
    for step in range(2):
        for opt, these in ((optimizer, params[1:]), (plain, others[1:])):
            set_gradients(these, step)
            opt.step()
        assert bits(params[1:]) == bits(others[1:])


def test_momentum_as_a_tensor_may_be_zero() -> None:
    """Whether it is cannot be known on the host, so there is a buffer in any case."""
    optimizer, params = make("sgd-momentum", "emulated", momentum=torch.tensor(0.0))
    plain, others = make("sgd", "native")
    for step in range(3):
        for opt, these in ((optimizer, params), (plain, others)):
            set_gradients(these, step)
            opt.step()
        assert bits(params) == bits(others)


def test_numbers_may_turn_into_tensors_and_back() -> None:
    optimizer, params = make("adamw", "emulated")
    other, others = make("adamw", "native")
    for step, lr in enumerate([0.1, torch.tensor(0.2), 0.3, torch.tensor(0.4), torch.tensor(0.5), 0.1]):
        for opt, these in ((optimizer, params), (other, others)):
            opt.param_groups[0]["lr"] = lr
            set_gradients(these, step)
            opt.step()
        assert contents(optimizer) == contents(other)


# --- found_inf ---------------------------------------------------------------------------------------------------


@each_emulated
@each_clip
@pytest.mark.parametrize("state", ["first step", "later step"])
@pytest.mark.parametrize("scaled", [False, True])
def test_found_inf_handed_in_skips_when_it_is_not_zero(scaled: bool, state: str, clip: str, backend: str) -> None:
    optimizer, params = make("adamw", backend, clip_grad=CLIPS[clip])
    set_gradients(params, 0)
    asked = {"grad_scale": torch.tensor(2.0)} if scaled else {}
    if state == "later step":
        optimizer.step(**asked)
    before, steps = contents(optimizer), 1.0 if state == "later step" else 0.0
    params[2].grad[0] = math.nan  # found elsewhere, and not looked for here
    for found in (torch.tensor(1.0), torch.tensor(2.0), torch.tensor([0.5]), torch.tensor(1e-40), torch.tensor(3)):
        optimizer.step(**asked, found_inf=found)
        assert bits(params) == [param for param, _ in before]
        assert [float(optimizer.state[param]["step"]) for param in params] == [steps] * len(params)
        assert state == "first step" or contents(optimizer) == before
        assert optimizer.last_step.found_inf.shape == ()
        assert float(optimizer.last_step.found_inf) == 1
    set_gradients(params, 1)
    optimizer.step(**asked, found_inf=torch.tensor(0.0))
    assert float(optimizer.last_step.found_inf) == 0
    assert [float(optimizer.state[param]["step"]) for param in params] == [steps + 1] * len(params)


# --- Nothing to do -----------------------------------------------------------------------------------------------


@each_emulated
@each_clip
@pytest.mark.parametrize("scale", [None, 2.0])
def test_empty_gradients_count_as_steps(scale: float | None, clip: str, backend: str) -> None:
    results = []
    for name in (backend, "native"):
        optimizer, params = make("adamw", name, [(0,), (3, 0), (0,)], clip_grad=CLIPS[clip])
        for step in range(3):
            set_gradients(params, step)
            if step == 1:
                params[1].grad = None
            optimizer.step(grad_scale=scale)
            results.append((contents(optimizer), reported(optimizer)))
        assert [float(optimizer.state[param]["step"]) for param in params] == [3, 2, 3]
        if clip == "norm":
            assert (float(optimizer.last_step.grad_norm), float(optimizer.last_step.clip_coef)) == (0, 1)
        assert (optimizer.last_step.found_inf is None) == (scale is None)
    assert results[:3] == results[3:]


@each_emulated
@each_clip
def test_no_gradient_at_all_makes_no_launch(clip: str, backend: str) -> None:
    optimizer, _ = make("adamw", backend, clip_grad=CLIPS[clip])
    assert launches_of(optimizer.step) == 0
    for found in (0.0, 2.0):
        assert launches_of(lambda found=found: optimizer.step(found_inf=torch.tensor(found))) == 0  # type: ignore[misc]
        assert float(optimizer.last_step.found_inf) == (found != 0)
        if clip == "norm":
            assert (float(optimizer.last_step.grad_norm), float(optimizer.last_step.clip_coef)) == (0, 1)
    assert not optimizer.state


# --- Anything ----------------------------------------------------------------------------------------------------

LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([255, 511, 513, 2047, 2048, 2049, 4099]))
PARAMETER = st.fixed_dictionaries(
    {
        "shape": st.one_of(st.just(()), st.tuples(LENGTHS), st.tuples(*[st.integers(1, 9)] * 4)),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from([*sorted(set(LAYOUTS) - {"expanded"}), "misaligned"]),
        "group": st.integers(0, 3),
    }
)
ASKED = st.fixed_dictionaries(
    {
        "missing": st.sets(st.integers(0, 7)),
        "scale": st.sampled_from([None, 1.0, 1024.0, 3.0]),
        "found_inf": st.sampled_from([None, None, 0.0, 1.0]),
        "overflow": st.one_of(st.none(), st.none(), st.integers(0, 7)),
        "layouts": st.lists(st.sampled_from([*LAYOUTS, "misaligned"]), min_size=8, max_size=8),
        "lr": st.sampled_from([0.1, 0.01]),
        "seed": st.integers(0, 99),
    }
)


def laid_out(tensor: torch.Tensor, layout: str, seed: int) -> torch.Tensor:
    if layout == "misaligned":
        return placed(tensor, seed % 9)
    fits = tensor.dim() == 4 or (layout in ("with holes", "expanded") and tensor.dim() and tensor.numel())
    return LAYOUTS[layout](tensor) if fits else tensor


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    option=st.sampled_from(sorted(OPTIONS)),
    drawn=st.lists(PARAMETER, min_size=1, max_size=8),
    clip=st.sampled_from([None, CLIPS["value"], LOOSE, {**LOOSE, "norm_type": 1.0}, {**LOOSE, "norm_type": INF}]),
    steps=st.lists(ASKED, min_size=1, max_size=4),
    order=st.integers(0, 9),
    slow_double=st.booleans(),
    write_back=st.booleans(),
)
def test_any_sequence_of_steps_has_the_bits_of_the_cpu_kernels(
    option: str,
    drawn: list[dict[str, Any]],
    clip: dict[str, Any] | None,
    steps: list[dict[str, Any]],
    order: int,
    slow_double: bool,
    write_back: bool,
) -> None:
    emulator.configure(order=order, slow_double=slow_double)
    cls, options = OPTIONS[option]
    optimizers = []
    for backend in ("native", "emulated", "emulated-pair"):
        generator = torch.Generator().manual_seed(0)
        groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.1 * g} for g in range(4)]
        for one in drawn:
            values = torch.randn(one["shape"], generator=generator).to(one["dtype"])
            groups[one["group"]]["params"].append(nn.Parameter(laid_out(values, one["layout"], one["group"])))
        chosen = [group for group in groups if group["params"]]
        extra = {"clip_grad": clip, "write_back_grads": write_back, "backend": backend}
        optimizers.append(cls(chosen, **{**options, "weight_decay": 0.0}, **extra))
    for asked in steps:
        found_inf = None if asked["found_inf"] is None else torch.tensor(asked["found_inf"])
        for optimizer in optimizers:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            set_gradients(params, asked["seed"], asked["scale"] or 1.0)
            for index, param in enumerate(params):
                if index == asked["overflow"] and asked["scale"] and param.numel():
                    param.grad.view(-1)[-1] = INF
                layout = asked["layouts"][index]
                if not (layout == "expanded" and write_back):
                    param.grad = laid_out(param.grad, layout, asked["seed"] + index)
                if index in asked["missing"]:
                    param.grad = None
            for group in optimizer.param_groups:
                group["lr"] = asked["lr"]
            optimizer.step(grad_scale=asked["scale"], found_inf=found_inf)
        want, *others = optimizers
        for optimizer in others:
            assert contents(optimizer) == contents(want)
            assert (optimizer.last_step.found_inf is None) == (want.last_step.found_inf is None)
            if want.last_step.found_inf is not None:
                assert float(optimizer.last_step.found_inf) == float(want.last_step.found_inf)
            if want.last_step.grad_norm is not None:
                torch.testing.assert_close(
                    optimizer.last_step.grad_norm, want.last_step.grad_norm, equal_nan=True, rtol=1e-6, atol=1e-12
                )
            if write_back:
                grads = [
                    [param.grad for group in opt.param_groups for param in group["params"] if param.grad is not None]
                    for opt in (optimizer, want)
                ]
                assert bits(grads[0]) == bits(grads[1])
