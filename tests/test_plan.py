"""What may change between two steps, and that the plan notices."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIONS, SMALL, backend_name, bits, each_backend, each_short_option, module, parameters, set_gradients
from oracle import CheckedStep, steps_taken
from torch import nn

import fusedopt


def make(backend: str, **settings: Any) -> tuple[fusedopt.FusedAdamW, list[nn.Parameter]]:
    params = parameters(SMALL)
    return fusedopt.FusedAdamW(params, lr=0.01, **settings, backend=backend_name(backend)), params


def checked_step(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    set_gradients(params, seed)
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


@each_backend
def test_hyperparameters_are_read_each_step(backend: str) -> None:
    optimizer, params = make(backend)
    group = optimizer.param_groups[0]
    checked_step(optimizer, params, 0)
    for seed, (key, value) in enumerate(
        [("lr", 0.5), ("betas", (0.5, 0.6)), ("eps", 1e-3), ("weight_decay", 0.3), ("maximize", True), ("lr", 2)]
    ):
        group[key] = value
        checked_step(optimizer, params, seed)
    group["maximize"] = None  # torch takes any truth value
    checked_step(optimizer, params, 6)
    group["lr"] = np.float32(0.25)
    checked_step(optimizer, params, 6)
    group["lr"] = changing = np.array(0.25)
    checked_step(optimizer, params, 6)
    changing[...] = 0.75
    checked_step(optimizer, params, 6)
    group["params"] = tuple(group["params"])
    checked_step(optimizer, params, 6)
    group["betas"] = [0.5, 0.6]
    checked_step(optimizer, params, 7)
    group["betas"][0] = 0.1
    checked_step(optimizer, params, 8)


@each_backend
def test_keys_may_move_within_a_group_or_a_state(backend: str) -> None:
    optimizer, params = make(backend, weight_decay=0.1)
    group = optimizer.param_groups[0]
    checked_step(optimizer, params, 0)
    for seed, key in enumerate(("lr", "params", "betas")):
        group[key] = group.pop(key)
        group["lr"] = 0.01 * (seed + 2)
        checked_step(optimizer, params, seed + 1)
    for name in ("exp_avg", "step"):
        state = optimizer.state[params[1]]
        state[name] = state.pop(name)
        checked_step(optimizer, params, 10)
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"].clone(), state["exp_avg"].abs()
    checked_step(optimizer, params, 11)
    optimizer.state[params[1]] = {key: value.clone() for key, value in reversed(state.items())}
    checked_step(optimizer, params, 12)
    del group["eps"]
    with pytest.raises(KeyError, match="eps"):
        optimizer.step()


@each_backend
def test_tensor_hyperparameters_are_read_each_step(backend: str) -> None:
    lr, betas = torch.tensor(0.1), (torch.tensor(0.9), torch.tensor(0.99))
    params = parameters(SMALL)
    optimizer = fusedopt.FusedAdamW(params, lr=lr, betas=betas, backend=backend_name(backend))
    checked_step(optimizer, params, 0)
    lr.fill_(0.5)
    checked_step(optimizer, params, 1)
    betas[1].fill_(0.5)
    checked_step(optimizer, params, 2)


@each_backend
def test_amsgrad_and_momentum_may_be_switched_on_later(backend: str) -> None:
    optimizer, params = make(backend)
    checked_step(optimizer, params, 0)
    optimizer.param_groups[0]["amsgrad"] = True
    checked_step(optimizer, params, 1)
    optimizer.param_groups[0]["amsgrad"] = False
    checked_step(optimizer, params, 2)

    params = parameters(SMALL)
    sgd = fusedopt.FusedSGD(params, lr=0.1, backend=backend_name(backend))
    checked_step(sgd, params, 0)
    assert sgd.state_dict()["state"] == {}
    sgd.param_groups[0]["momentum"] = 0.9
    checked_step(sgd, params, 1)
    checked_step(sgd, params, 2)
    sgd.param_groups[0]["nesterov"] = True
    checked_step(sgd, params, 3)


@each_backend
def test_groups_may_be_added_removed_and_edited(backend: str) -> None:
    optimizer, params = make(backend)
    checked_step(optimizer, params, 0)
    more = parameters(SMALL, seed=5)
    optimizer.add_param_group({"params": more, "lr": 0.3})
    checked_step(optimizer, [*params, *more], 1)
    gone = optimizer.param_groups[0]["params"].pop(3)
    before = bits([gone])
    checked_step(optimizer, [*params, *more], 2)
    assert bits([gone]) == before
    optimizer.param_groups[0]["params"].append(gone)
    checked_step(optimizer, [*params, *more], 3)
    optimizer.param_groups[1]["params"] = optimizer.param_groups[1]["params"][2:]
    checked_step(optimizer, [*params, *more], 4)
    del optimizer.param_groups[0]
    before = bits(params)
    checked_step(optimizer, [*params, *more], 5)
    assert bits(params) == before


@each_backend
def test_parameters_may_be_exchanged_in_place(backend: str) -> None:
    optimizer, params = make(backend)
    others, fresh = parameters(SMALL, seed=5), parameters(SMALL, seed=6)
    optimizer.add_param_group({"params": others, "lr": 0.3})
    everything = [*params, *others, *fresh]
    first, second = (group["params"] for group in optimizer.param_groups)
    checked_step(optimizer, everything, 0)
    first[0], second[0] = second[0], first[0]
    checked_step(optimizer, everything, 1)
    gone = first[1]
    first[1] = fresh[1]
    before = bits([gone])
    checked_step(optimizer, everything, 2)
    assert bits([gone]) == before


@each_backend
def test_parameters_without_a_gradient_are_left_alone(backend: str) -> None:
    optimizer, params = make(backend)
    for seed, missing in enumerate([(0, 3), (), (1, 2, 4), (0, 1, 2, 3, 4, 5), (5,)]):
        set_gradients(params, seed)
        for index in missing:
            params[index].grad = None
        before = bits(params)
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()
        assert all(bits([params[index]])[0] == before[index] for index in missing)
    assert [int(optimizer.state[param]["step"]) for param in params] == [3, 3, 3, 3, 3, 3]


@each_backend
@each_short_option
def test_a_parameter_unfrozen_later_has_its_own_first_step(option: str, backend: str) -> None:
    """torch's fused SGD takes one is_first_step for all; apex takes the last parameter's."""
    cls, settings = OPTIONS[option]
    params = parameters(SMALL)
    optimizer = cls(params, **settings, backend=backend_name(backend))
    for seed in range(5):
        set_gradients(params, seed)
        if seed < 3:
            params[3].grad = None
        check = CheckedStep(optimizer)
        optimizer.step()
        check.check()
    assert [steps_taken(optimizer, param) for param in params] == [5, 5, 5, 2, 5, 5]


@each_backend
def test_storage_may_move(backend: str) -> None:
    optimizer, params = make(backend)
    checked_step(optimizer, params, 0)
    for param in params:
        param.data = param.data.clone()
    checked_step(optimizer, params, 1)
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()
    checked_step(optimizer, params, 2)
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()
    checked_step(optimizer, params, 3)
    params[4].data = params[4].data.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    checked_step(optimizer, params, 4)
    square = parameters([(5, 5)])
    other = fusedopt.FusedAdamW(square, lr=0.01, backend=backend_name(backend))
    checked_step(other, square, 0)
    other.state[square[0]]["exp_avg"].t_()
    checked_step(other, square, 1)
    other.state[square[0]]["step"].data = other.state[square[0]]["step"].double()
    checked_step(other, square, 2)
    other.state[square[0]]["exp_avg"].data = other.state[square[0]]["exp_avg"].bfloat16()
    checked_step(other, square, 3)
    params[3].data = params[3].data.double()
    for key in ("exp_avg", "exp_avg_sq"):
        optimizer.state[params[3]][key] = optimizer.state[params[3]][key].double()
    params[3].grad = None
    checked_step(optimizer, params, 5)


@each_backend
def test_state_may_be_edited_replaced_or_dropped(backend: str) -> None:
    optimizer, params = make(backend)
    checked_step(optimizer, params, 0)
    optimizer.state[params[4]]["exp_avg"] = torch.ones_like(params[4])
    checked_step(optimizer, params, 1)
    optimizer.state[params[4]]["exp_avg"].zero_()
    checked_step(optimizer, params, 2)
    del optimizer.state[params[3]]
    checked_step(optimizer, params, 3)
    optimizer.state[params[2]] = {}
    checked_step(optimizer, params, 4)
    renamed = {"exp_avg_sq": torch.rand_like(params[4]), "exp_avg": torch.rand_like(params[4])}
    state = optimizer.state[params[4]]
    step, old = state["step"], [state["exp_avg"], state["exp_avg_sq"]]
    state.clear()
    state.update(step=step, exp_avg_sq=old[0].abs(), exp_avg=old[1])
    checked_step(optimizer, params, 5)
    state.update(renamed)
    checked_step(optimizer, params, 5)
    first, second = (optimizer.state[params[4]][key] for key in ("exp_avg", "exp_avg_sq"))
    optimizer.state[params[4]].update(exp_avg=second, exp_avg_sq=first.abs())
    checked_step(optimizer, params, 5)
    optimizer.state = defaultdict(dict)
    checked_step(optimizer, params, 6)
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())
    optimizer.state[params[4]] = OrderedDict(optimizer.state[params[4]])
    checked_step(optimizer, params, 7)
    optimizer.state[params[4]]["exp_avg"] = torch.ones_like(params[4])
    checked_step(optimizer, params, 8)
    optimizer.state[params[4]]["step"] = 41
    optimizer.step()
    assert float(optimizer.state[params[4]]["step"]) == 42


@each_backend
def test_a_momentum_buffer_from_elsewhere_counts_as_real(backend: str) -> None:
    params = parameters(SMALL)
    optimizer = fusedopt.FusedSGD(params, lr=0.1, momentum=0.9, backend=backend_name(backend))
    optimizer.state[params[4]]["momentum_buffer"] = torch.ones_like(params[4])
    set_gradients(params, 0)
    want = params[4].detach() - 0.1 * (0.9 + params[4].grad)
    optimizer.step()
    torch.testing.assert_close(params[4].detach(), want)


@each_backend
def test_gradients_are_not_kept_alive(backend: str) -> None:
    optimizer, params = make(backend, clip_grad={"max_norm": 1.0})
    set_gradients(params, 0)
    optimizer.step(grad_scale=2.0)
    watched = [weakref.ref(param.grad.untyped_storage()) for param in params]
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert all(ref() is None for ref in [*grads, *watched])


def test_the_plan_keeps_neither_parameters_nor_state_alive() -> None:
    optimizer, params = make("auto")
    set_gradients(params, 0)
    optimizer.step()
    moment = weakref.ref(optimizer.state[params[4]]["exp_avg"].untyped_storage())
    optimizer.state.clear()
    assert moment() is None, "state that was dropped, or moved elsewhere, is freed at once"
    refs = [weakref.ref(params[4]), weakref.ref(optimizer)]
    del optimizer, params
    assert all(ref() is None for ref in refs)


@pytest.mark.parametrize("cycle", ["hook", "attribute", "group"])
def test_cycles_through_the_optimizer_are_collected(cycle: str) -> None:
    class Model(nn.Linear):
        def hook(self, grad: torch.Tensor) -> None: ...

    model = Model(4, 4)
    optimizer = fusedopt.FusedAdamW(model.parameters())
    if cycle == "hook":
        model.optimizer = optimizer  # type: ignore[assignment]
        model.weight.register_hook(model.hook)
    elif cycle == "attribute":
        model.weight.optimizer = optimizer  # type: ignore[attr-defined]
    else:
        optimizer.param_groups[0]["note"] = optimizer
    set_gradients(list(model.parameters()), 0)
    optimizer.step()
    refs = [weakref.ref(model.weight), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_swapping_a_models_tensors_still_works() -> None:
    model = nn.Linear(4, 4)
    optimizer = fusedopt.FusedSGD(model.parameters(), lr=1.0)
    set_gradients(list(model.parameters()), 0)
    optimizer.step()
    optimizer.zero_grad()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert model.weight.dtype == torch.float64
    checked_step(optimizer, list(model.parameters()), 1)


def test_another_thread_may_drop_gradients_and_may_not_step() -> None:
    params = parameters([(3_000_000,)] * 4)
    optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 1.0})
    # Creates the state: reading param.grad in Python while another thread drops it makes torch 2.13 itself crash.
    set_gradients(params, 0)
    optimizer.step()
    refused: list[str] = []
    stop = threading.Event()

    def interfere() -> None:
        while not stop.is_set():
            for param in params:
                param.grad = None
            try:
                optimizer.step()
            except RuntimeError as error:
                refused.append(str(error))

    thread = threading.Thread(target=interfere)
    thread.start()
    try:
        for seed in range(15):
            grads = [torch.full((3_000_000,), 1e-4 * (seed + 1)) for _ in params]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            del grads
            try:
                optimizer.step()
            except RuntimeError as error:
                refused.append(str(error))
    finally:
        stop.set()
        thread.join()
    assert all(param.isfinite().all() for param in params)
    assert set(refused) <= {"a step of this optimizer is running in another thread"}


def test_another_thread_may_drop_everything_while_a_step_runs() -> None:
    """The step counts what it has made in memory that only it still holds; sanitizers would tell of another's."""
    for clear in ("state", "params"):
        param = nn.Parameter(torch.zeros(2_000_000))
        param.grad = torch.ones_like(param)
        optimizer = fusedopt.FusedAdamW([param], lr=0.1)
        optimizer.step()
        held = [optimizer.state] if clear == "state" else [optimizer.state, optimizer.param_groups[0]["params"]]
        del param
        begun = threading.Event()

        def drop(begun: threading.Event = begun, held: list[Any] = held) -> None:
            begun.wait()
            for each in held:
                each.clear()

        thread = threading.Thread(target=drop)
        thread.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)  # so the other thread runs when the step lets it, and not before
        try:
            begun.set()
            optimizer.step()
        finally:
            sys.setswitchinterval(interval)
            thread.join()
        assert not optimizer.state


def test_a_recycled_address_is_not_mistaken_for_a_known_object() -> None:
    """A cache keyed by id() grows for ever, or hits an id that was given to another object."""
    recycled = 0
    param = nn.Parameter(torch.zeros(3))
    optimizer = fusedopt.FusedSGD([param], lr=1.0)
    for seed in range(200):
        address, dtype = id(param), (torch.float32, torch.float64, torch.bfloat16)[seed % 3]
        optimizer.param_groups[0]["params"].clear()
        optimizer.param_groups[0]["lr"] = 0.0
        values = torch.full((3 + seed % 2,), float(seed), dtype=dtype)
        del param
        param = nn.Parameter(values)
        recycled += id(param) == address
        optimizer.param_groups[0]["params"].append(param)
        optimizer.param_groups[0]["lr"] = float(seed % 7)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.tolist() == [seed - float(seed % 7)] * len(param)
    assert recycled, "the test is about addresses that come again"


def test_the_plan_does_not_grow_over_steps() -> None:
    optimizer, params = make("auto")
    for seed in range(5):
        set_gradients(params, seed)
        optimizer.step()
    plan = optimizer._chosen_backend()._plan  # type: ignore[attr-defined]
    assert plan.row_count == len(SMALL)
    assert plan.chunk_count == sum(-(-param.numel() // 16384) for param in params)


def test_equal_hyperparameters_in_many_groups() -> None:
    params = parameters([(9,)] * 50)
    groups = [{"params": [param], "lr": 0.1 * (index % 3 + 1)} for index, param in enumerate(params)]
    optimizer = fusedopt.FusedAdamW(groups)
    for seed in range(3):
        for index, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.1 * ((index + seed) % 3 + 1)
        checked_step(optimizer, params, seed)


def test_a_broken_hyperparameter_is_named_and_the_next_step_recovers() -> None:
    optimizer, params = make("auto")
    checked_step(optimizer, params, 0)
    optimizer.param_groups[0]["lr"] = "fast"
    before = bits(params)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['lr'\] is 'fast'; expected a number"):
        optimizer.step()
    assert bits(params) == before
    del optimizer.param_groups[0]["lr"]
    with pytest.raises(KeyError, match="has no 'lr'"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    checked_step(optimizer, params, 1)


def reshape_by_data(param: nn.Parameter) -> None:
    param.data = param.data.view(3, 4)


def reshape_in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param.unsqueeze_(0)


@each_backend
@pytest.mark.parametrize("states", ["replaced", "data"])
@pytest.mark.parametrize("reshape", [reshape_by_data, reshape_in_place])
def test_a_parameter_may_be_reshaped_in_place(backend: str, reshape: Any, states: str) -> None:
    params = parameters([(2, 6), (5,)])
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, backend=backend_name(backend))
    checked_step(optimizer, params, 0)
    stale = params[0].grad
    reshape(params[0])
    shape = params[0].shape
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[params[0]]
        if states == "replaced":
            state[name] = state[name].view(shape)
        else:
            state[name].data = state[name].data.view(shape)
    params[0].grad = None
    checked_step(optimizer, params, 1)
    params[0].grad = torch.zeros(shape)
    params[0].grad.data = stale
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step()


def test_a_hyperparameter_that_runs_python_cannot_pull_the_rug() -> None:
    params = parameters(SMALL)
    optimizer = fusedopt.FusedAdamW([{"params": [param]} for param in params])

    class Rate:
        def __float__(self) -> float:
            with pytest.raises(RuntimeError, match="is running"):
                optimizer.step()
            del optimizer.param_groups[1:]
            return 0.01

    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = Rate()
    optimizer.step()
    assert len(optimizer.param_groups) == 1


class Tables:
    """Notes where the tables of each launch begin, and does nothing else. See csrc/device/launch.h."""

    def __init__(self) -> None:
        self.begins: list[dict[str, int]] = []

    def stream(self, device: int) -> int:
        return 0

    def capturing(self, device: int) -> bool:
        return False

    def map_chunks(self, tables: Any) -> None:
        names = ("control", "groups", "grads", "rows", "layouts", "chunks", "scalars", "partials")
        self.begins.append({name: getattr(tables, name) for name in names})

    def nothing(self, *arguments: Any) -> None:
        pass

    statistics = conclude = load = update = nothing


@pytest.mark.skipif(module is None, reason="there is no compiled module")
@pytest.mark.parametrize("tensors", [1, 2, 7, 8, 33])
def test_tables_of_a_device_share_no_cache_line(tensors: int) -> None:
    launcher = Tables()
    params = parameters([(3, 5)] * tensors)
    set_gradients(params, 0)
    params[0].grad = params[0].grad.t().contiguous().t()  # type: ignore[union-attr]
    groups = [{"params": params, "lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0}]
    groups[0] |= {"nesterov": False, "maximize": False}
    plan = module.StepPlan("sgd", "cpu", launcher=launcher)  # type: ignore[union-attr]
    plan.step(groups, {}, None, None, False, 0.0, 0.0, False, float("inf"), False)
    (begins,) = launcher.begins
    control = begins["control"]
    assert list(begins.values()) == sorted(set(begins.values())), "in this order, each with room"
    assert {name: (begin - control) % 128 for name, begin in begins.items()} == dict.fromkeys(begins, 0)
