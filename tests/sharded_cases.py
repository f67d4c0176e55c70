"""What the tests of sharded training share: processes, a model, ways to shard it, and one process that does without."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from cases import INF
from once import once
from torch import nn

import fusedopt

MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]
#: Gradients of parts of a batch, added up, against those of the whole: the same sum in another order.
TOLERANCE = dict(rtol=1e-9, atol=1e-11)
STEPS = 3

Scenario = tuple[Callable[..., Any], tuple[Any, ...]]


# Processes ------------------------------------------------------------------------------------------------------------


def _run_all(rank: int, world: int, folder: str, scenarios: dict[str, Scenario]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    attempt = 0

    def connect() -> dist.Store:
        timeout = datetime.timedelta(seconds=60)
        store = dist.FileStore(f"{folder}/store{attempt}", world)
        store.set_timeout(3 * timeout)  # others may wait for a process that has failed
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
        return dist.PrefixStore("scenarios", store)

    store = connect()
    outcomes = {}
    for name, (function, arguments) in scenarios.items():
        torch.manual_seed(0)
        try:
            outcomes[name] = function(rank, *arguments)
            store.set(f"{name}/{rank}", "done")
        except Exception:
            outcomes[name] = Failed(traceback.format_exc())
            store.set(f"{name}/{rank}", "failed")
        if any(store.get(f"{name}/{each}") == b"failed" for each in range(world)):
            # Some process may be left in the middle of a collective: start afresh.
            dist.destroy_process_group()
            _meshes.clear()
            attempt += 1
            store = connect()
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def refused(step: Callable[[], Any]) -> str:
    """The error that something raises."""
    try:
        step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


@dataclass
class Failed:
    """An error in a process, for the test that looks at the scenario."""

    message: str


class Outcomes:
    """What each scenario gave in each process, by name."""

    def __init__(self, by_rank: list[dict[str, Any]]):
        self._by_rank = by_rank

    def __getitem__(self, name: str) -> list[Any]:
        found = [outcomes[name] for outcomes in self._by_rank]
        failed = {rank: each.message for rank, each in enumerate(found) if isinstance(each, Failed)}
        if failed:
            pytest.fail("\n".join(f"process {rank}: {message}" for rank, message in failed.items()))
        return found


#: Scenarios that tests have as their parameter.
_parameters: set[str] = set()


def each_of(scenarios: Iterable[str]) -> Any:
    """A test of each scenario; those whose names have no part that the others before them lack are for test-full."""
    params, seen = [], set[str]()
    for name in scenarios:
        _parameters.add(name)
        parts = set(name.split("-"))
        params.append(pytest.param(name, marks=[] if parts - seen else [pytest.mark.full]))
        seen |= parts
    return pytest.mark.parametrize("scenario", params)


def outcomes_of(
    scenarios: Mapping[str, Scenario], world: int, request: pytest.FixtureRequest, folders: pytest.TempPathFactory
) -> Outcomes:
    """What the scenarios gave that a test of the module is going to look at; all workers share the processes."""
    module = request.module.__name__
    return read(world, once(folders, module, lambda folder: start(_chosen(scenarios, request), world, folder)))


def _chosen(scenarios: Mapping[str, Scenario], request: pytest.FixtureRequest) -> dict[str, Scenario]:
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    asked = {item.callspec.params.get("scenario") for item in items if hasattr(item, "callspec")}
    return {name: each for name, each in scenarios.items() if name in asked or name not in _parameters}


def run(scenarios: dict[str, Scenario], world: int, folder: Path) -> Outcomes:
    """Run the scenarios one after the other in ``world`` processes that are started once."""
    start(scenarios, world, folder)
    return read(world, folder)


def start(scenarios: dict[str, Scenario], world: int, folder: Path) -> None:
    """Let the processes run, and leave what they have in ``folder``."""
    torch.multiprocessing.spawn(_run_all, (world, str(folder), scenarios), nprocs=world)


def read(world: int, folder: Path) -> Outcomes:
    """What the processes have left."""
    return Outcomes([torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)])


_meshes: dict[Any, Any] = {}


def mesh_of(**dims: int) -> Any:
    """A mesh of all processes, made once."""
    from torch.distributed.device_mesh import init_device_mesh

    key = tuple(dims.items())
    if key not in _meshes:
        _meshes[key] = init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
    return _meshes[key]


# The model ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """No dimension but those that tensor parallelism deals out can be divided by 2 or 4, and some are 1.

    Args:
        unused: a layer that gives no gradients.
    """

    def __init__(self, unused: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 3)
        self.head = nn.Linear(3, 1)
        if unused:
            self.unused = nn.Linear(2, 3)
        self.to(dtype)
        self.sequence: slice | None = None  # of a batch, that this process normalizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.sequence is not None:
            x = x[:, self.sequence]
        return self.head(torch.tanh(self.down(torch.tanh(self.up(self.norm(x))))))


def batches(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """For all processes together: 8 sequences of 2, 5 numbers in and 1 out."""
    whole = torch.randn(steps, 8, 2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list((whole * 2).to(dtype))


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch[..., :5]) - batch[..., 5:]).square().mean()


# Ways to shard --------------------------------------------------------------------------------------------------------


@dataclass
class Sharded:
    """A model that is dealt out, and what part of a batch this process trains it on."""

    model: nn.Module
    part: Callable[[torch.Tensor], torch.Tensor] = lambda batch: batch
    flat: bool = False  # FSDP1
    has_state: bool = True  # that can be compared by names of parameters

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        if not self.flat:
            yield
            return
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
            yield

    def parameters(self) -> dict[str, torch.Tensor]:
        """Copies of the whole parameters; all processes must ask."""
        with self.whole():
            return {
                name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): full(param)
                for name, param in self.model.named_parameters()
            }


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, of a DTensor all of it."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().clone()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _chunk(index: int, count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda batch: batch.chunk(count)[index]


def _tensor_parallel(model: Model, mesh: Any) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {"norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    rank = mesh.get_local_rank()
    model.sequence = slice(rank, rank + 1)


def _fully_shard(model: nn.Module, mesh: Any, **settings: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **settings)
    fully_shard(model, mesh=mesh, **settings)


def shard(kind: str, model: nn.Module, **settings: Any) -> Sharded:
    """``model`` over all processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "fsdp":
        _fully_shard(model, mesh_of(fsdp=world), **settings)
        return Sharded(model, _chunk(rank, world))
    if kind == "hsdp":
        _fully_shard(model, mesh_of(replicas=2, fsdp=world // 2), **settings)
        return Sharded(model, _chunk(rank, world))
    if kind == "tp":
        _tensor_parallel(model, mesh_of(tp=world))  # the head stays plain
        return Sharded(model)
    if kind == "tp-fsdp":
        mesh = mesh_of(fsdp=2, tp=world // 2)
        _tensor_parallel(model, mesh["tp"])
        _fully_shard(model, mesh["fsdp"], **settings)
        return Sharded(model, _chunk(mesh["fsdp"].get_local_rank(), 2))
    if kind.startswith("zero"):
        from torch.nn.parallel import DistributedDataParallel

        return Sharded(DistributedDataParallel(model), _chunk(rank, world), has_state=False)
    if kind.startswith("fsdp1"):
        from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

        settings = {"use_orig_params": "flat" not in kind, "device_id": torch.device("cpu"), **settings}
        if "hybrid" in kind:
            settings |= {
                "sharding_strategy": ShardingStrategy.HYBRID_SHARD,
                "device_mesh": mesh_of(replicas=2, fsdp=world // 2),
            }
        if "none" in kind:
            settings["sharding_strategy"] = ShardingStrategy.NO_SHARD
        model.up = FullyShardedDataParallel(model.up, **settings)
        return Sharded(FullyShardedDataParallel(model, **settings), _chunk(rank, world), flat=True, has_state=False)
    raise ValueError(kind)


def optimizer_of(kind: str, case: Case, sharded: Sharded) -> Any:
    """The fused optimizer, or a ZeroRedundancyOptimizer of it."""
    params = sharded.model.parameters()
    if kind == "zero":
        own = case.own_settings()
        return fusedopt.ZeroRedundancyOptimizer(
            params, f"Fused{case.optimizer}", clip_grad=case.clip, backend=case.backend, **own
        )
    if kind == "zero-torch":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        cls = getattr(fusedopt, f"Fused{case.optimizer}")
        zero = ZeroRedundancyOptimizer(params, optimizer_class=cls, **case.own_settings())
        zero.optim.clip_grad = case.clip
        return zero
    return case.fused(params)


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is trained with what.

    Args:
        optimizer: the name in torch.optim, and after ``Fused`` here.
        settings: of it.
        clip: clip_grad.
        backend: of the fused optimizer.
        frozen: parameters that are not trained.
        unused: whether the model has a layer without gradients.
        accumulate: parts that each batch is given in.
        scheduled: whether the learning rate changes between steps.
        closure: whether the step is given one.
        hooks: whether a hook before the step changes the gradients.
        write_back: write_back_grads.
        dtype: of the model.
    """

    optimizer: str = "AdamW"
    settings: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.05, "weight_decay": 0.1})
    clip: Mapping[str, Any] | None = None
    backend: str = "auto"
    frozen: tuple[str, ...] = ()
    unused: bool = False
    accumulate: int = 1
    scheduled: bool = False
    closure: bool = False
    hooks: bool = False
    write_back: bool = False
    dtype: torch.dtype = torch.float64

    def model(self) -> Model:
        model = Model(self.unused, self.dtype)
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def fused(self, params: Iterable[Any], **settings: Any) -> Any:
        own = {"clip_grad": self.clip, "backend": self.backend, "write_back_grads": self.write_back}
        return getattr(fusedopt, "Fused" + self.optimizer)(params, **{**self.own_settings(), **own, **settings})

    def stock(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(params, **self.own_settings(), foreach=False)

    def own_settings(self) -> dict[str, Any]:
        """Schedulers write to tensors."""
        items = self.settings.items()
        return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in items}


def stock_clip(params: list[Any], clip: Mapping[str, Any] | None) -> torch.Tensor | None:
    """torch's functions, on gradients that are all here."""
    if clip is None:
        return None
    if clip.get("type") == "value":
        torch.nn.utils.clip_grad_value_(params, clip["clip_value"])
        return None
    max_norm, norm_type = float(clip["max_norm"]), float(clip.get("norm_type", 2))
    norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None], norm_type)
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return norm


def report_of(optimizer: Any) -> tuple[float | None, ...]:
    """Norm, coefficient and overflow of the last step."""
    last = (optimizer if hasattr(optimizer, "last_step") else optimizer.optim).last_step
    if last is None:
        return (None,) * 3
    return tuple(None if each is None else float(each) for each in (last.grad_norm, last.clip_coef, last.found_inf))


def state_of(optimizer: Any, named: Iterable[tuple[str, Any]]) -> dict[str, dict[str, torch.Tensor]]:
    """All of the state by the names of parameters; all processes must ask."""
    found = {name: optimizer.state.get(param, {}) for name, param in named}
    return {
        name: {key: full(value) for key, value in entry.items() if value is not None}
        for name, entry in found.items()
        if entry
    }


@dataclass
class Result:
    """After training: parameters and state by name, and of each step what it reported and the gradients it left."""

    parameters: dict[str, torch.Tensor]
    state: dict[str, dict[str, torch.Tensor]]
    reports: list[Any]
    grads: list[dict[str, torch.Tensor]]
    rest: Any = None


def train(case: Case, sharded: Sharded, optimizer: Any, data: list[torch.Tensor], *, fused: bool) -> Result:
    """Train as a user would; without ``fused`` with torch's clipping and optimizer."""
    model, reports, grads = sharded.model, [], []
    params = [param for param in model.parameters() if param.requires_grad]

    def double(*_: Any) -> None:
        for param in params:
            if param.grad is not None:
                param.grad.mul_(2)

    called = 0

    def count(*_: Any) -> None:
        nonlocal called
        called += 1

    if case.hooks and fused:
        optimizer.register_step_pre_hook(double)
        optimizer.register_step_post_hook(count)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) if case.scheduled else None

    def backward(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        parts = batch.chunk(case.accumulate)
        total = torch.zeros(())
        for number, part in enumerate(parts):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(number == len(parts) - 1)
            loss = loss_of(model, sharded.part(part)) / len(parts)
            loss.backward()
            total = total + loss.detach()
        return total

    for batch in data:
        norm = None
        if not case.closure:
            backward(batch)
        if fused:
            optimizer.step(*([lambda batch=batch: backward(batch)] if case.closure else []))
            reports.append(report_of(optimizer))
        else:
            if case.closure:
                backward(batch)
            if case.hooks:
                double()
            norm = stock_clip(params, case.clip)
            optimizer.step()
            reports.append(None if norm is None else float(norm))
        if schedule is not None:
            schedule.step()
        named = model.named_parameters()
        grads.append({name: full(param.grad) for name, param in named if param.grad is not None and sharded.has_state})
    state = state_of(optimizer, model.named_parameters()) if sharded.has_state else {}
    return Result(sharded.parameters(), state, reports, grads, called)


def trained(rank: int, kind: str, case: Case) -> Result:
    """A scenario: train a model that is sharded in some way."""
    sharded = shard(kind, case.model())
    return train(case, sharded, optimizer_of(kind, case, sharded), batches(dtype=case.dtype), fused=True)


def scaler_of(kind: str) -> Any:
    """One of ours, torch's, or torch's for shards."""
    settings = dict(init_scale=8.0, growth_interval=2)
    if kind == "sharded":
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

        return ShardedGradScaler("cpu", **settings)
    return {"ours": fusedopt.amp.GradScaler, "stock": torch.amp.GradScaler}[kind]("cpu", **settings)


def snapshot(optimizer: Any) -> Any:
    """What of an optimizer lies in this process: parameters, state and counts."""
    own = optimizer if hasattr(optimizer, "_counts") else optimizer.optim
    params = [param for group in own.param_groups for param in group["params"]]
    kept = [{key: local(value).clone() for key, value in cases.whole_state(own, param).items()} for param in params]
    return [[local(param.detach()).clone() for param in params], kept]


def plant(sharded: Sharded, kind: str, last: bool, value: float = INF) -> None:
    """Make an element of a gradient infinite: in the last process, or in all of them where each has all gradients."""
    model = sharded.model
    if kind.startswith("zero") or "none" in kind:
        next(model.parameters()).grad.view(-1)[0] = value
    elif last:
        params = [model.up.weight] if kind.startswith("tp") else list(model.parameters())
        grads = [local(param.grad) for param in params if param.grad is not None and local(param.grad).numel()]
        grads[0].view(-1)[0] = value


def unequal(rank: int, kind: str, case: Case) -> tuple[float | None, ...]:
    """A scenario: the last process alone has an overflow in what all have, and the others know nothing of it."""
    sharded = shard(kind, case.model())
    optimizer = optimizer_of(kind, case, sharded)
    loss_of(sharded.model, sharded.part(batches()[0])).backward()
    if rank == dist.get_world_size() - 1:
        local(sharded.model.down.bias.grad)[0] = INF
    before = snapshot(optimizer)
    optimizer.step(grad_scale=2.0)
    assert_equal(snapshot(optimizer)[0], before[0])
    return report_of(optimizer)


def has_last(kind: str) -> bool:
    """Whether this process is the last of those with different parts; replicas have the same gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return rank % (world // 2) == world // 2 - 1 if kind in ("hsdp", "fsdp1-hybrid") else rank == world - 1


def overflowed(rank: int, kind: str, case: Case, scaler_kind: str, at: int, by_hand: bool) -> dict[str, Any]:
    """A scenario: the gradients in one process overflow before step ``at``."""
    sharded = shard(kind, case.model())
    optimizer, scaler = optimizer_of(kind, case, sharded), scaler_of(scaler_kind)
    outcome: dict[str, Any] = {"scales": [], "moved": [], "reports": []}
    for index, batch in enumerate(batches(4)):
        optimizer.zero_grad()
        scaler.scale(loss_of(sharded.model, sharded.part(batch))).backward()
        if index == at:
            plant(sharded, kind, has_last(kind))
        if by_hand:
            scaler.unscale_(optimizer)
        before = snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        params, state = snapshot(optimizer)
        moved = [cases.bits(params) != cases.bits(before[0])]
        moved += [
            cases.bits(now.values()) != cases.bits(then.values())
            for now, then in zip(state, before[1], strict=True)
            if then
        ]
        outcome["moved"].append(sorted({*moved}))
        outcome["scales"].append(scaler.get_scale())
        outcome["reports"].append(report_of(optimizer))
    named = sharded.model.named_parameters()
    state = state_of(optimizer, named) if sharded.has_state else {}
    return {**outcome, "parameters": sharded.parameters(), "state": state}


def assert_skipped(outcomes: list[dict[str, Any]], case: Case, at: int, *, reported: bool = True) -> None:
    """All processes have left out the same step, and nothing else has happened."""
    expected = alone(case, [batch for index, batch in enumerate(batches(4)) if index != at])
    scales = {0: [4.0, 4.0, 8.0, 8.0], 2: [8.0, 16.0, 8.0, 8.0]}[at]
    for outcome in outcomes:
        assert outcome["scales"] == scales
        assert [True in moved for moved in outcome["moved"]] == [index != at for index in range(4)]
        assert outcome["moved"][at] == [False]
        assert repr(outcome["reports"]) == repr(outcomes[0]["reports"])
        if reported:
            assert [found_inf for *_, found_inf in outcome["reports"]] == [float(index == at) for index in range(4)]
        assert_close(outcome["parameters"], expected.parameters)
        if outcome["state"]:
            assert_close(outcome["state"], expected.state)


def alone(case: Case, data: list[torch.Tensor] | None = None) -> Result:
    """One process with whole batches and torch's own functions."""
    sharded = Sharded(case.model())
    optimizer = case.stock(sharded.model.parameters())
    return train(case, sharded, optimizer, batches(dtype=case.dtype) if data is None else data, fused=False)


# Comparing ------------------------------------------------------------------------------------------------------------


def assert_close(actual: Mapping[str, Any], expected: Mapping[str, Any], **tolerance: float) -> None:
    """Dicts of tensors, or of such dicts, with the same keys."""
    assert actual.keys() == expected.keys()
    for key, want in expected.items():
        if isinstance(want, Mapping):
            assert_close(actual[key], want, **tolerance)
        else:
            torch.testing.assert_close(
                actual[key].double(),
                want.double(),
                msg=lambda text, key=key: f"{key}: {text}",
                **(tolerance or TOLERANCE),
            )


def assert_equal(actual: Any, expected: Any) -> None:
    """Nested dicts and lists with tensors, equal to the bit."""
    if isinstance(expected, torch.Tensor):
        assert cases.bits([actual]) == cases.bits([expected])
    elif isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert actual == expected


def assert_reports(results: list[Result], case: Case, expected: Result | None = None, **tolerance: float) -> None:
    """Every process reports the same, and the norm is that of one process with everything."""
    first, *others = [result.reports for result in results]
    for other in others:
        assert repr(other) == repr(first)
    if expected is None:
        return
    rel = tolerance.get("rtol", 1e-12)
    for (norm, coefficient, _), want in zip(first, expected.reports, strict=True):
        if want is None:
            assert norm is None
            assert coefficient is None
        else:
            assert norm == pytest.approx(want, rel=rel)
            assert coefficient == pytest.approx(min(1.0, float(case.clip["max_norm"]) / (want + 1e-6)), rel=rel)
