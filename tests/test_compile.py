"""A step and torch.compile(fullgraph=True): what works, what is refused, and the facts for which it is refused."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

#: In a process of its own: Dynamo changes much that other tests rely on.
CODE = """
import json, warnings
warnings.simplefilter("ignore")
import torch, fusedopt
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters

found = {}


def make(cls, **settings):
    reset()
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return model, cls(model.parameters(), lr=0.1, **settings)


def error(function):
    try:
        torch.compile(function, fullgraph=True, backend="eager")()
    except torch._dynamo.exc.Unsupported as error:
        return str(error)


x = torch.randn(8, 6, dtype=torch.float64)

# What works: the weights after six steps with changing rates, and the graphs that were made.
for name in ("as it is", "the model", "the whole", "the whole with a scaler"):
    model, optimizer = make(fusedopt.FusedAdamW, clip_grad=dict(max_norm=0.1))
    scaler = fusedopt.amp.GradScaler("cpu", init_scale=8.0, enabled="scaler" in name)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if name == "the model" else model

    def train(x):
        loss = forward(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    run = torch.compile(train, backend="aot_eager") if "whole" in name else train
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        run(x)
    weights = [value for param in model.parameters() for value in param.flatten().tolist()]
    found[name] = weights, counters["stats"]["unique_graphs"]

# What is refused.
for cls in (fusedopt.FusedAdamW, torch.optim.AdamW):
    model, optimizer = make(cls)
    model(x).square().mean().backward()
    found[cls.__name__] = error(lambda: optimizer.step())
model, optimizer = make(fusedopt.FusedAdamW)
scaler = fusedopt.amp.GradScaler("cpu")
scaler.scale(model(x).square().mean()).backward()
found["GradScaler.step"] = error(lambda: scaler.step(optimizer))
found["GradScaler.update"] = error(lambda: scaler.update())
model, optimizer = make(fusedopt.FusedAdamW)
found["backward"] = error(lambda: model(x).square().mean().backward())
found["zero_grad"] = error(lambda: torch.optim.Optimizer.zero_grad(optimizer))

# Why: what an operator for a step would see.
seen = []


@torch.library.custom_op("fusedopt_tests::step", mutates_args=["param"])
def step(param: Tensor) -> None:
    (own,) = optimizer.param_groups[0]["params"][:1]
    seen.append((optimizer.param_groups[0]["lr"], param.data_ptr() == own.data_ptr()))


def schedule_and_step():
    optimizer.param_groups[0]["lr"] = 0.5
    with torch.no_grad():
        step(optimizer.param_groups[0]["params"][0])


torch.compile(schedule_and_step, fullgraph=True, backend="aot_eager")()
found["seen"] = *seen[0], optimizer.param_groups[0]["lr"]
print(json.dumps(found))
"""


@functools.cache
def found() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["the model", "the whole", "the whole with a scaler"])
def test_the_weights_are_those_of_the_loop_as_it_is(what: str) -> None:
    expected, graphs = found()["as it is"]
    assert graphs == 0
    weights, graphs = found()[what]
    assert weights == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert 1 <= graphs <= 2  # and none for each of the six learning rates


@pytest.mark.parametrize("what", ["FusedAdamW", "GradScaler.step", "GradScaler.update"])
def test_a_step_in_one_graph_is_refused_with_a_reason(what: str) -> None:
    assert "the step of a fused optimizer or of its loss scaler runs outside of graphs; expected" in found()[what]


class TestFactsAboutTorch:
    """docs/trainers.md says them. If one is no longer true, the decision there may be made anew."""

    def test_a_step_of_torch_s_breaks_the_graph_too(self) -> None:
        assert "torch._dynamo.graph_break()" in found()["AdamW"]

    def test_a_backward_pass_is_not_traced_by_default(self) -> None:
        assert "trace_autograd_ops is off" in found()["backward"]

    def test_zero_grad_is_kept_out_of_graphs(self) -> None:
        assert found()["zero_grad"] is not None

    def test_an_operator_sees_settings_from_before_the_graph_and_copies_of_the_parameters(self) -> None:
        rate, same_memory, afterwards = found()["seen"]
        assert (rate, afterwards) == (0.1, 0.5)
        assert not same_memory
