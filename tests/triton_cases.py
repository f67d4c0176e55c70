"""What the tests of the Triton backend share."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from cases import OPTIONS, SHORT, module
from torch import nn

import fusedopt
from fusedopt import backends
from fusedopt.backends import TritonBackend
from fusedopt.backends import triton as backend
from fusedopt.rules import RULES

if module is None:
    pytest.skip("the compiled module is not built", allow_module_level=True)
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
memory: Any = importlib.import_module("fusedopt.backends.triton_kernels.memory")
arithmetic: Any = importlib.import_module("fusedopt.backends.triton_kernels.arithmetic")
prepare: Any = importlib.import_module("fusedopt.backends.triton_kernels.prepare")

#: Of all dtypes in turns; each dtype has a short one and one that is not a multiple of anything.
SHAPES = [(2051,), (17,), (513,), (3, 5, 7), (), (2049,), (0,), (1,), (33,), (5, 9), (8,), (4099,)]
FEW = [(5,), (0,), (3, 5, 7)]
BARE, FULL = ["prepare", "update"], ["statistics", "prepare", "update"]
CPU, CUDA, XPU = (torch.device(kind) for kind in ("cpu", "cuda", "xpu"))
ADAM, SGD = RULES["adam"], RULES["sgd"]


def options_among(names: Iterable[str]) -> list[str]:
    """Those whose rule has Triton kernels."""
    return [name for name in names if TritonBackend.unavailable_for(OPTIONS[name][0].rule) is None]


each_option = pytest.mark.parametrize("option", options_among(OPTIONS))
each_short_option = pytest.mark.parametrize("option", options_among(SHORT))


class Launched(NamedTuple):
    """One launch."""

    kernel: str
    programs: int
    settings: dict[str, Any]


class Watched(backend.Launcher):
    """Keeps account of all launches, and leaves them to a graph while one is captured."""

    launched: ClassVar[list[Launched]] = []
    graph: ClassVar[list[Callable[[], None]] | None] = None
    slow: ClassVar[bool] = False
    dry: ClassVar[bool] = False  # launches are counted, not run

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.slow_double = lambda device: Watched.slow

    def capturing(self, device: int) -> bool:
        return Watched.graph is not None

    def launch(self, kernel: Any, programs: int, *arguments: Any, **settings: Any) -> None:
        Watched.launched.append(Launched(kernel.__name__.removesuffix("_kernel"), programs, settings))
        run = functools.partial(super().launch, kernel, programs, *arguments, **settings)
        if Watched.graph is not None:
            Watched.graph.append(run)
        elif not Watched.dry:
            run()


class Pair(TritonBackend):
    """The same on two devices, to which parameters are dealt in turns."""

    name = "triton-pair"

    def _make_plan(self) -> Any:
        return module.StepPlan(self.rule.name, "cpu", 2, launcher=Watched(self.rule, "cpu"))  # type: ignore[union-attr]


@pytest.fixture(autouse=True)
def _watch(monkeypatch: pytest.MonkeyPatch) -> None:
    Watched.launched, Watched.graph, Watched.slow, Watched.dry = [], None, False, False
    monkeypatch.setattr(backend, "Launcher", Watched)
    monkeypatch.setitem(backends.BACKENDS, Pair.name, Pair)


def launches_of(step: Callable[[], Any]) -> list[str]:
    """The kernels that a step launches, in order."""
    Watched.launched.clear()
    step()
    return [launch.kernel for launch in Watched.launched]


def settings_of(kernel: str) -> list[dict[str, Any]]:
    """The settings of all launches of a kernel so far."""
    return [launch.settings for launch in Watched.launched if launch.kernel == kernel]


def twins(
    option: str, make_params: Callable[[], list[nn.Parameter]], **extra: Any
) -> list[tuple[Any, list[nn.Parameter]]]:
    """(optimizer, parameters) of equal values, of this backend and of the native one."""
    cls, options = OPTIONS[option]
    made = []
    for name in ("triton", "native"):
        params = make_params()
        made.append((cls(params, **{**copy.deepcopy(options), **copy.deepcopy(extra)}, backend=name), params))
    return made


def without_interpreter(*command: Any, **env: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles Triton's kernels, if it comes to that."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parents[1]), **env}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result
