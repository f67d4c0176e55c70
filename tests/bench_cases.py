"""What the tests of the benchmarks share: small cases, fixtures, and contenders that are wrong."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec

import pytest
import torch

from benchmarks.kept import OnPrecision
from benchmarks.peers import Peer
from fusedopt.bench import CONTENDERS, DTYPES, GROUPINGS, OPTIMIZERS, RECIPES, Case, Contender, run
from fusedopt.bench.contenders import OURS, RIVAL, Fused, TorchFused, initial_tensors
from fusedopt.bench.measure import Times

# `fusedopt.bench.run` is the function.
run_module = importlib.import_module("fusedopt.bench.run")

CPU = torch.device("cpu")
TINY = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (3, 11), "scale": ()}
#: One that takes seconds to compile, and one that needs a GPU.
ELSEWHERE = ["torch-compiled", "torch-graphed"]
#: Those that are always here, but for these.
HERE = [
    name
    for name in CONTENDERS
    if name.startswith((OURS, "torch-"))
    and name not in ELSEWHERE
    and not name.endswith("-in-backward")
    and not issubclass(CONTENDERS[name], OnPrecision)
]
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


class SecondStepForgotten(Fused):
    done = False

    def step(self) -> None:
        if not self.done:
            super().step()
        self.done = True


class Failing(TorchFused):
    def step(self) -> None:
        raise RuntimeError("no luck\nwith a second line")


def table_of(text: str) -> tuple[list[str], list[list[str]], list[str]]:
    """(head, rows, lines after them) of the table in ``text``."""
    lines = text.splitlines()
    marked = [i for i, line in enumerate(lines) if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in marked)
    return head, rows, [line for line in lines[marked[-1] + 1 :] if line]
