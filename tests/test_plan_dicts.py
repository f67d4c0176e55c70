"""Dicts that the plan does not look into while Python says that they have not changed, and rows read in threads."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import bits, module, parameters
from oracle import CheckedStep
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedopt
from fusedopt.backends import StepRequest

pytestmark = pytest.mark.skipif(module is None, reason="needs the compiled module")
MANY = 2500  # enough for two threads


@pytest.fixture(params=[True, False], ids=["known", "looked-into"])
def dicts(request: pytest.FixtureRequest) -> Iterator[bool]:
    assert module is not None
    module.know_dicts(request.param)
    yield request.param
    module.know_dicts(True)


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def stepped(optimizer: Any, params: list[nn.Parameter], seed: int) -> None:
    set_gradients(params, seed)
    check = CheckedStep(optimizer)
    optimizer.step()
    check.check()


def cleared(state: dict[str, Any]) -> None:
    kept = dict(state)
    state.clear()
    state.update(kept, exp_avg=torch.full_like(kept["exp_avg"], 0.5))  # into an empty dict: Python copies it whole


def popped(state: dict[str, Any]) -> None:
    state["exp_avg"] = state.pop("exp_avg") + 1


def removed_and_defaulted(state: dict[str, Any]) -> None:
    old = state.pop("exp_avg_sq")
    state.setdefault("exp_avg_sq", old * 2)


def joined(state: dict[str, Any]) -> None:
    state |= {"exp_avg": torch.ones_like(state["exp_avg"])}


def last_taken(state: dict[str, Any]) -> None:
    key, value = state.popitem()
    state[key] = value + 1


def tensor_moved(state: dict[str, Any]) -> None:
    state["exp_avg"].data = torch.full_like(state["exp_avg"], 0.25)


def tensor_set(state: dict[str, Any]) -> None:
    state["exp_avg_sq"].set_(torch.full_like(state["exp_avg_sq"], 0.25))


CHANGES: list[Callable[[dict[str, Any]], None]] = [
    cleared,
    popped,
    removed_and_defaulted,
    joined,
    last_taken,
    tensor_moved,
    tensor_set,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_state_dict_is_noticed(change: Callable[[dict[str, Any]], None], dicts: bool) -> None:
    params = parameters([(5,), (3, 2), (7,)])
    optimizer = fusedopt.FusedAdamW(params, lr=0.1, backend="native")
    for seed in range(3):
        stepped(optimizer, params, seed)
    for param in params[::2]:
        change(optimizer.state[param])
        stepped(optimizer, params, 3)
    stepped(optimizer, params, 4)


def test_state_dicts_may_be_replaced_copied_shared_and_dropped(dicts: bool) -> None:
    params = parameters([(5,), (5,), (5,)])
    optimizer = fusedopt.FusedAdamW(params, lr=0.1, backend="native")
    stepped(optimizer, params, 0)
    for seed in range(1, 9):
        # Freed and made anew, so that dicts come to lie where others have been.
        optimizer.state[params[0]] = {key: value.clone() + seed for key, value in optimizer.state[params[0]].items()}
        stepped(optimizer, params, seed)
    state = optimizer.state
    optimizer.state = state.copy()
    stepped(optimizer, params, 9)
    state[params[1]] = {}  # of a dict that is no longer the optimizer's
    stepped(optimizer, params, 10)
    optimizer.state[params[1]] = dict(optimizer.state[params[1]])
    stepped(optimizer, params, 11)
    del optimizer.state[params[2]]
    stepped(optimizer, params, 12)
    assert [int(optimizer.state[param]["step"]) for param in params] == [13 + sum(range(9)), 13, 1]


def test_what_changes_in_a_group_is_noticed_by_all_that_have_it(dicts: bool) -> None:
    params = parameters([(5,), (3,)])
    optimizers = [fusedopt.FusedSGD(params, lr=1.0, backend="native") for _ in range(2)]
    optimizers[1].param_groups = optimizers[0].param_groups
    group = optimizers[0].param_groups[0]
    for seed, change in enumerate(
        (
            lambda: None,
            lambda: group.update(lr=0.5),
            lambda: group.__setitem__("lr", 0.25),
            lambda: group.setdefault("more", 1),
            lambda: group.pop("more"),
            lambda: (kept := dict(group), group.clear(), group.update(kept, lr=2.0)),
        )
    ):
        change()
        for optimizer in optimizers:
            stepped(optimizer, params, seed)
    del optimizers[0], optimizer
    gc.collect()
    group["lr"] = 0.125  # one of the plans that know it is gone
    stepped(optimizers[0], params, 9)
    optimizers.clear()
    gc.collect()
    group["lr"] = 1.0
    group.clear()


@pytest.mark.parametrize("count", [MANY, 700])
def test_rows_read_in_threads_give_the_same(count: int) -> None:
    """As one thread does; of 700 rows one thread reads several ranges in any case."""

    def run(threads: int) -> list[Any]:
        torch.set_num_threads(threads)
        params = [nn.Parameter(torch.full((1 + i % 3,), 0.5 + i)) for i in range(count)]
        optimizer = fusedopt.FusedAdamW(params, lr=0.1, clip_grad={"max_norm": 1.0}, backend="native")
        for seed in range(4):
            set_gradients(params, seed)
            versions = [param._version for param in params]
            optimizer.step()
            assert [param._version - version for param, version in zip(params, versions, strict=True)] == [1] * count
        # In the middle of what a thread has: another dtype, no gradient, a state of its own, a freed one.
        params[count // 2].data = params[count // 2].data.double()
        params[count // 2].grad = None
        params[count // 3].grad = None
        optimizer.state[params[3]]["exp_avg"] = torch.ones_like(params[3])
        del optimizer.state[params[count - 2]]
        optimizer.step()
        steps = [int(optimizer.state[param]["step"]) for param in params]
        assert steps[count // 3] == 4 and steps[count - 2] == 1 and steps[0] == 5
        return [optimizer.last_step.grad_norm, *params]  # type: ignore[union-attr]

    threads = torch.get_num_threads()
    try:
        one, two = run(1), run(2)
    finally:
        torch.set_num_threads(threads)
    assert bits(one) == bits(two)


def test_a_bad_gradient_among_many_is_named_and_changes_nothing() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(MANY)]
    optimizer = fusedopt.FusedAdamW(params, backend="native")
    set_gradients(params, 0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    params[1500].grad = torch.ones(2).expand(2, 2)[0].to_sparse()
    with pytest.raises(RuntimeError, match=r"params'\]\[1500\]"):
        optimizer.step()
    assert all(torch.equal(param, was) for param, was in zip(params, before, strict=True))
    assert int(optimizer.state[params[0]]["step"]) == 1


def test_a_gradient_that_is_only_pretended_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    """Nobody asks for its address: torch warns of that, and means to make it an error."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fusedopt.FusedAdamW(params, backend="native")
    set_gradients(params, 0)
    optimizer.step()
    with FakeTensorMode():
        params[1].grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"gradient of parameter \(param_groups.0..'params'..1..*is a FakeTensor"):
        optimizer.step()
    assert capfd.readouterr().err == ""
    set_gradients(params, 1)
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_a_step_count_may_be_shared_by_many() -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(2 * MANY)]
    optimizer = fusedopt.FusedAdamW(params, backend="native")
    set_gradients(params, 0)
    optimizer.step()
    shared = optimizer.state[params[0]]["step"]
    for param in params:
        optimizer.state[param]["step"] = shared
    for _ in range(5):
        optimizer.step()
    assert float(shared) == 1 + 5 * 2 * MANY  # each parameter counts it up, as in torch's loop


def test_groups_may_be_emptied_after_an_error() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.FusedAdamW([param], backend="native")
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="fast"):
        optimizer._chosen_backend().step(optimizer.param_groups, optimizer.state, StepRequest())
    optimizer.param_groups.clear()
    before = param.detach().clone()
    optimizer._chosen_backend().step(optimizer.param_groups, optimizer.state, StepRequest())
    assert torch.equal(param, before)


ENDINGS = {
    "global": "",
    "cycle": "optimizer.own = optimizer; params[0].optimizer = optimizer; del optimizer, params",
    "exit": "import sys; sys.exit(0)",
    "at-exit": "import atexit; atexit.register(lambda: (optimizer.param_groups[0].update(lr=2.0), optimizer.step()))",
    "left-in-torch": "torch.optimizer = optimizer",
    "dicts-outlive": "import builtins; builtins.held = [optimizer.state, optimizer.param_groups]; del optimizer",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_interpreter_may_end_with_dicts_that_are_known(ending: str) -> None:
    code = f"""
import torch, fusedopt
params = [torch.nn.Parameter(torch.ones(3)) for _ in range(4)]
optimizer = fusedopt.FusedAdamW(params, backend="native")
for param in params:
    param.grad = torch.ones(3)
for _ in range(3):
    optimizer.step()
{ENDINGS[ending]}
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
