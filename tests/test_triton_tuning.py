"""The Triton backend: its tuning, and where it serves."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton_cases import (
    ADAM,
    BARE,
    CPU,
    CUDA,
    SGD,
    XPU,
    Watched,
    _watch,  # noqa: F401  for every test here
    launches_of,
    settings_of,
    triton,
    without_interpreter,
)
from triton_columns import dtypes_of_columns

from fusedopt import backends
from fusedopt.backends import BackendUnavailable, NativeBackend, TritonBackend
from fusedopt.backends import triton as backend
from fusedopt.rules import RULES

pytestmark = pytest.mark.skipif(
    TritonBackend.unavailable(torch.device("cpu")) is not None,
    reason=f"{TritonBackend.unavailable(torch.device('cpu'))}",
)


class Interrupted(Exception):
    """Something that no measurement expects."""


class Device:
    """Stands for a GPU on which tunings take so long; ``tried`` has those that were measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path):
        self.tried: list[backend.Tuning] = []
        self.name, self.capturing, self.memory = "a GPU", False, 1 << 40
        self.asked_for: list[int] = []
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.given_back: list[int] = []  # how much was still in use then
        self.times: dict[backend.Tuning, Any] = {tuning: 1.0 + number for number, tuning in enumerate(backend._TUNINGS)}
        monkeypatch.setattr(backend, "_chosen", {})
        monkeypatch.setattr(backend, "scratch_step", self.scratch_step)
        monkeypatch.setattr(triton.testing, "do_bench", self.do_bench)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.given_back.append(len(self.alive)))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))

    def scratch_step(self, launcher: Any, device: torch.device, dtypes: tuple[int, ...], elements: int) -> Any:
        assert device == torch.device("cuda", 0)
        self.asked_for.append(elements)
        if elements > self.memory:
            raise torch.OutOfMemoryError

        def step() -> None:
            pass

        self.alive.add(step)
        return step

    def do_bench(self, update: Any, **how: Any) -> float:
        self.tried.append(update.__self__.tuning)
        time = self.times[self.tried[-1]]
        if isinstance(time, Exception):
            raise copy.copy(time)  # one that stays would keep alive what was at work
        return time

    def tuning(
        self,
        dtypes: tuple[int, ...] = (0, 0, 0, 0, -1),
        rule: Any = ADAM,
        source: str = "kernel",
        update: str = "update of the rule",
    ) -> backend.Tuning:
        """What a new launcher takes."""
        launcher = Watched(rule, "cuda")
        launcher.interpreted = False
        launcher.capturing = lambda device: self.capturing  # type: ignore[method-assign]
        launcher._kernels = SimpleNamespace(update_kernel=SimpleNamespace(cache_key=source))
        launcher._mine = launcher._mine._replace(update=SimpleNamespace(cache_key=update))
        return launcher.tuning_for(0, dtypes)

    def restart(self) -> None:
        """As if in another process."""
        backend._chosen.clear()
        self.tried.clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    return Device(monkeypatch, tmp_path)


@pytest.mark.parametrize("fastest", backend._TUNINGS)
def test_the_fastest_is_taken_and_kept(fastest: backend.Tuning, device: Device) -> None:
    device.times[fastest] = 0.5
    assert device.tuning() == fastest
    assert device.tried == list(backend._TUNINGS)
    assert device.tuning() == fastest
    assert len(device.tried) == len(backend._TUNINGS), "measured once"
    device.restart()
    found = device.tuning()
    assert found == fastest
    assert isinstance(found, backend.Tuning)
    assert device.tried == [], "found on disk"


@pytest.mark.parametrize("differs", ["device", "dtypes", "rule", "kernel", "update"])
def test_each_device_rule_mix_of_dtypes_and_kernel_has_its_own(differs: str, device: Device) -> None:
    first, second = backend._TUNINGS[2:4]
    device.times[first] = 0.5
    assert device.tuning() == first
    device.times[second] = 0.25
    device.restart()
    device.name = "another GPU" if differs == "device" else device.name
    sources = {"kernel": {"source": "other"}, "update": {"update": "other"}}
    other = {"dtypes": {"dtypes": (2, 2, 0, 0, -1)}, "rule": {"rule": SGD}, **sources}
    assert device.tuning(**other.get(differs, {})) == second
    device.restart()
    device.name = "a GPU"
    assert device.tuning() == first
    assert device.tried == []


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1024]", "[1024, 4, 1]", "[333, 4]", '"x"', b"\xff\xfe"], ids=str
)
def test_a_file_that_is_not_ours_is_measured_anew_and_replaced(
    content: str | bytes, device: Device, tmp_path: Path
) -> None:
    device.times[backend._TUNINGS[1]] = 0.5
    device.tuning()
    (file,) = tmp_path.rglob("fusedopt-tuning.json")
    for _ in range(2):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        device.restart()
        assert device.tuning() == backend._TUNINGS[1]
        assert len(device.tried) == len(backend._TUNINGS)
        assert json.loads(file.read_text()) == list(backend._TUNINGS[1])


def test_without_memory_to_try_the_first_serves(device: Device) -> None:
    device.memory = 0
    device.times[backend._TUNINGS[1]] = 0.5
    assert device.tuning() == backend._TUNINGS[0]
    assert device.tried == []
    device.memory = min(backend._TUNING_ELEMENTS)
    assert device.tuning() == backend._TUNINGS[1], "for this once"
    assert device.tried == list(backend._TUNINGS), "with a smaller tensor"


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), triton.runtime.errors.OutOfResources(9, 1, "registers")])
def test_a_tuning_that_cannot_run_is_passed_over(error: Exception, device: Device) -> None:
    device.times[backend._TUNINGS[0]] = error
    assert device.tuning() == backend._TUNINGS[1]


@pytest.mark.parametrize("ends", ["well", "a tuning cannot run", "without memory", "interrupted"])
def test_the_memory_of_a_measurement_is_given_back(ends: str, device: Device) -> None:
    if ends == "a tuning cannot run":
        device.times[backend._TUNINGS[4]] = triton.runtime.errors.OutOfResources(9, 1, "registers")
    elif ends == "without memory":
        device.memory = 0
    elif ends == "interrupted":
        device.times[backend._TUNINGS[1]] = Interrupted()
    with pytest.raises(Interrupted) if ends == "interrupted" else contextlib.nullcontext():
        device.tuning()
    assert len(device.given_back) == 1
    if ends != "interrupted":  # whose traceback is still there
        assert device.given_back == [0], "after everything was let go"


def test_where_nothing_was_measured_the_allocator_is_left_alone(device: Device) -> None:
    device.capturing = True
    device.tuning()
    assert device.given_back == [], "a capture may be using it"
    device.capturing = False
    device.tuning()
    device.tuning()
    device.restart()
    device.tuning()
    assert len(device.given_back) == 1


def test_a_file_that_cannot_be_written_is_no_error(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(triton.runtime.cache.FileCacheManager, "put", fail)
    device.times[backend._TUNINGS[1]] = 0.5
    assert device.tuning() == device.tuning() == backend._TUNINGS[1]
    assert len(device.tried) == len(backend._TUNINGS), "measured once in this process"


@pytest.mark.parametrize("folder", ["", "/dev/null/cache"], ids=["none", "cannot be made"])
def test_without_a_cache_folder_each_process_measures(
    folder: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", folder)
    device.times[backend._TUNINGS[1]] = 0.5
    assert device.tuning() == backend._TUNINGS[1]
    device.restart()
    assert device.tuning() == backend._TUNINGS[1]
    assert len(device.tried) == len(backend._TUNINGS)


def test_numbers_of_another_type_are_taken_for_what_they_are(device: Device, tmp_path: Path) -> None:
    device.tuning()
    (file,) = tmp_path.rglob("fusedopt-tuning.json")
    file.write_text("[512.0, 4.0]")
    device.restart()
    assert all(isinstance(number, int) for number in device.tuning())


def test_nothing_is_measured_in_a_capture(device: Device) -> None:
    device.times[backend._TUNINGS[1]] = 0.5
    device.capturing = True
    assert device.tuning() == backend._TUNINGS[0]
    assert device.tried == []
    device.capturing = False
    assert device.tuning() == backend._TUNINGS[1]
    device.capturing = True
    assert device.tuning() == backend._TUNINGS[1]
    device.restart()
    assert device.tuning() == backend._TUNINGS[1], "but a file is read"


@pytest.mark.parametrize(
    ("rule", "dtypes"),
    [(rule, dtypes) for rule in RULES for dtypes in dtypes_of_columns(RULES[rule])],
)
def test_what_is_tuned_is_a_step_of_those_forms(rule: str, dtypes: tuple[int, ...]) -> None:
    class Recorder(backend._Recorder, Watched):
        pass

    for tuning in backend._TUNINGS[:2]:
        launcher = Recorder(RULES[rule], "cpu", tuning)
        step = backend.scratch_step(launcher, torch.device("cpu"), dtypes, 40)
        assert launches_of(step) == ["map", *BARE]
        (settings,) = settings_of("update")
        assert tuple(settings[name] for name in backend._COLUMNS) == dtypes[:7]
        assert settings["CHANCE"] == backend.rounds(dtypes)
        assert settings["BLOCK"] == tuning.block
        assert launches_of(launcher.update_again) == ["update"], "which is what is timed"
        assert settings_of("update") == [settings]
        assert launches_of(functools.partial(step, clip=True)) == ["statistics", *BARE]


# --- Where it serves ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As in a process without the interpreter where torch has GPUs, and nothing is remembered."""
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(has_fp64=True))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: SimpleNamespace(backend="cuda")))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    remembered = (backend._triton_problem, backend._driver_problem)
    for problem in remembered:
        problem.cache_clear()
    yield monkeypatch
    for problem in remembered:
        problem.cache_clear()


@pytest.mark.parametrize("kind", [CUDA, XPU], ids=str)
def test_it_serves_gpus_that_its_driver_is_for(kind: torch.device, compiling: pytest.MonkeyPatch) -> None:
    for driver in ("cuda", "hip", "xpu"):
        backend._driver_problem.cache_clear()
        target = SimpleNamespace(backend=driver)
        compiling.setattr(triton.runtime.driver.active, "get_current_target", lambda target=target: target)
        reason = TritonBackend.unavailable(kind)
        if (driver == "xpu") == (kind == XPU):
            assert reason is None
        else:
            assert str(reason).endswith(f"compiles for {driver}, not for {kind.type}")


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0+git1234", "4.0.0rc1", "10.0"])
def test_later_versions_will_do(version: str, compiling: pytest.MonkeyPatch) -> None:
    compiling.setattr(triton, "__version__", version)
    assert TritonBackend.unavailable(CUDA) is None


def no_driver(error: Exception) -> SimpleNamespace:
    def fail() -> None:
        raise error

    return SimpleNamespace(active=SimpleNamespace(get_current_target=fail))


@pytest.mark.parametrize(
    ("kind", "target", "value", "message"),
    [
        (CPU, None, None, "Triton has no kernels for CPUs (TRITON_INTERPRET=1"),
        ("mps", None, None, "Triton has no kernels for mps tensors"),
        ("meta", None, None, "Triton has no kernels for meta tensors"),
        (CUDA, (backend, "compiled_module"), lambda: (None, "not built"), "its plan is missing: not built"),
        (CUDA, (sys.modules, "triton"), None, "triton is not installed"),
        (CUDA, (sys.modules, "triton"), None, "pip install 'fusedopt[triton]'"),
        (CUDA, (triton, "__version__"), "3.5.1", "triton 3.5.1 is installed; 3.6 or later is needed"),
        (CUDA, (triton, "__version__"), "2.10", "triton 2.10 is installed; 3.6 or later is needed"),
        (CUDA, (backend, "interpreting"), lambda: True, "the interpreter does not reach cuda tensors"),
        (CUDA, (torch.cuda, "is_available"), lambda: False, "torch finds no usable cuda device"),
        (XPU, (torch.xpu, "is_available"), lambda: False, "torch finds no usable xpu device"),
        (
            XPU,
            (torch.xpu, "get_device_properties"),
            lambda device: SimpleNamespace(has_fp64=False),
            "the device has no float64 arithmetic",
        ),
        (
            CUDA,
            (triton.runtime, "driver"),
            no_driver(RuntimeError("0 active drivers\nsecond line")),
            "0 active drivers",
        ),
        (CUDA, (triton.runtime, "driver"), no_driver(RuntimeError()), "finds no driver: RuntimeError()"),
    ],
)
def test_where_it_cannot_serve_it_says_why(
    kind: Any, target: Any, value: Any, message: str, compiling: pytest.MonkeyPatch
) -> None:
    if target is not None:
        (compiling.setitem if target[0] is sys.modules else compiling.setattr)(*target, value)
    reason = TritonBackend.unavailable(torch.device(kind))
    assert message in str(reason)
    assert "\n" not in str(reason)
    with pytest.raises(BackendUnavailable, match=re.escape(f"backend 'triton' is not available: {reason}")):
        backends.create_backend("triton", ADAM, [torch.device(kind)])


def test_parameters_of_two_kinds_of_devices_are_not_for_it(compiling: pytest.MonkeyPatch) -> None:
    compiling.setattr(backend, "_driver_problem", lambda device_type: None)
    with pytest.raises(BackendUnavailable, match="one optimizer has parameters on cuda and xpu"):
        backends.create_backend("triton", ADAM, [CUDA, XPU])


def test_auto_takes_it_after_the_native_backend_and_before_the_reference(compiling: pytest.MonkeyPatch) -> None:
    def refuse(kind: type, reason: str | None) -> None:
        compiling.setattr(kind, "unavailable", classmethod(lambda cls, device: reason))

    backends._note_fallback.cache_clear()
    refuse(NativeBackend, None)
    compiling.setattr(NativeBackend, "_make_plan", lambda self: None)
    assert backends.create_backend("auto", ADAM, [CUDA]).name == "native"
    refuse(NativeBackend, "no kernels in this build")
    with pytest.warns(UserWarning, match="no kernels in this build; using the .*triton backend"):
        assert backends.create_backend("auto", ADAM, [CUDA]).name == "triton"
    assert backends.create_backend("auto", ADAM, [CUDA]).name == "triton"  # silent now: warnings are errors here
    refuse(TritonBackend, "no driver")
    with pytest.warns(UserWarning, match="no kernels in this build.*; using the slow reference backend"):
        assert backends.create_backend("auto", ADAM, [CUDA]).name == "reference"
    backends._note_fallback.cache_clear()


WITHOUT_INTERPRETER = """
import sys, torch, fusedopt
print('triton' in sys.modules)  # torch's own optimizers import it later
param = torch.nn.Parameter(torch.zeros(3))
optimizer = fusedopt.FusedAdamW([param])
param.grad = torch.ones(3)
optimizer.step()
print(optimizer.backend_in_use)
try:
    fusedopt.FusedAdamW([param], backend="triton")
except fusedopt.backends.BackendUnavailable as error:
    print(error)
"""


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    lines = without_interpreter("-W", "error", "-c", WITHOUT_INTERPRETER).stdout.splitlines()
    assert lines[:2] == ["False", "native"]
    assert lines[2].startswith("backend 'triton' is not available: Triton has no kernels for CPUs (TRITON_INTERPRET=1")
