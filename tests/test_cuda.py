"""The CUDA kernels and all that drives them, run as host code: bits, norms, chunks, launches, uploads, layouts.

Here CPU tensors play the part of GPU tensors, and hyperparameters given as tensors are read where they lie. The tests
of every backend run emulated as well; these are about what only the GPU path has. The same on a GPU: test_gpu.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    HAS_EMULATOR,
    INF,
    RAGGED,
    SMALL,
    bits,
    each_dtype,
    each_option,
    each_short_option,
    global_norm,
    module,
    parameters,
    set_gradients,
    whole_state,
)
from cuda_cases import (
    CLIPS,
    LAYOUTS,
    LOOSE,
    NORMS,
    _code,  # noqa: F401  for every test here
    contents,
    each_clip,
    each_emulated,
    emulator,
    launches_of,
    make,
    mixed,
    placed,
    reported,
)
from torch import nn

import fusedopt

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

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
