"""Step counts: in any form, shared between processes, and those of SGD, which lie beside ``optimizer.state``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from cases import HAS_EMULATOR, SMALL, bits, each_backend, module, parameters, set_gradients, state_bits
from cases import backend_name as name_of
from oracle import CheckedStep, steps_taken
from torch import nn

import fusedopt
from fusedopt.optimizers import FUSED_TWINS

BETAS = {"lr": 0.05, "betas": (0.8, 0.9)}


def checked_step(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    set_gradients(params, seed)
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


# --- Counts of another form ------------------------------------------------------------------------------------------

FORMS = {
    "float32": lambda n: torch.tensor(float(n)),
    "float64": lambda n: torch.tensor(float(n), dtype=torch.float64),
    "float32 (1,)": lambda n: torch.full((1,), float(n)),
    "float64 (1, 1)": lambda n: torch.full((1, 1), float(n), dtype=torch.float64),
    "int64": lambda n: torch.tensor(n),
    "int64 (1,)": lambda n: torch.tensor([n]),
    "int32": lambda n: torch.tensor(n, dtype=torch.int32),
    "bfloat16 (1,)": lambda n: torch.tensor([n], dtype=torch.bfloat16),
    "a view": lambda n: torch.arange(10.0, dtype=torch.float64)[n : n + 1],
}
#: What is counted where it lies. int64 only where a CPU counts; elsewhere it is changed in place.
AS_IT_LIES = {"float32", "float64", "float32 (1,)", "float64 (1, 1)", "a view"}


def with_counts(params: list[nn.Parameter], form: Any, taken: int, **settings: Any) -> tuple[Any, list[Any]]:
    """An optimizer whose state was made by hand before the first step, as A3C's does; and its counts."""
    optimizer = fusedopt.FusedAdam(params, **BETAS, **settings)
    for param in params:
        optimizer.state[param] = {
            "step": form(taken),
            "exp_avg": torch.full_like(param, 0.1),
            "exp_avg_sq": torch.full_like(param, 0.2),
        }
    return optimizer, [optimizer.state[param]["step"] for param in params]


@each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taken", [0, 3])
def test_a_count_of_another_form_stays_the_tensor_that_it_is(form: str, taken: int, backend: str) -> None:
    params = parameters(SMALL)
    optimizer, counts = with_counts(params, FORMS[form], taken, backend=name_of(backend))
    places = [count.data_ptr() for count in counts]
    shapes = [count.shape for count in counts]
    for seed in range(3):
        checked_step(optimizer, params, seed)
    for param, count, place, shape in zip(params, counts, places, shapes, strict=True):
        assert optimizer.state[param]["step"] is count
        assert count.shape == shape
        assert float(count) == taken + 3
        kept = form in AS_IT_LIES or ("int64" in form and backend.startswith(("native-", "reference")))
        if kept and not count.is_cuda:
            assert count.data_ptr() == place
            assert count.dtype == FORMS[form](0).dtype
        else:
            assert count.dtype in (torch.float32, torch.float64)


@each_backend
def test_a_skipped_step_counts_in_no_form(backend: str) -> None:
    params = parameters(SMALL)
    optimizer, counts = with_counts(params, FORMS["int64 (1,)"], 2, backend=name_of(backend))
    set_gradients(params, 0)
    optimizer.step(found_inf=torch.tensor(1.0))
    assert [int(count) for count in counts] == [2] * len(params)
    checked_step(optimizer, params, 1)
    assert [int(count) for count in counts] == [3] * len(params)


@each_backend
@pytest.mark.parametrize("number", [3, 3.0, np.float32(3), np.int64(3)], ids=lambda number: type(number).__name__)
def test_a_number_is_taken_as_the_count(number: Any, backend: str) -> None:
    params = parameters(SMALL)
    optimizer, _ = with_counts(params, lambda n: number, 3, backend=name_of(backend))
    checked_step(optimizer, params, 0)
    assert all(isinstance(state["step"], torch.Tensor) for state in optimizer.state.values())
    assert [float(state["step"]) for state in optimizer.state.values()] == [4.0] * len(params)


@each_backend
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2), r"is a tensor of shape \(2,\); expected one count >= 0"),
        (torch.tensor(True), "has dtype torch.bool; expected a number >= 0"),
        (torch.tensor(1j), "has dtype torch.complex64; expected a number >= 0"),
        ({}, r"is \{\}; expected a number >= 0"),
        ("3", "is '3'; expected a number >= 0"),
        (-1, "is -1; expected a count >= 0"),
        (float("nan"), "is nan; expected a count >= 0"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_count_is_named_at_the_step(wrong: Any, message: str, backend: str) -> None:
    params = parameters([(4,), (5,)])
    optimizer, _ = with_counts(params, FORMS["float32"], 3, backend=name_of(backend))
    optimizer.state[params[1]]["step"] = wrong
    before, moments = bits(params), [bits([s["exp_avg"], s["exp_avg_sq"]]) for s in optimizer.state.values()]
    set_gradients(params, 0)
    with pytest.raises(
        RuntimeError, match=rf"state 'step' of parameter \(param_groups\[0\]\['params'\]\[1\].* {message}"
    ):
        optimizer.step()
    assert bits(params) == before
    assert moments == [bits([s["exp_avg"], s["exp_avg_sq"]]) for s in optimizer.state.values()]
    assert float(optimizer.state[params[0]]["step"]) == 3


@each_backend
@pytest.mark.parametrize("form", FORMS)
def test_a_shared_count_is_counted_where_it_lies_or_refused(form: str, backend: str) -> None:
    if backend.endswith("-cuda"):
        pytest.skip("memory of a GPU is shared in other ways")
    params = parameters([(4,), (5,)])
    optimizer, counts = with_counts(params, FORMS[form], 3, backend=name_of(backend))
    for count in counts:
        count.share_memory_()
    others = [count.detach() for count in counts]  # the same memory, as another process has it
    if form in AS_IT_LIES or ("int64" in form and backend.startswith(("native-", "reference"))):
        checked_step(optimizer, params, 0)
        assert [float(count) for count in others] == [4.0, 4.0]
        assert all(count.is_shared() for count in counts)
        return
    before = bits(params)
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"state 'step' of parameter .*\[0\].* in shared memory.*make it a float32"):
        optimizer.step()
    assert bits(params) == before
    assert [float(count) for count in counts] == [3.0, 3.0]


class SharedAdam(fusedopt.FusedAdam):
    """A3C's: state that exists up front, in shared memory."""

    def __init__(self, params: list[nn.Parameter], form: Any, **settings: Any):
        super().__init__(params, **settings)
        for param in params:
            self.state[param] = {
                "step": form(0).share_memory_(),
                "exp_avg": torch.zeros_like(param).share_memory_(),
                "exp_avg_sq": torch.zeros_like(param).share_memory_(),
            }


def _work(optimizer: Any, seed: int) -> None:
    torch.set_num_threads(1)
    params = optimizer.param_groups[0]["params"]
    set_gradients(params, seed)
    optimizer.step()


@pytest.mark.parametrize(
    "form", ["float32 (1,)", *(pytest.param(form, marks=pytest.mark.full) for form in ("float32", "int64", "float64"))]
)
def test_processes_that_share_a_model_count_together(form: str) -> None:
    params = parameters([(4,), (3, 5)])
    alone = [nn.Parameter(param.detach().clone()) for param in params]
    for param in params:
        param.share_memory_()
    optimizer = SharedAdam(params, FORMS[form], **BETAS)
    stock = torch.optim.Adam(alone, **BETAS, foreach=False)
    context = torch.multiprocessing.get_context("spawn")
    for seed in range(2):
        worker = context.Process(target=_work, args=(optimizer, seed))
        worker.start()
        worker.join()
        assert worker.exitcode == 0
    _work(optimizer, 2)
    for seed in range(3):
        set_gradients(alone, seed)
        stock.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0, 3.0]
    for param, expected in zip(params, alone, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-6, atol=1e-7)


# --- Counts that are hidden ------------------------------------------------------------------------------------------

SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}  # with dampening, the first step is another


def make(backend: str = "auto", shapes: Any = SMALL) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(shapes)
    return fusedopt.FusedSGD(params, **SGD, backend=name_of(backend)), params


def skip(optimizer: Any, params: list[nn.Parameter]) -> None:
    set_gradients(params, 0)
    optimizer.step(found_inf=torch.tensor(1.0))


@each_backend
def test_state_has_torchs_keys_only(backend: str) -> None:
    optimizer, params = make(backend)
    for seed in range(3):
        checked_step(optimizer, params, seed)
        assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())
    assert [steps_taken(optimizer, param) for param in params] == [3] * len(params)
    assert all(state.keys() == {"momentum_buffer"} for state in optimizer.state_dict()["state"].values())


@each_backend
def test_skipped_steps_make_no_buffer_real(backend: str) -> None:
    optimizer, params = make(backend)
    for _ in range(2):
        skip(optimizer, params)
    assert optimizer.state_dict()["state"] == {}
    checked_step(optimizer, params, 1)
    assert [steps_taken(optimizer, param) for param in params] == [1] * len(params)
    checked_step(optimizer, params, 2)


@each_backend
@pytest.mark.parametrize("how", ["dropped", "cleared", "replaced", "empty"])
@pytest.mark.parametrize("before", ["skipped", "stepped"])
def test_state_that_is_dropped_takes_its_count_along(before: str, how: str, backend: str) -> None:
    optimizer, params = make(backend)
    skip(optimizer, params)
    if before == "stepped":
        checked_step(optimizer, params, 0)
    if how == "dropped":
        for param in params:
            optimizer.state.pop(param, None)  # the reference backend makes none for a step that is skipped
    elif how == "cleared":
        optimizer.state.clear()
    elif how == "replaced":
        optimizer.state = defaultdict(dict)
    else:
        for param in params:
            optimizer.state[param] = {}
    if how != "empty":
        assert not optimizer._counts
    checked_step(optimizer, params, 1)
    assert [steps_taken(optimizer, param) for param in params] == [1] * len(params)
    checked_step(optimizer, params, 2)


@each_backend
@pytest.mark.parametrize("before", ["nothing", "skipped", "stepped"])
@pytest.mark.parametrize("how", ["value", "entry"])
def test_a_buffer_that_is_put_there_is_real(how: str, before: str, backend: str) -> None:
    optimizer, params = make(backend)
    if before != "nothing":
        skip(optimizer, params)
    if before == "stepped":
        checked_step(optimizer, params, 0)
    values = [torch.rand_like(param) for param in params]
    for param, value in zip(params, values, strict=True):
        if how == "value":
            optimizer.state[param]["momentum_buffer"] = value.clone()
        else:
            optimizer.state.pop(param, None)
            optimizer.state[param] = {"momentum_buffer": value.clone()}
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    stock = torch.optim.SGD(twins, **SGD, foreach=False)
    for twin, value in zip(twins, values, strict=True):
        stock.state[twin] = {"momentum_buffer": value.clone()}
    for seed in range(1, 3):
        set_gradients(params, seed)
        set_gradients(twins, seed)
        optimizer.step()
        stock.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("before", ["skipped", "stepped"])
@pytest.mark.parametrize("how", ["copied", "data"])
def test_a_buffer_that_is_moved_keeps_its_count(how: str, before: str, backend: str) -> None:
    optimizer, params = make(backend)
    skip(optimizer, params)
    if before == "stepped":
        checked_step(optimizer, params, 0)
    for state in optimizer.state.values():
        if how == "copied":
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        else:
            state["momentum_buffer"].data = state["momentum_buffer"].clone()
    set_gradients(params, 1)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    stock = torch.optim.SGD(twins, **SGD, foreach=False)
    if before == "stepped":
        for param, twin in zip(params, twins, strict=True):
            stock.state[twin] = {"momentum_buffer": optimizer.state[param]["momentum_buffer"].clone()}
    set_gradients(twins, 1)
    optimizer.step()
    stock.step()
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)
    checked_step(optimizer, params, 2)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("before", ["nothing", "skipped", "stepped"])
def test_copies_have_counts_of_their_own(before: str, how: str) -> None:
    optimizer, params = make()
    if before != "nothing":
        skip(optimizer, params)
    if before == "stepped":
        checked_step(optimizer, params, 0)
    pair = optimizer, params
    again, others = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert all("step" not in state for state in again.state.values())
    for seed in range(1, 3):
        checked_step(again, others, seed)
    assert [steps_taken(optimizer, param) for param in params] == [before == "stepped"] * len(params)
    for seed in range(1, 3):
        checked_step(optimizer, params, seed)
    assert bits(params) == bits(others)
    assert state_bits(optimizer) == state_bits(again)


@pytest.mark.parametrize("taken", [0.0, 2.0])
def test_a_pickle_of_a_version_that_kept_the_step_in_the_state(taken: float) -> None:
    optimizer, params = make()
    skip(optimizer, params) if taken == 0 else checked_step(optimizer, params, 0)
    state = optimizer.__getstate__()
    assert state.pop("counts") is not None
    for entry in state["state"].values():
        entry["step"] = torch.tensor(taken)
    again = fusedopt.FusedSGD.__new__(fusedopt.FusedSGD)
    again.__setstate__(state)
    assert all(set(entry) == {"momentum_buffer"} for entry in again.state.values())
    assert [steps_taken(again, param) for param in params] == [taken] * len(params)
    checked_step(again, params, 1)


@each_backend
def test_groups_that_are_added_later_count_on_their_own(backend: str) -> None:
    optimizer, params = make(backend)
    checked_step(optimizer, params, 0)
    more = parameters([(3,), (4,)], seed=3)
    optimizer.add_param_group({"params": more})
    checked_step(optimizer, [*params, *more], 1)
    checked_step(optimizer, [*params, *more], 2)
    assert [steps_taken(optimizer, param) for param in [*params, *more]] == [3] * len(params) + [2, 2]


def test_counts_keep_neither_parameters_nor_state_alive() -> None:
    optimizer, params = make()
    checked_step(optimizer, params, 0)
    buffer = weakref.ref(optimizer.state[params[4]]["momentum_buffer"].untyped_storage())
    gone = weakref.ref(params[4])
    del optimizer.param_groups[0]["params"][4]
    del optimizer.state[params[4]]
    assert buffer() is None
    assert len(optimizer._counts) == len(params) - 1
    del params[4]
    assert gone() is None
    checked_step(optimizer, params, 1)
    refs = [weakref.ref(params[0]), weakref.ref(optimizer)]
    del optimizer, params
    assert all(ref() is None for ref in refs)


def test_counts_in_a_cycle_through_the_parameter_are_collected() -> None:
    model = nn.Linear(4, 4)
    optimizer = fusedopt.FusedSGD(model.parameters(), **SGD)
    model.weight.optimizer = optimizer  # type: ignore[attr-defined]
    checked_step(optimizer, list(model.parameters()), 0)
    refs = [weakref.ref(model.weight), weakref.ref(optimizer), weakref.ref(optimizer._counts[model.weight][0])]
    del model, optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_a_count_lives_as_long_as_the_buffer_that_it_counts() -> None:
    """What was launched, or captured in a graph, works on both, and may outlive the optimizer."""
    optimizer, params = make()
    checked_step(optimizer, params, 0)
    state = optimizer.state
    count = weakref.ref(optimizer._counts[params[0]][0])
    del optimizer
    gc.collect()
    assert count() is not None
    del state
    gc.collect()
    assert count() is None


def test_many_parameters_that_come_and_go_leave_nothing() -> None:
    param = nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.FusedSGD([param], **SGD)
    for seed in range(100):
        value = torch.full((3 + seed % 2,), float(seed))
        optimizer.state.pop(param, None)
        optimizer.param_groups[0]["params"].clear()
        del param
        param = nn.Parameter(value)
        optimizer.param_groups[0]["params"].append(param)
        checked_step(optimizer, [param], seed)
        checked_step(optimizer, [param], seed + 1)
        assert len(optimizer._counts) == 1
    assert steps_taken(optimizer, param) == 2


@each_backend
def test_a_recycled_buffer_is_not_taken_for_the_one_that_was_counted(backend: str) -> None:
    optimizer, params = make(backend, [(5,)])
    (param,) = params
    same = rounds = 0
    while rounds < 20 or (not same and backend != "reference" and rounds < 500):
        rounds += 1
        optimizer.state.clear()
        skip(optimizer, params)
        if backend == "reference":
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        address = id(optimizer.state[param]["momentum_buffer"])
        del optimizer.state[param]
        fresh = [torch.ones_like(param) for _ in range(50)]  # one of them lies where the other one was
        buffer = next((each for each in fresh if id(each) == address), fresh[0])
        optimizer.state[param] = {"momentum_buffer": buffer}
        same += buffer is not fresh[0] or id(buffer) == address
        del fresh, buffer
        want = param.detach() - 0.1 * (0.9 + 0.5 * param.grad)
        optimizer.step()
        torch.testing.assert_close(param.detach(), want)
    assert same or backend == "reference", "the test is about addresses that come again"


def test_fuse_counts_torchs_buffers_as_real() -> None:
    params = parameters(SMALL)
    stock = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
    set_gradients(params, 0)
    params[1].grad = None
    stock.step()
    fused = fusedopt.fuse(stock)
    assert [steps_taken(fused, param) for param in params] == [1, 0, 1, 1, 1, 1]
    checked_step(fused, params, 1)
    checked_step(fused, params, 2)


@pytest.mark.skipif(not HAS_EMULATOR, reason="the emulator is not built")
@pytest.mark.parametrize("how", ["stepped", "loaded", "fused"])
def test_a_captured_step_counts_at_each_replay(how: str) -> None:
    assert module is not None
    params = parameters(SMALL)
    optimizer = fusedopt.FusedSGD(params, **SGD, backend="emulated")
    checked_step(optimizer, params, 0)
    if how == "loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "fused":
        stock = torch.optim.SGD(params, **SGD)
        stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = fusedopt.fuse(stock, backend="emulated")
    module.emulator.begin_capture()
    try:
        optimizer.step()
    finally:
        graph = module.emulator.end_capture()
    for seed in range(3):
        for param in params:
            param.grad.copy_(torch.full_like(param, float(seed)))  # type: ignore[union-attr]
        check = CheckedStep(optimizer)
        graph.replay()
        check.check()
    assert [steps_taken(optimizer, param) for param in params] == [4] * len(params)


@pytest.mark.parametrize("stock", FUSED_TWINS, ids=lambda stock: stock.__name__)
def test_a_rule_hides_its_step_where_torch_has_none(stock: Any) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = stock([param], lr=0.1)
    param.grad = torch.ones(2)
    optimizer.step()
    assert FUSED_TWINS[stock].rule.hides_step == ("step" not in optimizer.state[param])
