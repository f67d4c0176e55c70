"""Launches of the Triton backend as compiled code, up to the GPU; see triton_dry.py. What they do: test_triton.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import bits, parameters, set_gradients, state_bits

import fusedopt
from fusedopt.backends.triton import Launcher

TESTS = Path(__file__).resolve().parent
pytest.importorskip("triton", reason="triton is not installed")


def dry_run(*arguments: str) -> list[dict[str, Any]]:
    """What triton_dry.py prints, in a process that compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", TESTS / "triton_dry.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        pytest.param(("cuda", "90", "32"), id="sm_90"),
        pytest.param(("hip", "gfx942", "64"), id="gfx942", marks=pytest.mark.full),
    ],
)
def test_a_step_is_two_or_three_launches_each_loaded_once(target: tuple[str, ...]) -> None:
    from triton.backends import backends

    if target[0] == "hip" and "amd" not in backends:
        pytest.skip("this triton has no backend for AMD")
    for case in dry_run(*target):
        passes = ["statistics_kernel"] * case["clip"] + ["prepare_kernel", "update_kernel"]
        assert case["steps"] == [["map_kernel", *passes], passes, passes], case
        assert set(case["loaded"].values()) <= {1}, f"loaded again for other numbers: {case}"


def test_what_cannot_be_loaded_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters([(5,), (3, 4)])
    optimizer = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 1.0}, backend="triton")
    set_gradients(params, 0)
    optimizer.step()
    before, state = bits(params), state_bits(optimizer)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("out of registers")

    other = fusedopt.FusedAdamW(params, clip_grad={"max_norm": 1.0}, backend="triton")
    other.load_state_dict(optimizer.state_dict())
    monkeypatch.setattr(Launcher, "load", fail)
    with pytest.raises(RuntimeError, match="out of registers"):
        other.step()
    assert bits(params) == before
    assert state_bits(other) == state


def test_nothing_is_loaded_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        """Counts what is done to it."""

        __name__ = "update_kernel"
        loads = runs = 0

        def warmup(self, *arguments: Any, **settings: Any) -> Kernel:
            self.loads += 1
            return self

        def _init_handles(self) -> None:
            pass

        def __getitem__(self, grid: tuple[int]) -> Any:
            self.runs += 1
            return lambda *arguments, **settings: None

    class Driver:
        @staticmethod
        def get_current_device() -> int:
            return 0

    launcher = Launcher(fusedopt.FusedAdamW.rule, "cpu")
    launcher.interpreted = False
    launcher._driver = type("Drivers", (), {"active": Driver})
    kernel: Any = Kernel()
    captures = True
    monkeypatch.setattr(launcher, "capturing", lambda device: captures)
    refusal = r"update_kernel for this kind of step has not been loaded, .*; make one such step before capturing"
    with pytest.raises(RuntimeError, match=refusal):
        launcher.launch(kernel, 0, BLOCK=1024)
    captures = False
    launcher.launch(kernel, 0, BLOCK=1024)
    captures = True
    launcher.launch(kernel, 7, BLOCK=1024)
    assert (kernel.loads, kernel.runs) == (1, 1)
    with pytest.raises(RuntimeError, match=refusal):
        launcher.launch(kernel, 7, BLOCK=512)
    assert kernel.runs == 1
