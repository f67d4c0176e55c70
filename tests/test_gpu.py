"""What only a GPU can show: streams, graphs, synchronization, large tensors, several devices, moves between devices.

The tests of every backend run there too, as ``native-cuda`` and ``triton-cuda``; test_cuda.py has the logic of the CUDA
kernels, emulated, and test_triton.py that of Triton's, interpreted.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    DTYPES,
    GPU,
    INF,
    OPTIONS,
    RAGGED,
    SMALL,
    bits,
    each_dtype,
    each_option,
    global_norm,
    parameters,
    set_gradients,
    whole_state,
)
from torch import nn

import fusedopt
from fusedopt import backends
from fusedopt.amp import GradScaler
from fusedopt.backends import selftest, triton
from fusedopt.cli.info import info
from fusedopt.optimizers.next_step import clip_next_step
from fusedopt.rules import RULES, NormClip, Precision
from fusedopt.training.averaging import ExponentialMovingAverage
from fusedopt.training.schedulers import (
    CosineAnnealingLR,
    CosineAnnealingMomentum,
    LambdaLR,
    LinearLR,
    StepParamScheduler,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="no CUDA device that fusedopt's kernels run on"),
    # What torch says, beside the error, of a capture that was refused.
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]

CUDA = torch.device("cuda", 0)
CLIP = {"max_norm": 0.5}


def on_gpu(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, device: torch.device = CUDA, seed: int = 0
) -> list[nn.Parameter]:
    """The values of cases.parameters, on a GPU."""
    return [nn.Parameter(param.detach().to(device)) for param in parameters(shapes, dtype, seed)]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4)).to(CUDA)


def states(optimizer: Any) -> dict[str, torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        f"{index} {name}": value
        for index, param in enumerate(params)
        for name, value in whole_state(optimizer, param).items()
    }


def contents(optimizer: Any) -> list[Any]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = states(optimizer)
    return [bits(params), list(found), bits(found.values())]


def busy(milliseconds: float = 20) -> None:
    """Keep the current stream busy, so that work that does not wait for it comes too early."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))


@pytest.fixture(params=["native", "triton"])
def served_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend of a test's optimizers; once with each."""
    if (reason := backends.BACKENDS[request.param].unavailable(CUDA)) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("FUSEDOPT_BACKEND", request.param)
    return request.param


each_backend = pytest.mark.usefixtures("served_by")
TRITON_PROBLEM = backends.TritonBackend.unavailable(CUDA)
needs_triton = pytest.mark.skipif(TRITON_PROBLEM is not None, reason=f"no Triton backend: {TRITON_PROBLEM}")


@pytest.fixture
def no_sync() -> Iterator[Callable[[str], None]]:
    """Sets what torch does when the host waits for the device: 'error' or 'default'."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


# --- Nothing waits for the device --------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulative_counts", [1, 2])
@pytest.mark.parametrize("clip_grad", [None, CLIP, {"type": "value", "clip_value": 0.1}], ids=["bare", "norm", "value"])
@pytest.mark.parametrize("wrapper_type", ["OptimWrapper", "AmpOptimWrapper"])
@pytest.mark.parametrize("warm", [False, True], ids=["from the first step", "warm"])
def test_update_params_does_not_wait(
    warm: bool,
    wrapper_type: str,
    clip_grad: dict[str, Any] | None,
    accumulative_counts: int,
    served_by: str,
    no_sync: Callable[[str], None],
) -> None:
    if served_by == "triton" and not warm:
        pytest.skip("its first step compiles and tunes, which waits")
    model = small_model()
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.01)
    scaling = {"loss_scale": {"init_scale": 256.0}} if wrapper_type == "AmpOptimWrapper" else {}  # nothing overflows
    wrapper: Any = getattr(fusedopt, wrapper_type)(
        optimizer=optimizer, clip_grad=clip_grad, accumulative_counts=accumulative_counts, **scaling
    )
    inputs = torch.randn(8, 16, device=CUDA)

    def iterate() -> None:
        with wrapper.optim_context(model):
            loss = model(inputs).float().square().mean()
        wrapper.update_params(loss)

    if warm:
        for _ in range(accumulative_counts):
            iterate()
    else:  # torch's own libraries may wait when they are first used
        with wrapper.optim_context(model):
            model(inputs).float().square().mean().backward()
        optimizer.zero_grad()
    before = [param.detach().clone() for param in model.parameters()]
    no_sync("error")
    for _ in range(2 * accumulative_counts):
        iterate()
    report = optimizer.last_step
    assert report is not None
    assert (report.grad_norm is None) == (clip_grad is None or "max_norm" not in clip_grad)
    no_sync("default")
    assert all(float(state["step"]) == 2 + warm for state in optimizer.state.values())
    assert not all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@each_option
def test_no_option_makes_a_step_wait(option: str, served_by: str, no_sync: Callable[[str], None]) -> None:
    cls, options = OPTIONS[option]
    options = copy.deepcopy(options)
    for key, value in options.items():  # hyperparameters given as tensors belong on the GPU
        if isinstance(value, torch.Tensor):
            options[key] = value.to(CUDA)
        elif isinstance(value, tuple):
            options[key] = tuple(item.to(CUDA) if isinstance(item, torch.Tensor) else item for item in value)
    params = on_gpu(SMALL)
    optimizer = cls(params, **options, clip_grad={"max_norm": torch.tensor(0.5, device=CUDA)})
    scale = torch.tensor(2.0, device=CUDA)
    set_gradients(params, 0)

    def steps() -> None:
        for _ in range(3):
            optimizer.step(grad_scale=scale)
            optimizer.step(grad_scale=scale, found_inf=torch.zeros((), device=CUDA))

    if served_by == "triton":  # compiles and tunes
        steps()
    no_sync("error")
    steps()


@pytest.mark.parametrize("early", [False, True], ids=["norm after the step", "norm before"])
def test_clipping_that_a_trainer_asks_of_the_next_step_does_not_wait(
    early: bool, served_by: str, no_sync: Callable[[str], None]
) -> None:
    params = on_gpu(SMALL)
    optimizer, scaler = fusedopt.FusedAdamW(params), GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.zeros((), device=CUDA))
    for step in range(3):
        set_gradients(params, step)
        no_sync("error" if step else "default")  # the first compiles and tunes
        norm = clip_next_step(optimizer, NormClip(0.5), scaler._get_scale_async())
        assert norm is not None
        looked = norm.clone() if early else None
        scaler.step(optimizer)
        scaler.update()
        no_sync("default")
        assert norm == optimizer.last_step.grad_norm > 0 and norm.is_cuda
        assert looked is None or looked == norm


# --- Streams -----------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("clip_grad", [None, CLIP], ids=["bare", "norm"])
def test_a_step_runs_on_the_current_stream(clip_grad: dict[str, Any] | None) -> None:
    """Right after a slow kernel that makes its gradients."""
    expected, params = on_gpu(RAGGED), on_gpu(RAGGED)
    twins = [fusedopt.FusedAdamW(these, lr=0.01, clip_grad=clip_grad) for these in (expected, params)]
    for these in (expected, params):
        set_gradients(these, 0)
    for optimizer in twins:
        optimizer.step()
    set_gradients(expected, 1)
    twins[0].step()
    fresh = [param.grad.clone() for param in expected]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        for param, grad in zip(params, fresh, strict=True):
            param.grad.copy_(grad)
        twins[1].step()
    stream.synchronize()
    assert contents(twins[0]) == contents(twins[1])


@each_backend
def test_two_streams_in_turns() -> None:
    expected, params = on_gpu(RAGGED), on_gpu(RAGGED)
    one, two = (fusedopt.FusedAdamW(these, lr=0.01, clip_grad=CLIP) for these in (expected, params))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for step in range(8):
        set_gradients(expected, step)
        one.step()
        stream, other = streams[step % 2], streams[1 - step % 2]
        stream.wait_stream(other)
        with torch.cuda.stream(stream):
            busy(2)
            set_gradients(params, step)  # elsewhere each time, so tables are uploaded
            two.step()
    torch.cuda.synchronize()
    assert contents(one) == contents(two)


@each_backend
def test_tables_outlive_an_optimizer_whose_step_is_pending() -> None:
    """They are freed in the order of the stream: what is allocated over them there comes later."""
    expected, params = on_gpu(RAGGED), on_gpu(RAGGED)
    for these in (expected, params):
        set_gradients(these, 0)
    fusedopt.FusedSGD(expected, lr=0.1, momentum=0.9, clip_grad=CLIP).step()
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        these = [nn.Parameter(param.detach().clone()) for param in params]
        set_gradients(these, 0)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            busy()
            optimizer = fusedopt.FusedSGD(these, lr=0.1, momentum=0.9, clip_grad=CLIP)
            optimizer.step()
            del optimizer
            gc.collect()
            held = [torch.full((size,), 255, dtype=torch.uint8, device=CUDA) for size in (512, 4096, 20_000) * 50]
        torch.cuda.synchronize()
        assert bits(these) == bits(expected)
        assert len(held) == 150


@each_backend
def test_tables_used_on_two_streams_outlive_their_optimizer() -> None:
    expected, params = on_gpu(RAGGED), on_gpu(RAGGED)
    for these in (expected, params):
        set_gradients(these, 0)
    one = fusedopt.FusedSGD(expected, lr=0.1, momentum=0.9, clip_grad=CLIP)
    one.step()
    one.step()
    optimizer = fusedopt.FusedSGD(params, lr=0.1, momentum=0.9, clip_grad=CLIP)
    optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        optimizer.step()
    state = optimizer.state  # which is the user's to keep alive
    del optimizer
    gc.collect()
    # On the stream that the tables were allocated for, which is idle.
    held = [torch.full((size,), 255, dtype=torch.uint8, device=CUDA) for size in (512, 4096, 20_000) * 50]
    torch.cuda.synchronize()
    assert bits(params) == bits(expected)
    assert len(held) == 150
    assert len(state) == len(params)


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_schedulers_and_averages_do_not_wait(
    update_buffers: bool, dtype: torch.dtype | None, no_sync: Callable[[str], None]
) -> None:
    model = nn.Sequential(small_model(), nn.BatchNorm1d(4).to(CUDA))
    lr = torch.tensor(0.1, device=CUDA)
    optimizer = fusedopt.FusedAdamW(model.parameters(), lr=lr)
    schedulers = [CosineAnnealingLR(optimizer, T_max=6), LambdaLR(optimizer, lambda step: 0.9**step)]
    average = ExponentialMovingAverage(model, momentum=0.1, update_buffers=update_buffers, dtype=dtype)
    for step in range(6):
        no_sync("error" if step > 1 else "default")
        model(torch.ones(4, 16, device=CUDA)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        average.update_parameters(model)
    no_sync("default")
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == pytest.approx(0.1 * 0.9**6, rel=1e-5)
    assert int(average.steps) == 6


# --- Graphs ------------------------------------------------------------------------------------------------------


class Twins:
    """An optimizer whose steps are captured and replayed, and one that steps eagerly, with numbers as GPU tensors."""

    def __init__(self, shapes: list[tuple[int, ...]] = SMALL, **settings: Any):
        self.params = [on_gpu(shapes), on_gpu(shapes)]
        self.bounds = [torch.tensor(0.5, device=CUDA) for _ in range(2)]
        self.optimizers = [
            fusedopt.FusedAdamW(
                params,
                lr=torch.tensor(0.1, device=CUDA),
                betas=(torch.tensor(0.9, device=CUDA), torch.tensor(0.99, device=CUDA)),
                weight_decay=torch.tensor(0.1, device=CUDA),
                **{"clip_grad": {"max_norm": bound}, **settings},
            )
            for params, bound in zip(self.params, self.bounds, strict=True)
        ]
        self.replayed, self.eager = self.optimizers
        for params in self.params:
            set_gradients(params, 100)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for optimizer in self.optimizers:
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)

    def set_gradients(self, seed: int) -> None:
        """In place: a graph has their addresses."""
        for params in self.params:
            before = [param.grad for param in params]
            set_gradients(params, seed)
            for param, grad in zip(params, before, strict=True):
                param.grad = grad.copy_(param.grad)

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            self.replayed.step()
        return graph


@each_backend
def test_a_captured_step_reads_tensors_at_each_replay() -> None:
    twins = Twins()
    before = contents(twins.replayed)
    graph = twins.capture()
    report = twins.replayed.last_step
    assert contents(twins.replayed) == before, "nothing has run"
    for seed in range(10):
        twins.set_gradients(seed)
        for optimizer, bound in zip(twins.optimizers, twins.bounds, strict=True):
            group = optimizer.param_groups[0]
            group["lr"].fill_(0.1 / (seed + 1))
            group["betas"][0].fill_(0.9 - 0.05 * seed)
            group["betas"][1].fill_(0.99 - 0.05 * seed)
            group["weight_decay"].fill_(0.01 * seed)
            bound.fill_(0.1 + seed)
        graph.replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)
        eager = twins.eager.last_step
        assert bits([report.grad_norm, report.clip_coef]) == bits([eager.grad_norm, eager.clip_coef])
    assert float(twins.replayed.state[twins.params[0][0]]["step"]) == 11


@each_backend
def test_schedulers_reach_a_captured_step() -> None:
    """They write to the tensors that the graph reads."""
    twins = Twins()
    schedulers = [
        [
            LinearLR(optimizer, start_factor=0.2, end=6),
            CosineAnnealingMomentum(optimizer, T_max=6),
            StepParamScheduler(optimizer, "weight_decay", step_size=2, gamma=0.5),
        ]
        for optimizer in twins.optimizers
    ]
    graph = twins.capture()
    for seed in range(6):
        twins.set_gradients(seed)
        graph.replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)
        for scheduler in [*schedulers[0], *schedulers[1]]:
            scheduler.step()
    assert float(twins.replayed.param_groups[0]["weight_decay"]) == pytest.approx(0.1 * 0.5**3)


@each_backend
def test_an_eager_step_between_replays_does_not_disturb_the_graph() -> None:
    twins = Twins()
    graph = twins.capture()
    for seed in range(4):
        twins.set_gradients(seed)
        graph.replay()
        twins.eager.step()
        for optimizer, params in zip(twins.optimizers, twins.params, strict=True):
            known = [param.grad for param in params]
            set_gradients(params, 50 + seed)
            optimizer.step()
            for param, grad in zip(params, known, strict=True):
                param.grad = grad
        assert contents(twins.replayed) == contents(twins.eager)


@each_backend
@pytest.mark.parametrize("clip_grad", [None, CLIP], ids=["bare", "norm"])
def test_a_graph_of_many_parameters(clip_grad: dict[str, Any] | None) -> None:
    """Their tables are larger than the arguments of one launch, of the small kind and of the large one."""
    twins = Twins([(17 + index % 5,) for index in range(400)], clip_grad=clip_grad)
    graphs = [twins.capture(), twins.capture()]
    for seed in range(4):
        twins.set_gradients(seed)
        graphs[seed % 2].replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)
        for params, optimizer in zip(twins.params, twins.optimizers, strict=True):  # eagerly, with other tables
            known = [param.grad for param in params]
            set_gradients(params, 50 + seed)
            optimizer.step()
            for param, grad in zip(params, known, strict=True):
                param.grad = grad
    assert contents(twins.replayed) == contents(twins.eager)


@each_backend
def test_numbers_are_frozen_in_a_graph() -> None:
    twins = Twins(clip_grad=CLIP)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"] = 0.1
    graph = twins.capture()
    twins.replayed.param_groups[0]["lr"] = 0.7
    for seed in range(3):
        twins.set_gradients(seed)
        graph.replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)


@each_backend
@pytest.mark.parametrize("clip_grad", [None, CLIP], ids=["bare", "norm"])
def test_a_whole_amp_iteration_in_a_graph(clip_grad: dict[str, Any] | None) -> None:
    """Forward, scaled backward, step and update of the scale; one of the replays overflows."""
    models = [small_model(), small_model()]
    lrs = [torch.tensor(0.01, device=CUDA) for _ in models]
    optimizers = [
        fusedopt.FusedAdamW(model.parameters(), lr=lr, clip_grad=clip_grad)
        for model, lr in zip(models, lrs, strict=True)
    ]
    scalers = [GradScaler("cuda", init_scale=2.0**10, growth_interval=3) for _ in models]
    inputs = torch.zeros(8, 16, device=CUDA)

    def iterate(which: int) -> None:
        optimizers[which].zero_grad(set_to_none=False)
        # Without its cache, which would hold casts of the warm-up's weights.
        with torch.autocast("cuda", dtype=torch.float16, cache_enabled=False):
            loss = models[which](inputs).float().square().mean()
        scalers[which].scale(loss).backward()
        scalers[which].step(optimizers[which])
        scalers[which].update()

    generator = torch.Generator().manual_seed(0)
    inputs.copy_(torch.randn(8, 16, generator=generator))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            iterate(0)
            iterate(1)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iterate(0)

    scales, skipped = [], 0
    for step in range(10):
        inputs.copy_(torch.randn(8, 16, generator=generator))
        if step == 4:
            inputs[0, 0] = INF
        for lr in lrs:
            lr.fill_(0.01 / (step + 1))
        before = contents(optimizers[0])
        graph.replay()
        skipped += contents(optimizers[0]) == before
        iterate(1)
        torch.testing.assert_close(
            [param.detach() for param in models[0].parameters()], [param.detach() for param in models[1].parameters()]
        )
        scales.append(float(scalers[0]._scale))  # type: ignore[arg-type]
        assert scales[-1] == scalers[1].get_scale()
    assert skipped == 1
    assert scales[4] == scales[3] / 2
    assert max(scales) > 2.0**10


@each_backend
def test_a_capture_before_the_first_step_is_refused() -> None:
    params = on_gpu(SMALL)
    set_gradients(params, 0)
    optimizer = fusedopt.FusedAdamW(params)
    before = bits(params)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"params'\]\[0\].*has no state yet"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert bits(params) == before
    assert not optimizer.state


@each_backend
def test_a_missing_gradient_is_refused_in_a_capture_and_a_frozen_one_is_not() -> None:
    twins = Twins()
    twins.params[0][4].grad = None
    before = contents(twins.replayed)
    with pytest.raises(RuntimeError, match=r"params'\]\[4\].*no gradient while"):
        twins.capture()
    assert contents(twins.replayed) == before
    twins.params[0][4].requires_grad_(False)
    graph = twins.capture()
    graph.replay()
    assert float(twins.replayed.state[twins.params[0][4]]["step"]) == 1
    assert float(twins.replayed.state[twins.params[0][3]]["step"]) == 2


@each_backend
def test_error_if_nonfinite_is_refused_in_a_capture() -> None:
    twins = Twins(clip_grad={"max_norm": 1.0, "error_if_nonfinite": True})
    before = contents(twins.replayed)
    with pytest.raises(RuntimeError, match="error_if_nonfinite"):
        twins.capture()
    assert contents(twins.replayed) == before


@each_backend
def test_two_optimizers_in_one_graph() -> None:
    pairs = [Twins(), Twins(clip_grad=None)]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for twins in pairs:
            twins.replayed.step()
    for seed in range(4):
        for offset, twins in enumerate(pairs):
            twins.set_gradients(seed + 10 * offset)
        graph.replay()
        for twins in pairs:
            twins.eager.step()
            assert contents(twins.replayed) == contents(twins.eager)


@each_backend
def test_two_graphs_of_one_optimizer() -> None:
    twins = Twins()
    graphs = [twins.capture(), twins.capture()]
    for seed in range(4):
        twins.set_gradients(seed)
        graphs[seed % 2].replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)


@each_backend
def test_a_graph_keeps_what_it_uploads() -> None:
    """Tables come from host memory at each replay, which nobody else may be given meanwhile."""
    twins = Twins()
    graph = twins.capture()
    for params, optimizer in zip(twins.params, twins.optimizers, strict=True):  # uploads tables of its own
        known = [param.grad for param in params]
        set_gradients(params, 50)
        optimizer.step()
        for param, grad in zip(params, known, strict=True):
            param.grad = grad
    torch.cuda.synchronize()
    gc.collect()
    held = [torch.full((size,), 255, dtype=torch.uint8).pin_memory() for size in (512, 4096, 20_000) * 50]
    for seed in range(3):
        twins.set_gradients(seed)
        graph.replay()
        twins.eager.step()
        assert contents(twins.replayed) == contents(twins.eager)
    assert len(held) == 150


# --- What Triton compiles and tunes ------------------------------------------------------------------------------

FLOATS = (0, 0, 0, 0, -1)  # float32 parameter, gradient and two states, as csrc/tables.h numbers them


def _refuse(*_: Any) -> Any:
    raise AssertionError("tuned again")


@needs_triton
def test_triton_is_tuned_once_and_other_processes_know(monkeypatch: pytest.MonkeyPatch) -> None:
    found = triton.Launcher(RULES["adam"], "cuda").tuning_for(0, FLOATS)
    assert found in triton._TUNINGS
    monkeypatch.setattr(triton.Launcher, "_measure", _refuse)
    monkeypatch.setattr(triton, "_chosen", {})  # as in a process of its own
    assert triton.Launcher(RULES["adam"], "cuda").tuning_for(0, FLOATS) == found


@needs_triton
def test_triton_is_not_tuned_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.Launcher, "_measure", _refuse)
    monkeypatch.setattr(triton.Launcher, "_kept_tuning", lambda self, key: None)
    monkeypatch.setattr(triton, "_chosen", {})
    launcher = triton.Launcher(RULES["adam"], "cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert launcher.tuning_for(0, FLOATS) == triton._TUNINGS[0]
    assert not triton._chosen, "a later step finds it out"
    with pytest.raises(AssertionError, match="tuned again"):
        launcher.tuning_for(0, FLOATS)


@needs_triton
def test_triton_kernels_that_a_capture_would_have_to_load_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", "triton")
    twins = Twins()
    before = contents(twins.replayed)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_loaded", set())
        with pytest.raises(RuntimeError, match="make one such step before capturing"):
            twins.capture()
    assert contents(twins.replayed) == before
    for optimizer in twins.optimizers:
        optimizer.step()
    graph = twins.capture()
    twins.set_gradients(1)
    graph.replay()
    twins.eager.step()
    assert contents(twins.replayed) == contents(twins.eager)


# --- The same results as elsewhere -------------------------------------------------------------------------------


@each_dtype
@each_option
def test_without_clipping_results_are_those_of_the_cpu(option: str, dtype: torch.dtype, served_by: str) -> None:
    """To the bit, but for CUDA's pow in Adam's bias correction."""
    cls, options = OPTIONS[option]
    here, there = parameters(RAGGED, dtype), on_gpu(RAGGED, dtype)
    cpu = cls(here, **copy.deepcopy(options), backend="native")
    gpu = cls(there, **copy.deepcopy(options))
    assert gpu.backend_in_use == served_by
    for step in range(2):
        for params, optimizer in ((here, cpu), (there, gpu)):
            set_gradients(params, step)
            optimizer.step()
        if cls is fusedopt.FusedSGD or served_by == "triton":
            assert bits(there) == bits(here)
            assert list(states(gpu)) == list(states(cpu))
            assert bits(states(gpu).values()) == bits(states(cpu).values())
            continue
        eps = torch.finfo(dtype).eps
        found = [param.detach().cpu() for param in there]
        torch.testing.assert_close(found, [param.detach() for param in here], rtol=4 * eps, atol=2 * eps)
        got = {name: value.cpu() for name, value in states(gpu).items()}
        torch.testing.assert_close(got, states(cpu), rtol=4 * eps, atol=2 * eps)


each_kept = pytest.mark.parametrize("kept", range(len(selftest._KEPT)), ids=lambda kept: str(selftest._KEPT[kept][1]))


@pytest.mark.parametrize("clip_grad", [None, {"type": "value", "clip_value": 0.1}], ids=["bare", "value"])
@each_kept
@pytest.mark.parametrize("option", ["sgd-nesterov", "adamw"])
def test_state_in_fewer_bits_has_those_of_the_cpu(
    option: str, kept: int, clip_grad: dict[str, Any] | None, served_by: str
) -> None:
    """To the bit, but for CUDA's pow in Adam's bias correction."""
    cls, options = OPTIONS[option]
    dtype, settings = selftest._KEPT[kept]
    here, there = parameters(RAGGED, dtype), on_gpu(RAGGED, dtype)
    cpu = cls(here, **copy.deepcopy(options), **settings, clip_grad=clip_grad, backend="native")
    gpu = cls(there, **copy.deepcopy(options), **settings, clip_grad=clip_grad)
    assert gpu.backend_in_use == served_by
    for step in range(2):
        for params, optimizer in ((here, cpu), (there, gpu)):
            set_gradients(params, step)
            optimizer.step()
        assert list(states(gpu)) == list(states(cpu))
        pairs = [*zip(there, here, strict=True), *zip(states(gpu).values(), states(cpu).values(), strict=True)]
        # What codes and low bits are, a number apart, says nothing about the distance; the self-test looks at that.
        alike = [bits([a]) == bits([b]) for a, b in pairs]
        if cls is fusedopt.FusedSGD or served_by == "triton":
            assert all(alike)
            continue
        for (found, want), same in zip(pairs, alike, strict=True):
            if not same and want.is_floating_point():
                eps = torch.finfo(want.dtype).eps
                torch.testing.assert_close(found.detach().cpu(), want.detach(), rtol=4 * eps, atol=2 * eps)
        with torch.no_grad():  # what was rounded otherwise would drift apart
            for a, b in pairs:
                a.copy_(b)


@needs_triton
@pytest.mark.parametrize("clip_grad", [None, {"type": "value", "clip_value": 0.1}, CLIP], ids=["bare", "value", "norm"])
@each_dtype
@each_option
def test_triton_and_cuda_kernels_agree(option: str, dtype: torch.dtype, clip_grad: dict[str, Any] | None) -> None:
    """To the bit, but for CUDA's pow in Adam's bias correction, and for norms, which are added up in another order."""
    cls, options = OPTIONS[option]
    pair = [on_gpu(RAGGED, dtype), on_gpu(RAGGED, dtype)]
    native, other = (
        cls(params, **copy.deepcopy(options), clip_grad=clip_grad, backend=backend)
        for params, backend in zip(pair, ("native", "triton"), strict=True)
    )
    assert (native.backend_in_use, other.backend_in_use) == ("native", "triton")
    for step in range(3):
        for params, optimizer in zip(pair, (native, other), strict=True):
            set_gradients(params, step)
            optimizer.step(grad_scale=2.0)
        assert list(states(other)) == list(states(native))
        if cls is fusedopt.FusedSGD and clip_grad is not CLIP:
            assert contents(other) == contents(native)
            continue
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(
            [param.detach() for param in pair[1]], [param.detach() for param in pair[0]], rtol=4 * eps, atol=2 * eps
        )
        torch.testing.assert_close(states(other), states(native), rtol=4 * eps, atol=2 * eps)


@each_backend
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, INF])
def test_every_run_gives_the_same_bits(norm_type: float) -> None:
    def run() -> list[bytes]:
        params = on_gpu([*RAGGED, (3000, 1000)])
        optimizer = fusedopt.FusedAdamW(params, lr=0.01, clip_grad={"max_norm": 0.5, "norm_type": norm_type})
        norms = []
        for step in range(3):
            set_gradients(params, step)
            optimizer.step(grad_scale=2.0)
            norms.append(optimizer.last_step.grad_norm)  # type: ignore[union-attr]
        assert float(norms[-1]) == pytest.approx(global_norm(params, norm_type) / 2, rel=1e-6)  # type: ignore[arg-type]
        return [*bits(params), *bits(norms)]

    want = run()
    for _ in range(10):
        assert run() == want


@each_backend
@pytest.mark.slow
@pytest.mark.parametrize("clip_grad", [None, {"max_norm": INF}], ids=["bare", "norm"])
def test_more_than_two_to_the_31_elements(clip_grad: dict[str, Any] | None) -> None:
    count = 2**31 + 5
    free = torch.cuda.mem_get_info()[0]
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of free GPU memory, {free / 2**30:.1f} GiB are free")
    param = nn.Parameter(torch.zeros(count, dtype=torch.bfloat16, device=CUDA))
    param.grad = torch.ones(count, dtype=torch.bfloat16, device=CUDA)
    optimizer = fusedopt.FusedSGD([param], lr=1.0, clip_grad=clip_grad)
    optimizer.step()
    places = torch.tensor([0, 1, 2**30, 2**31 - 1, 2**31, count - 1], device=CUDA)
    assert param.detach()[places].tolist() == [-1.0] * 6
    assert bool((param.detach() == -1).all())
    if clip_grad is not None:
        assert float(optimizer.last_step.grad_norm) == pytest.approx(count**0.5, rel=1e-6)  # type: ignore


# --- Devices -----------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
@pytest.mark.parametrize("clip_grad", [None, CLIP, {"max_norm": 0.5, "norm_type": INF}], ids=["bare", "2", "inf"])
def test_several_gpus_in_one_optimizer(clip_grad: dict[str, Any] | None) -> None:
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    one = on_gpu(RAGGED)
    spread = [nn.Parameter(p.detach().to(devices[index % len(devices)])) for index, p in enumerate(one)]
    settings = {"lr": torch.tensor(0.01, device=devices[-1]), "clip_grad": clip_grad}
    optimizers = [fusedopt.FusedAdamW(params, **settings) for params in (one, spread)]
    scale = torch.tensor(2.0, device=devices[0])
    for step in range(4):
        for params, optimizer in zip((one, spread), optimizers, strict=True):
            set_gradients(params, step, 2.0)
            if step == 2:
                params[4].grad[-1] = INF
            before = contents(optimizer)
            optimizer.step(grad_scale=scale)
            assert (contents(optimizer) == before) == (step == 2)
            assert float(optimizer.last_step.found_inf) == (step == 2)  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close([p.detach().to(CUDA) for p in spread], [p.detach() for p in one])


def test_a_model_may_move_after_its_optimizer_was_made() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4))
    expected = copy.deepcopy(model)
    optimizers = [fusedopt.FusedAdamW(m.parameters(), lr=0.01, clip_grad=CLIP) for m in (model, expected)]
    model.to(CUDA)
    for step in range(3):
        for m, optimizer in zip((model, expected), optimizers, strict=True):
            set_gradients(list(m.parameters()), step)
            optimizer.step()
        assert all(param.is_cuda for param in model.parameters())
        assert all(value.is_cuda for value in states(optimizers[0]).values())
        assert optimizers[0].backend_in_use == "native"
        torch.testing.assert_close([p.detach().cpu() for p in model.parameters()], [*expected.parameters()])
    # And back, with its state, as a checkpoint would be moved.
    optimizers[0].zero_grad()
    model.cpu()
    optimizers[0].load_state_dict(optimizers[0].state_dict())
    for m, optimizer in zip((model, expected), optimizers, strict=True):
        set_gradients(list(m.parameters()), 9)
        optimizer.step()
    assert all(not value.is_cuda for value in states(optimizers[0]).values())
    torch.testing.assert_close([*model.parameters()], [*expected.parameters()])


@each_backend
@pytest.mark.parametrize("option", ["sgd-momentum", "adam-amsgrad", "adamw"])
def test_torchs_state_dict_loads_with_its_step_on_the_cpu(option: str) -> None:
    cls, options = OPTIONS[option]
    stock_type = getattr(torch.optim, cls.__name__.removeprefix("Fused"))
    params, others = on_gpu([(33,), (5, 7)]), on_gpu([(33,), (5, 7)])
    stock = stock_type(others, foreach=False, **options)
    for step in range(2):
        set_gradients(others, step)
        stock.step()
    for param, other in zip(params, others, strict=True):
        param.data.copy_(other.data)
    optimizer = cls(params, **options)
    saved = stock.state_dict()
    if cls is not fusedopt.FusedSGD:
        assert not saved["state"][0]["step"].is_cuda
    optimizer.load_state_dict(saved)
    for step in range(2, 4):
        for these, opt in ((params, optimizer), (others, stock)):
            set_gradients(these, step)
            opt.step()
        torch.testing.assert_close(params, others)
    assert all(value.is_cuda for value in states(optimizer).values())


def test_fuse_takes_over_torchs_fused_adamw_in_mid_training(served_by: str) -> None:
    params, others = on_gpu([(33,), (5, 7)]), on_gpu([(33,), (5, 7)])
    stocks = [torch.optim.AdamW(these, lr=0.01, weight_decay=0.1, fused=True) for these in (params, others)]
    for step in range(3):
        for these, stock in zip((params, others), stocks, strict=True):
            set_gradients(these, step)
            stock.step()
    twin = fusedopt.fuse(stocks[0])
    assert twin.backend_in_use == served_by
    for step in range(3, 6):
        for these, optimizer in ((params, twin), (others, stocks[1])):
            set_gradients(these, step)
            optimizer.step()
        torch.testing.assert_close(params, others)
    assert all(float(twin.state[param]["step"]) == 6 for param in params)


@each_backend
def test_numbers_on_the_cpu_serve_too() -> None:
    params, others = on_gpu(SMALL), on_gpu(SMALL)
    here = fusedopt.FusedAdamW(params, lr=torch.tensor(2.0**-6), clip_grad={"max_norm": torch.tensor(0.5)})
    there = fusedopt.FusedAdamW(others, lr=2.0**-6, clip_grad={"max_norm": 0.5})
    for these, optimizer in ((params, here), (others, there)):
        set_gradients(these, 0)
        optimizer.step(grad_scale=torch.tensor(4.0))
        optimizer.step(grad_scale=torch.tensor(4.0), found_inf=torch.tensor(0.0))
    assert bits(params) == bits(others)
    assert here.last_step.found_inf.is_cuda  # type: ignore[union-attr]
    before = contents(here)
    here.step(grad_scale=4.0, found_inf=torch.tensor(2.0))
    assert contents(here) == before


@each_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_hyperparameters_may_be_gpu_tensors_of_any_dtype(dtype: torch.dtype) -> None:
    params, others = on_gpu(SMALL), on_gpu(SMALL)
    one = torch.ones(1, dtype=dtype, device=CUDA)
    pairs = ((params, fusedopt.FusedAdamW(params, lr=one)), (others, fusedopt.FusedAdamW(others, lr=1.0)))
    for step in range(2):
        for these, optimizer in pairs:
            set_gradients(these, step)
            optimizer.step()
    assert bits(params) == bits(others)


def test_a_cpu_and_a_gpu_in_one_optimizer_take_the_reference_backend() -> None:
    backends._note_fallback.cache_clear()
    mixed = [*parameters([(33,)]), *on_gpu([(17,)], seed=1)]
    with pytest.warns(UserWarning, match="parameters on cpu and cuda.*; using the slow reference backend"):
        optimizer = fusedopt.FusedAdamW(mixed, lr=0.01, clip_grad=CLIP)
    assert optimizer.backend_in_use == "reference"
    with pytest.raises(backends.BackendUnavailable, match="cpu and cuda"):
        fusedopt.FusedAdamW(mixed, backend="native")
    alike = [nn.Parameter(param.detach().cpu()) for param in mixed]
    expected = fusedopt.FusedAdamW(alike, lr=0.01, clip_grad=CLIP)
    for step in range(2):
        for these, opt in ((mixed, optimizer), (alike, expected)):
            set_gradients(these, step)
            opt.step()
        torch.testing.assert_close([param.detach().cpu() for param in mixed], [param.detach() for param in alike])


def test_the_gpu_is_served_by_the_native_backend() -> None:
    assert fusedopt.FusedAdamW(on_gpu([(3,)])).backend_in_use == "native"


def test_info_names_the_gpu_and_who_serves_it(served_by: str) -> None:
    text = info()
    assert torch.cuda.get_device_name(0) in text
    served = [line for line in text.splitlines() if line.startswith(f"backend {served_by} on cuda:0 ")]
    assert [line.split()[-1] for line in served] == ["available"]


# --- The self-test -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@each_dtype
def test_the_kernels_pass_the_self_test(dtype: torch.dtype, rule: str, served_by: str, record_property: Any) -> None:
    kind = backends.BACKENDS[served_by]
    for taken in ("first", "loaded"):
        begin = time.perf_counter()
        found = [selftest.try_mode(kind, RULES[rule], CUDA, dtype, mode) for mode in selftest.MODES]
        milliseconds = 1e3 * (time.perf_counter() - begin)
        assert found == [None, None, None]
        record_property(f"selftest_{taken}_ms", round(milliseconds, 1))
        print(f"self-test of {served_by}, {rule}, {selftest._name(dtype)}, {taken}: {milliseconds:.1f} ms")


@pytest.mark.parametrize("rule", RULES)
@each_kept
def test_the_kernels_pass_the_self_test_with_state_in_fewer_bits(kept: int, rule: str, served_by: str) -> None:
    dtype, settings = selftest._KEPT[kept]
    precision = selftest.on_trial(Precision.parse(RULES[rule], **settings))
    kind = backends.BACKENDS[served_by]
    found = [selftest.try_mode(kind, RULES[rule], CUDA, dtype, mode, precision) for mode in selftest.MODES]
    assert found == [None, None, None]


def test_the_self_test_may_wait_and_leaves_the_device_as_it_was(
    served_by: str, no_sync: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = on_gpu([(3,)])
    monkeypatch.setattr(selftest, "_found", {})
    states = torch.cuda.get_rng_state(CUDA)
    side = torch.cuda.Stream(CUDA)
    no_sync("error")
    with torch.cuda.stream(side):
        optimizer = fusedopt.FusedAdamW(params)
        assert torch.cuda.current_stream() == side
    assert torch.cuda.get_sync_debug_mode() == 2
    no_sync("default")
    assert torch.equal(torch.cuda.get_rng_state(CUDA), states)
    assert optimizer.backend_in_use == served_by
    assert set(selftest._found.values()) == {None}


def test_the_self_test_is_not_made_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    params = on_gpu([(3,)])
    monkeypatch.setattr(selftest, "_found", {})
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer = fusedopt.FusedAdamW(params)
    assert not selftest._found
    assert optimizer.backend_in_use == "native"
    assert set(selftest._found.values()) == {None}
