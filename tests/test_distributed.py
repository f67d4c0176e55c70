"""Two processes on this machine: DistributedDataParallel without needless synchronization, and sharded optimizers."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from once import once
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt import OptimWrapper, build_optim_wrapper
from fusedopt.training.averaging import ExponentialMovingAverage

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

WORLD = 2
ITERATIONS, ACCUMULATE = 8, 3  # steps after 3, 6 and 8 iterations
TYPES = ["SGD", "FusedSGD", "AdamW", "FusedAdamW"]
SETTINGS = {"SGD": dict(lr=0.05, momentum=0.9), "AdamW": dict(lr=0.02, weight_decay=0.05)}
# Gradients of two halves, averaged, against those of the whole batch: the same sum in another order.
TOLERANCE = dict(rtol=1e-9, atol=1e-11)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def optimizer_cfg(kind: str) -> dict[str, Any]:
    return dict(type=kind, **SETTINGS[kind.removeprefix("Fused")])


def zero_cfg(kind: str, **settings) -> dict[str, Any]:
    cfg = optimizer_cfg(kind)
    return {**cfg, "type": "ZeroRedundancyOptimizer", "optimizer_type": cfg["type"], **settings}


def batches(rank: int | None = None) -> list[torch.Tensor]:
    """Those of one process, or of both together."""
    whole = torch.randn(ITERATIONS, 8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(whole if rank is None else whole.chunk(WORLD, dim=1)[rank])


def train(model: nn.Module, wrapper: OptimWrapper, data: list[torch.Tensor]) -> None:
    for batch in data:
        with wrapper.optim_context(model):
            loss = (model(batch[:, :4]) - batch[:, 4:]).square().mean()
        wrapper.update_params(loss)


def parameters_of(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def alone(cfg: dict[str, Any], **settings) -> tuple[list[torch.Tensor], OptimWrapper]:
    """One process with the whole batches."""
    model = make_model()
    wrapper = build_optim_wrapper(model, dict(optimizer=cfg, **settings))
    wrapper.initialize_count_status(model, 0, ITERATIONS)
    train(model, wrapper, batches())
    return parameters_of(model), wrapper


# What runs in both processes ------------------------------------------------------------------------------------------


def replicate(rank: int, kind: str) -> dict[str, Any]:
    model = DistributedDataParallel(make_model())
    reductions = 0

    def count(state, bucket):  # torch refuses annotations that are strings
        nonlocal reductions
        reductions += 1
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    wrapper = build_optim_wrapper(model, dict(optimizer=optimizer_cfg(kind), accumulative_counts=ACCUMULATE))
    wrapper.initialize_count_status(model, 0, ITERATIONS)
    history = []
    for batch in batches(rank):
        train(model, wrapper, [batch])
        history.append(reductions)
    return {"reductions": history, "parameters": parameters_of(model)}


def shard(rank: int, cfg: dict[str, Any], wrapper: dict[str, Any]) -> dict[str, Any]:
    model = DistributedDataParallel(make_model())
    optim_wrapper = build_optim_wrapper(model, dict(optimizer=cfg, **wrapper))
    train(model, optim_wrapper, batches(rank))
    owned = [param for group in optim_wrapper.optimizer.optim.param_groups for param in group["params"]]
    saved = optim_wrapper.state_dict()
    outcome = {
        "parameters": parameters_of(model),
        "owned": len(owned),
        "local": type(optim_wrapper.optimizer.optim).__name__,
        "grad_norm": optim_wrapper.grad_norm,
        "clip_coef": optim_wrapper.clip_coef,
        "clip_grad": optim_wrapper.clip_grad,
        "lr": optim_wrapper.get_lr(),
        "betas": optim_wrapper.defaults.get("betas"),
        "saved": saved,
    }
    # Every process gets what the first one saved, as from a checkpoint file, and trains on.
    everybodys = [copy.deepcopy(saved)]
    dist.broadcast_object_list(everybodys, src=0)
    (saved,) = everybodys
    again = DistributedDataParallel(make_model())
    resumed = build_optim_wrapper(again, dict(optimizer=cfg, **wrapper))
    again.load_state_dict(model.state_dict())
    before = repr(saved)
    resumed.load_state_dict(saved)
    assert repr(saved) == before, "load_state_dict changed the caller's dict"
    train(model, optim_wrapper, batches(rank)[:3])
    train(again, resumed, batches(rank)[:3])
    if cfg["optimizer_type"].startswith("Fused"):
        assert repr(saved) == before, "the fused optimizer's state shares memory with what was loaded"
    return {**outcome, "continued": parameters_of(model), "resumed": parameters_of(again)}


def shard_nan(rank: int) -> dict[str, Any]:
    """One process' share has a NaN: the norm is NaN in all, of whatever order."""
    norms = {}
    for norm_type in (1.0, 2.0, float("inf")):
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
        clip_grad = dict(max_norm=1.0, norm_type=norm_type)
        optimizer = fusedopt.ZeroRedundancyOptimizer(params, "FusedSGD", lr=0.1, clip_grad=clip_grad)
        params[0].grad, params[1].grad = torch.full((4,), float("nan")), torch.ones(4)
        optimizer.step()
        norms[norm_type] = float(optimizer.last_step.grad_norm)
    optimizer = fusedopt.ZeroRedundancyOptimizer(
        params, "FusedSGD", lr=0.1, clip_grad=dict(max_norm=1.0, error_if_nonfinite=True)
    )
    with pytest.raises(RuntimeError, match=r"total norm of the gradients is nan, so it cannot be clipped"):
        optimizer.step()
    return {"norms": norms}


def shard_closure(rank: int) -> dict[str, Any]:
    """More processes than parameters, a closure, and settings that are no group's."""
    param = nn.Parameter(torch.ones(4))
    optimizer = fusedopt.ZeroRedundancyOptimizer(
        [param], fusedopt.FusedSGD, lr=0.1, backend="reference", clip_grad=dict(type="value", clip_value=0.5)
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="clip_grad is set on both the wrapper"):
        OptimWrapper(optimizer, clip_grad=dict(max_norm=1.0))
    loss = optimizer.step(closure)
    return {"loss": float(loss), "param": param.tolist(), "keys": sorted(optimizer.param_groups[0])}


def shard_nothing(rank: int, kind: str) -> dict[str, Any]:
    """Norm clipping where one process has no parameters."""
    param = nn.Parameter(torch.ones(4))
    optimizer = fusedopt.ZeroRedundancyOptimizer([param], kind, lr=0.1, clip_grad=dict(max_norm=1.0))
    param.grad = torch.full((4,), 2.0)
    optimizer.step()
    owned = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    return {"owned": owned, "norm": float(optimizer.last_step.grad_norm), "param": param.tolist()}


def shard_empty_tensor(rank: int, kind: str) -> float:
    """The largest of no elements is none."""
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(0))]
    clip_grad = dict(max_norm=1.0, norm_type="inf")
    optimizer = fusedopt.ZeroRedundancyOptimizer(params, kind, lr=0.1, clip_grad=clip_grad)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    return float(optimizer.last_step.grad_norm)


def shard_half(rank: int, kind: str) -> dict[str, Any]:
    """State that is half there in one share is refused in all, and what it says of no parameter is dropped."""

    def make() -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(torch.full((4,), index + 1.0)) for index in range(4)]
        settings = SETTINGS[kind.removeprefix("Fused")]
        optimizer = fusedopt.ZeroRedundancyOptimizer(params, kind, **settings)
        for param in params:
            param.grad = torch.ones(4)
        optimizer.step()
        return params, optimizer

    params, optimizer = make()
    key = "momentum_buffer" if kind == "FusedSGD" else "exp_avg"
    everybodys = [copy.deepcopy(optimizer.state_dict())]
    dist.broadcast_object_list(everybodys, src=0)
    (saved,) = everybodys
    broken = copy.deepcopy(saved)
    broken["state"][2]["other"] = broken["state"][2].pop(key)
    values = [param.tolist() for param in params]
    before = repr([optimizer.optim.state_dict(), optimizer.param_groups])
    refused = ""
    try:
        optimizer.load_state_dict(broken)
    except ValueError as error:
        refused = str(error)
    assert repr([optimizer.optim.state_dict(), optimizer.param_groups]) == before
    assert [param.tolist() for param in params] == values
    for index in (0, 1, 2):
        del saved["state"][index]
    optimizer.load_state_dict(saved)
    kept = sum(key in state for state in optimizer.optim.state.values())
    return {"refused": refused, "kept": kept}


def overflow(rank: int, cfg: dict[str, Any]) -> dict[str, Any]:
    """The gradients of one process overflow in the second of three iterations."""
    model = DistributedDataParallel(make_model())
    wrapper = build_optim_wrapper(model, dict(type="AmpOptimWrapper", dtype="float64", optimizer=cfg))
    outcome: dict[str, Any] = {"skipped": [], "scales": [], "moved": []}
    for index, batch in enumerate(batches(rank)[:3]):
        before = parameters_of(model)
        train(model, wrapper, [batch * float("inf") if index == 1 and rank == 1 else batch])
        outcome["skipped"].append(bool(wrapper.step_was_skipped))
        outcome["scales"].append(float(wrapper.loss_scale))
        outcome["moved"].append(not all(map(torch.equal, before, parameters_of(model))))
    return {**outcome, "parameters": parameters_of(model)}


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants a GPU
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp_overflow(rank: int, kind: str, stock: bool = False, **settings) -> dict[str, Any]:
    """As :func:`overflow`, with torch's scaler for shards or its ``stock`` one; the shard of one process overflows."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    model = fully_sharded(make_model())
    optimizer = fusedopt.OPTIMIZERS.build({**optimizer_cfg(kind), **settings}, model.parameters())
    scaler = (torch.amp.GradScaler if stock else ShardedGradScaler)("cpu", init_scale=8.0)
    outcome: dict[str, Any] = {"scales": [], "moved": []}
    for index, batch in enumerate(batches(rank)[:3]):
        before = parameters_of(model)
        optimizer.zero_grad()
        scaler.scale((model(batch[:, :4]) - batch[:, 4:]).square().mean()).backward()
        if index == 1 and rank == 1:
            next(param.grad for param in model.parameters() if param.numel()).fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        outcome["scales"].append(scaler.get_scale())
        outcome["moved"].append(not all(map(torch.equal, before, parameters_of(model))))
    with model.summon_full_params(model):
        outcome["parameters"] = parameters_of(model)
    return outcome


def fsdp_average(rank: int) -> dict[str, Any]:
    """An average that was made before the model was sharded."""
    model = make_model()
    average = ExponentialMovingAverage(model, 0.25)
    sharded = fully_sharded(model)
    refused = ""
    try:
        average.update_parameters(sharded)
    except ValueError as error:
        refused = str(error)
    with sharded.summon_full_params(sharded):
        average.update_parameters(sharded)
        with torch.no_grad():
            for param in sharded.parameters():
                param.add_(1.0)
        average.update_parameters(sharded)
    return {"refused": refused, "parameters": parameters_of(average)}


CLIP_INSIDE = dict(clip_grad=dict(max_norm=0.3))
SCENARIOS: dict[str, tuple[Callable[..., dict[str, Any]], tuple]] = {
    **{f"replicate-{kind}": (replicate, (kind,)) for kind in TYPES},
    **{f"shard-{kind}": (shard, (zero_cfg(kind), {})) for kind in TYPES},
    **{f"clip-inside-{kind}": (shard, (zero_cfg(kind, **CLIP_INSIDE), {})) for kind in TYPES},
    "clip-inside-l1": (shard, (zero_cfg("FusedSGD", clip_grad=dict(max_norm=0.5, norm_type=1)), {})),
    "clip-inside-inf": (shard, (zero_cfg("FusedSGD", clip_grad=dict(max_norm=0.05, norm_type="inf")), {})),
    "clip-inside-value": (shard, (zero_cfg("FusedSGD", clip_grad=dict(type="value", clip_value=0.02)), {})),
    "clip-in-wrapper": (shard, (zero_cfg("FusedAdamW"), CLIP_INSIDE)),
    "amp": (shard, (zero_cfg("FusedAdamW", **CLIP_INSIDE), dict(type="AmpOptimWrapper", dtype="float64"))),
    "groups": (shard, (zero_cfg("FusedAdamW"), dict(paramwise_cfg=dict(custom_keys={"2.": dict(lr_mult=0.1)})))),
    "nan": (shard_nan, ()),
    "closure": (shard_closure, ()),
    **{f"nothing-{kind}": (shard_nothing, (kind,)) for kind in ("SGD", "FusedSGD")},
    **{f"empty-{kind}": (shard_empty_tensor, (kind,)) for kind in ("SGD", "FusedSGD")},
    **{f"half-{kind}": (shard_half, (kind,)) for kind in ("FusedSGD", "FusedAdamW")},
    **{f"overflow-{kind}": (overflow, (optimizer_cfg(kind),)) for kind in TYPES},
    **{f"overflow-shard-{kind}": (overflow, (zero_cfg(kind),)) for kind in TYPES},
    **{f"fsdp-overflow-{kind}": (fsdp_overflow, (kind,)) for kind in TYPES},
    **{
        f"fsdp-overflow-clip-{backend}-{stock}": (
            functools.partial(fsdp_overflow, clip_grad=dict(max_norm=0.1), backend=backend),
            ("FusedAdamW", stock),
        )
        for backend in ("native", "reference")
        for stock in (False, True)
    },
    "fsdp-average": (fsdp_average, ()),
}


def run_all(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    outcomes = {name: function(rank, *arguments) for name, (function, arguments) in SCENARIOS.items()}
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each scenario gave in each process."""

    def make(folder: Path) -> None:
        torch.multiprocessing.spawn(run_all, (str(folder),), nprocs=WORLD)

    folder = once(tmp_path_factory, "test_distributed", make)
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return {name: [outcome[name] for outcome in by_rank] for name in SCENARIOS}


def assert_all_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


@pytest.mark.parametrize("kind", TYPES)
def test_ddp_reduces_gradients_only_where_a_step_follows(outcomes, kind):
    expected, _ = alone(optimizer_cfg(kind), accumulative_counts=ACCUMULATE)
    for outcome in outcomes[f"replicate-{kind}"]:
        assert outcome["reductions"] == [0, 0, 1, 1, 1, 2, 2, 3]
        assert_all_close(outcome["parameters"], expected)


@pytest.mark.parametrize("kind", TYPES)
def test_a_sharded_optimizer_is_the_whole_one(outcomes, kind):
    expected, _ = alone(optimizer_cfg(kind))
    shards = outcomes[f"shard-{kind}"]
    assert [shard["local"] for shard in shards] == [kind] * WORLD
    assert sum(shard["owned"] for shard in shards) == len(expected) and all(shard["owned"] for shard in shards)
    for shard in shards:
        assert_all_close(shard["parameters"], expected)


@pytest.mark.parametrize(
    ("scenario", "kind", "clip_grad"),
    [
        *((f"clip-inside-{kind}", kind, dict(max_norm=0.3)) for kind in TYPES),
        ("clip-inside-l1", "FusedSGD", dict(max_norm=0.5, norm_type=1)),
        ("clip-inside-inf", "FusedSGD", dict(max_norm=0.05, norm_type="inf")),
        ("clip-in-wrapper", "FusedAdamW", dict(max_norm=0.3)),
        ("amp", "FusedAdamW", dict(max_norm=0.3)),
    ],
)
def test_clipping_uses_the_norm_over_all_processes(outcomes, scenario, kind, clip_grad):
    expected, wrapper = alone(optimizer_cfg(kind), clip_grad=clip_grad)
    assert float(wrapper.clip_coef) < 1
    for shard in outcomes[scenario]:
        assert_all_close(shard["parameters"], expected)
        torch.testing.assert_close(shard["grad_norm"].double(), wrapper.grad_norm.double(), rtol=1e-7, atol=0)
        torch.testing.assert_close(shard["clip_coef"].double(), wrapper.clip_coef.double(), rtol=1e-6, atol=0)
        assert shard["clip_grad"] == wrapper.clip_grad


def test_clipping_by_value_needs_no_norm(outcomes):
    expected, _ = alone(optimizer_cfg("FusedSGD"), clip_grad=dict(type="value", clip_value=0.02))
    for shard in outcomes["clip-inside-value"]:
        assert_all_close(shard["parameters"], expected)
        assert shard["grad_norm"] is None


@pytest.mark.parametrize("scenario", [name for name, (function, _) in SCENARIOS.items() if function is shard])
def test_the_first_process_saves_the_whole_state_and_all_resume_from_it(outcomes, scenario):
    first, second = outcomes[scenario]
    assert set(first["saved"]["state"]) == {0, 1, 2, 3}
    assert "state" not in second["saved"]
    for shard in (first, second):
        assert all(map(torch.equal, shard["continued"], shard["resumed"]))


def test_a_whole_optimizer_loads_what_the_shards_saved(outcomes):
    for scenario, kind in (("shard-FusedAdamW", "AdamW"), ("shard-AdamW", "FusedAdamW"), ("shard-FusedSGD", "SGD")):
        first, _ = outcomes[scenario]
        params, _ = alone(optimizer_cfg(kind))
        optimizer = fusedopt.OPTIMIZERS.build(optimizer_cfg(kind), [nn.Parameter(param) for param in params])
        optimizer.load_state_dict(first["saved"])
        assert len(optimizer.state_dict()["state"]) == 4


def test_settings_of_groups_and_defaults_reach_the_wrapper(outcomes):
    for shard in outcomes["groups"]:
        assert shard["lr"] == {"base_lr": [0.02], "lr": [0.02, 0.02, pytest.approx(0.002), pytest.approx(0.002)]}
        assert shard["betas"] == (0.9, 0.999)


def test_a_nan_in_one_share_is_seen_by_all(outcomes):
    for outcome in outcomes["nan"]:
        assert len(outcome["norms"]) == 3 and all(norm != norm for norm in outcome["norms"].values())


def test_a_closure_and_a_share_of_nothing(outcomes):
    for outcome in outcomes["closure"]:
        assert outcome["loss"] == 4.0
        assert outcome["param"] == pytest.approx([0.95] * 4)
        assert "backend" not in outcome["keys"]


@pytest.mark.parametrize("kind", ["SGD", "FusedSGD"])
def test_norm_clipping_where_a_share_is_empty(outcomes, kind):
    shards = outcomes[f"nothing-{kind}"]
    assert sorted(shard["owned"] for shard in shards) == [0, 1]
    for shard in shards:
        assert shard["norm"] == 4.0
        assert shard["param"] == pytest.approx([1 - 0.1 * 2 / 4] * 4, abs=1e-5)


@pytest.mark.parametrize("kind", ["SGD", "FusedSGD"])
def test_the_inf_norm_takes_empty_tensors(outcomes, kind):
    assert outcomes[f"empty-{kind}"] == [2.0, 2.0]


def test_a_sharded_optimizers_state_holds_that_of_the_loss_scaler(outcomes):
    for shard in outcomes["amp"]:
        assert shard["saved"]["loss_scaler"]["scale"] == 65536


@pytest.mark.parametrize("kind", ["FusedSGD", "FusedAdamW"])
def test_half_a_state_is_refused_in_all_processes(outcomes, kind):
    key = "momentum_buffer" if kind == "FusedSGD" else "exp_avg"
    for outcome in outcomes[f"half-{kind}"]:
        assert f"(param_groups[0]['params'][2], shape (4,)) has no '{key}'" in outcome["refused"]
    assert sum(outcome["kept"] for outcome in outcomes[f"half-{kind}"]) == 1


@pytest.mark.parametrize("kind", [*TYPES, *(f"shard-{kind}" for kind in TYPES)])
def test_an_overflow_in_one_process_skips_the_step_in_all(outcomes, kind):
    first, second = outcomes[f"overflow-{kind}"]
    for outcome in (first, second):
        assert outcome["skipped"] == [False, True, False]
        assert outcome["scales"] == [65536, 32768, 32768]
        assert outcome["moved"] == [True, False, True]
    assert all(map(torch.equal, first["parameters"], second["parameters"]))


@pytest.mark.parametrize("kind", ["FusedSGD", "FusedAdamW"])
def test_an_overflow_in_one_shard_skips_the_step_in_all(outcomes, kind):
    """torch's own fused optimizers step in the processes that see no overflow."""
    expected = outcomes[f"fsdp-overflow-{kind.removeprefix('Fused')}"]
    for outcome, stock in zip(outcomes[f"fsdp-overflow-{kind}"], expected, strict=True):
        assert outcome["moved"] == stock["moved"] == [True, False, True]
        assert outcome["scales"] == stock["scales"] == [8.0, 4.0, 4.0]
        assert_all_close(outcome["parameters"], stock["parameters"])


@pytest.mark.parametrize("stock", [False, True], ids=["sharded scaler", "stock scaler"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_so_it_does_where_the_step_clips_and_is_given_the_flag(outcomes, backend, stock):
    """Each process is given what was found in its own shard."""
    for outcome in outcomes[f"fsdp-overflow-clip-{backend}-{stock}"]:
        assert outcome["moved"] == [True, False, True]
        assert outcome["scales"] == [8.0, 4.0, 4.0]


def test_an_average_takes_whole_parameters_and_refuses_shards(outcomes):
    for outcome in outcomes["fsdp-average"]:
        assert "in the model but" in outcome["refused"]
        assert_all_close(outcome["parameters"], [param + 0.25 for param in parameters_of(make_model())])


def test_the_registry_finds_it_without_an_import_by_the_user():
    code = (
        "import sys, fusedopt\n"
        "assert 'fusedopt.training.zero' not in sys.modules\n"
        "assert fusedopt.OPTIMIZERS.get('ZeroRedundancyOptimizer').__module__ == 'fusedopt.training.zero'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(optimizer_type="FusedAdamW", lrr=0.1), TypeError, r"'lrr' for FusedAdamW; did you mean 'lr'\?$"),
        (dict(optimizer_type="FusedAdamW", clip_gard={}), TypeError, r"did you mean 'clip_grad'\?$"),
        (dict(optimizer_typ="FusedAdamW"), TypeError, r"did you mean 'optimizer_type'\?$"),
        (dict(optimizer_type="FusedAdmW"), KeyError, r"did you mean 'FusedAdamW'\?"),
    ],
)
def test_misspelt_arguments_are_those_of_the_wrapped_optimizer(settings, error, message):
    with pytest.raises(error, match=message):
        fusedopt.OPTIMIZERS.build(dict(type="ZeroRedundancyOptimizer", **settings), [nn.Parameter(torch.ones(2))])
