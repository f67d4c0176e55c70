"""CUDA graphs, as the emulation records and replays them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import pytest
import torch
from cases import (
    HAS_EMULATOR,
    INF,
    SMALL,
    bits,
    each_dtype,
    each_option,
    set_gradients,
    whole_state,
)
from cuda_cases import (
    CLIPS,
    _code,  # noqa: F401  for every test here
    contents,
    each_clip,
    each_emulated,
    emulator,
    launches_of,
    make,
)

from fusedopt.amp import GradScaler

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the module was built without FUSEDOPT_EMULATOR=1")

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
