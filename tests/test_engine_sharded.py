"""Sharded models in the Runner, with 2 and 4 processes: they train, save and resume as one process does."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_cases import Parts, PointNet, assert_same, config, loader, recorded, state_of, train
from once import once
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fusedopt import build_optim_wrapper, cli
from fusedopt.messages import is_dtensor, whole
from fusedopt.rules import NormClip
from fusedopt.training.averaging import ExponentialMovingAverage
from fusedopt.training.engine import CheckpointError, Hook, Runner
from fusedopt.training.sharding import gathered, has_shards
from fusedopt.training.wrappers.clipping import clip_norm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

#: Those with which a sharded model is trained.
OPTIMIZERS = ["AdamW", "FusedAdamW"]
# Gradients of parts, averaged, against those of the whole batch: the same sum in another order.
TOLERANCE = dict(rtol=1e-4, atol=1e-6)
SHARDS = dict(type="fully_shard", modules=["Linear"])
EPOCHS = 2


class Interrupted(Exception):
    pass


class Interrupt(Hook):
    """Ends a run within its second epoch and its second accumulation."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 6:
            raise Interrupted


class Norms(Hook):
    """Keeps the gradient norms."""

    def __init__(self):
        self.norms: list[Any] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.norms.append(runner.optim_wrapper.grad_norm)


class Read(Hook):
    """What is read of a checkpoint: weights and the optimizer's state, whole or only a process's shards."""

    def after_load_checkpoint(self, runner, checkpoint):
        state = checkpoint["optimizer"]["state"][0]["exp_avg"]
        self.kinds = [is_dtensor(value) for value in (state, *checkpoint["state_dict"].values())]


def cfg(folder: Path | str, processes: int, optimizer: str = "AdamW", **changes: Any) -> dict[str, Any]:
    """Batches of 8 in all, and nothing random in model and data."""
    quiet = dict(type="Points", size=40, noise=0.0)
    settings: dict[str, Any] = dict(
        model=dict(type="PointNet", dropout=0.0),
        train_dataloader={**loader(40, 8 // processes, shuffle=True), "dataset": quiet},
        val_dataloader={
            **loader(21, 4, shuffle=False),
            "dataset": dict(type="Points", size=21, noise=0.0),
        },
        train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        optim_wrapper=dict(optimizer=dict(type=optimizer, lr=1e-2), clip_grad=dict(max_norm=0.1)),
        launcher="pytorch" if processes > 1 else "none",
    )
    if processes > 1:
        settings["model_wrapper_cfg"] = SHARDS
    return config(folder, **{**settings, **changes})


def saving(**settings: Any) -> dict[str, Any]:
    return dict(checkpoint=dict(type="CheckpointHook", **settings))


EMA = dict(type="EMAHook", momentum=0.3)
ACCUMULATE = dict(
    optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2), accumulative_counts=4),
    custom_hooks=[EMA],
    model=dict(type="PointNet", dropout=0.3, batch_norm=True),
    randomness=dict(seed=0, diff_rank_seed=True),
)


def parts_of(runner: Runner) -> dict[str, Any]:
    """Whole tensors of everything that a checkpoint has."""
    state = state_of(runner)
    return gathered({**state, "weights": dict(state["weights"]), "average": average_of(runner)})


def rows_of(runner: Runner) -> list[str]:
    """The table of parameters, but for its last line, of the bytes that this process holds."""
    return runner.optim_wrapper.describe(runner.model).splitlines()[:-1]


def average_of(runner: Runner) -> dict[str, Any]:
    averages = [hook.ema_model for hook in runner.hooks if getattr(hook, "ema_model", None) is not None]
    return {} if not averages else dict(averages[0].state_dict())


# What runs in the processes -------------------------------------------------------------------------------------------


def plain(rank: int, folder: str, optimizer: str) -> dict[str, Any]:
    norms = Norms()
    runner = Runner.from_cfg({**cfg(folder, dist_world(), optimizer), "custom_hooks": [norms]})
    names = [name for name, _ in runner.model.named_parameters()]
    table = rows_of(runner)
    runner.train()
    return dict(
        names=names,
        table=table,
        norms=norms.norms,
        sharded=[is_dtensor(param) for param in runner.model.parameters()],
        local=[param._local_tensor.numel() for param in runner.model.parameters()],
        weights=dict(gathered(runner.bare_model.state_dict())),
        optimizer=gathered(runner.optim_wrapper.state_dict()),
        kind=type(runner.model).__name__,
    )


def dist_world() -> int:
    return int(os.environ["WORLD_SIZE"])


def trained(rank: int, folder: str, **changes: Any) -> dict[str, Any]:
    runner = train(cfg(folder, dist_world(), **changes))
    return dict(
        weights=dict(gathered(runner.bare_model.state_dict())),
        metrics=recorded(runner).metrics,
        average=gathered(average_of(runner)),
        # A validation leaves nothing gathered: the weights in use are those that the optimizer steps.
        sharded=all(map(is_dtensor, runner.model.parameters())),
    )


def policy(rank: int, folder: str) -> dict[str, Any]:
    """The dtypes of the weights in the forward pass, of the gradients that are reduced, and of the parameters."""
    seen = set()

    class See(PointNet):
        def forward(self, *args, **kwargs):
            seen.add(self.head.bias.dtype)
            return super().forward(*args, **kwargs)

    wrapper = dict(type="fully_shard", mp_policy=dict(param_dtype="bfloat16", reduce_dtype="float32"))
    torch.manual_seed(0)  # as the Runner's, for a model that is built in it
    runner = train(cfg(folder, dist_world(), model=See(dropout=0.0), model_wrapper_cfg=wrapper))
    return dict(
        forward=seen,
        own={param.dtype for param in runner.model.parameters()},
        weights=dict(gathered(runner.bare_model.state_dict())),
    )


def resumed(rank: int, folder: str, sharded: bool) -> dict[str, Any]:
    hooks = saving(by_epoch=False, interval=3, sharded=sharded)
    changes = {**ACCUMULATE, "default_hooks": hooks}
    straight = train(cfg(f"{folder}/straight", dist_world(), **changes))
    with contextlib.suppress(Interrupted):
        train(cfg(f"{folder}/resumed", dist_world(), **changes), Interrupt())
    torch.manual_seed(99)
    again = train(cfg(f"{folder}/resumed", dist_world(), resume=True, **changes))
    return dict(straight=parts_of(straight), resumed=parts_of(again), trained=len(recorded(again).losses))


def begun_unsharded(rank: int, folder: str) -> dict[str, Any]:
    """The gradients of an incomplete accumulation, when a run with DistributedDataParallel continues sharded."""
    changes = {**ACCUMULATE, "default_hooks": saving(by_epoch=False, interval=3)}
    with contextlib.suppress(Interrupted):
        train(cfg(folder, 2, **changes, model_wrapper_cfg=None), Interrupt())
    runner = Runner.from_cfg(cfg(folder, 2, **changes, resume=True))
    runner.load_or_resume()
    gradients = {name: param.grad for name, param in runner.model.named_parameters()}
    count = runner.optim_wrapper.inner_count
    return dict(gradients=gathered(gradients), sharded=has_shards(gradients.values()), count=count)


def scaled(rank: int, folder: str, fsdp1: bool, optimizer: str) -> dict[str, Any]:
    """Mixed precision in which the gradient of one process overflows, in the second of three iterations."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.manual_seed(0)
    model: nn.Module = nn.Linear(4, 4)
    if fsdp1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wants a GPU
            model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(model)
    settings = dict(type="AmpOptimWrapper", use_fsdp=True, loss_scale=dict(init_scale=8.0), dtype="float32")
    wrapper = build_optim_wrapper(model, {**settings, "optimizer": dict(type=optimizer, lr=0.1)})
    outcome: dict[str, Any] = dict(scales=[], moved=[], skipped=[], scaler=type(wrapper.loss_scaler).__name__)
    local = [param for param in model.parameters() if param.numel()]
    for index in range(3):
        before = [whole(param).detach().clone() for param in local]
        with wrapper.optim_context(model):
            loss = model(torch.full((2, 4), rank + 1.0)).square().mean()
        wrapper.backward(loss)
        if index == 1 and rank == 1:
            grad = local[0].grad
            (grad if fsdp1 else grad._local_tensor).fill_(float("inf"))
        wrapper.step()
        wrapper.zero_grad()
        after = [whole(param).detach() for param in local]
        outcome["moved"].append(not all(map(torch.equal, before, after)))
        outcome["skipped"].append(bool(wrapper.step_was_skipped))
        outcome["scales"].append(float(wrapper.loss_scale))
    wrapper.load_state_dict(wrapper.state_dict())
    return outcome


def clipped(rank: int, folder: str) -> dict[str, Any]:
    """Norms of DTensors on two meshes with a plain tensor beside; FSDP1's shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    meshes = [init_device_mesh("cpu", (2,), mesh_dim_names=("a",)), init_device_mesh("cpu", (1, 2))]
    outcome: dict[str, Any] = {}
    for norm_type in (2.0, 1.0, float("inf")):
        params = [
            nn.Parameter(distribute_tensor(torch.zeros(3), meshes[0], [Shard(0)])),
            nn.Parameter(distribute_tensor(torch.zeros(5), meshes[1], [Replicate(), Shard(0)])),
            nn.Parameter(torch.zeros(2)),
        ]
        values = [torch.arange(1.0, 4), torch.arange(1.0, 6), torch.arange(1.0, 3)]
        params[0].grad = distribute_tensor(values[0], meshes[0], [Shard(0)])
        params[1].grad = distribute_tensor(values[1], meshes[1], [Replicate(), Shard(0)])
        params[2].grad = values[2].clone()
        norm = clip_norm(params, NormClip(max_norm=1.0, norm_type=norm_type))
        outcome[str(norm_type)] = norm, [whole(param.grad).clone() for param in params]
    params[2].grad.fill_(float("nan"))
    with contextlib.suppress(RuntimeError):
        clip_norm(params, NormClip(max_norm=1.0, error_if_nonfinite=True))
        outcome["missed"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants a GPU
        model = FullyShardedDataParallel(nn.Linear(4, 4), use_orig_params=True, device_id=torch.device("cpu"))
    try:
        build_optim_wrapper(model, dict(optimizer=dict(type="AdamW", lr=0.1), clip_grad=dict(max_norm=1.0)))
    except ValueError as error:
        outcome["refused"] = str(error)
    return outcome


def made_equal(rank: int, folder: str) -> dict[str, Any]:
    """Models with weights and buffers of their own in each process."""
    torch.manual_seed(rank)
    model = PointNet(batch_norm=True)
    model.backbone[1].running_mean.fill_(rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runner = Runner.from_cfg(cfg(folder, dist_world(), model=model))
    return dict(before=before, after=dict(gathered(runner.bare_model.state_dict())))


def average(rank: int, folder: str) -> dict[str, Any]:
    """What an average of a sharded model refuses, and one in another dtype."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model, early = nn.Linear(4, 4).bfloat16(), None
    early = ExponentialMovingAverage(model, 0.25, dtype="float32")
    fully_shard(model)
    late = ExponentialMovingAverage(model, 0.25, dtype="float32")
    late.update_parameters(model)
    before = [whole(param).detach().clone() for param in model.parameters()]
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    late.update_parameters(model)
    refused = []
    for call in (
        lambda: early.update_parameters(model),
        lambda: ExponentialMovingAverage(model, device="cpu"),
        lambda: late(torch.ones(2, 4)),
    ):
        try:
            call()
        except (ValueError, RuntimeError) as error:
            refused.append(str(error))
    with late.applied_to(model):
        applied = [whole(param).detach().clone() for param in model.parameters()]
    return dict(
        refused=refused,
        before=before,
        applied=applied,
        averaged=[whole(param).detach() for param in late.module.parameters()],
        own=[whole(param).detach() for param in model.parameters()],
    )


class Planted:
    """What a pickle of it does is to make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Attending(PointNet):
    """With modules whose parameters are used without a call, and with one in a wrapper."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.wrapped = checkpoint_wrapper(nn.Linear(4, 4))

    def forward(self, inputs, labels, mode="tensor"):
        mixed, _ = self.attention(*(3 * [inputs[:, None]]), need_weights=False)
        return super().forward(inputs + self.wrapped(mixed[:, 0]), labels, mode)


class Tied(PointNet):
    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(8, 3)
        self.twin.weight = self.head.weight


class Scalar(PointNet):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))


class Listed(PointNet):
    def __init__(self):
        super().__init__()
        self.more = nn.ModuleList([nn.Linear(2, 2)])


#: Mistakes in a config, with what the error says; in all of them nothing is changed.
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], str]] = {
    "argument": (dict(module=["Linear"]), PointNet, "fully_shard has no argument 'module'; did you mean 'modules'?"),
    "module": (
        dict(modules=["Liner"]),
        PointNet,
        "modules='Liner' matches no module of the model; did you mean 'Linear'?",
    ),
    "no parameters": (dict(modules=["ReLU"]), PointNet, "matches only modules without parameters: backbone.2"),
    "list": (dict(modules=["more"]), Listed, "'more', a ModuleList, which has no forward pass"),
    "modules": (dict(modules=[3]), PointNet, "modules must be a list of classes"),
    "size": (dict(min_num_params=0), PointNet, "min_num_params"),
    "policy": (dict(mp_policy=dict(param_type="bfloat16")), PointNet, "did you mean 'param_dtype'?"),
    "dtype": (dict(mp_policy=dict(param_dtype="bf16")), PointNet, "Invalid dtype: 'bf16'"),
    "reshard": (
        dict(reshard_after_forward="yes"),
        PointNet,
        "reshard_after_forward must be True, False, an int or None",
    ),
    "offload": (dict(cpu_offload="no"), PointNet, "cpu_offload must be True or False"),
    "mesh": (dict(mesh=dict(shape=(1, 2))), PointNet, "mesh has the unknown key 'shape'; did you mean 'mesh_shape'?"),
    "mesh shape": (dict(mesh=dict(mesh_shape=(2, 2))), PointNet, "(2, 2) needs 4 processes, but there are 2"),
    "mesh names": (dict(mesh=dict(mesh_shape=(1, 2), mesh_dim_names=["a"])), PointNet, "must be 2 different names"),
    "tied": (dict(modules=["head"]), Tied, "'head.weight' and 'twin.weight' are one parameter, but would be gathered"),
    "scalar": (dict(), Scalar, "parameter 'scale' has no dimension to shard"),
    "later": (dict(modules=["Linear"]), PointNet, "Invalid lr"),
    "fsdp1": (dict(type="MMFullyShardedDataParallel"), PointNet, "use model_wrapper_cfg=dict(type='fully_shard')"),
    "fsdp1 path": (dict(type="torch.distributed.fsdp.FullyShardedDataParallel"), PointNet, "which is FSDP2"),
}


def mistakes(rank: int, folder: str) -> dict[str, Any]:
    outcome = {}
    for name, (settings, make, _) in MISTAKES.items():
        torch.manual_seed(0)
        model = make()
        wrapper = {"type": "fully_shard", **settings}
        # The last one comes after the model is sharded.
        optimizer = dict(type="FusedAdamW", lr=-1.0 if name == "later" else 1e-2)
        before = dict(model.named_parameters()), {key: value.clone() for key, value in model.state_dict().items()}
        try:
            Runner.from_cfg(
                cfg(folder, 2, model=model, model_wrapper_cfg=wrapper, optim_wrapper=dict(optimizer=optimizer))
            )
        except Exception as error:
            after = dict(model.named_parameters())
            intact = type(model) is make and all(after[key] is param for key, param in before[0].items())
            same = all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())
            works = bool(model(torch.ones(2, 4), None).isfinite().all())
            outcome[name] = str(error), intact and same and works
            if name == "later":  # the mistake is corrected
                model.backbone[3].p = 0.0
                runner = Runner.from_cfg(cfg(folder, 2, model=model))
                runner.train()
                outcome["corrected"] = dict(gathered(runner.bare_model.state_dict()))
    model = PointNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    try:
        Runner.from_cfg(cfg(folder, 2, model=model, optim_wrapper=dict(type="OptimWrapper", optimizer=optimizer)))
    except ValueError as error:
        outcome["optimizer"] = str(error), not any(map(is_dtensor, model.parameters()))
    model = torch_fully_shard(PointNet())
    try:
        Runner.from_cfg(cfg(folder, 2, model=model, model_wrapper_cfg=None))
    except ValueError as error:
        outcome["own"] = str(error)
    return outcome


def torch_fully_shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def resharded(rank: int, folder: str, source: str, **settings: Any) -> dict[str, Any]:
    """What a run of these processes has after it resumed what four wrote, from the folder and from the file."""
    outcome = {}
    for name in ("folder/epoch_1", "file/epoch_1.pth"):
        hooks = [EMA, read := Read()]
        changes = dict(resume=True, load_from=f"{source}/{name}", custom_hooks=hooks, **settings)
        runner = Runner.from_cfg(cfg(f"{folder}/{name}", dist_world(), **changes))
        runner.load_or_resume()
        outcome[name] = {**parts_of(runner), "read": read.kinds}
    return outcome


def failing(rank: int, folder: str) -> dict[str, Any]:
    """Saves in which one process cannot write its shards, and in which the main one cannot write the rest."""
    from torch.distributed.checkpoint import FileSystemWriter

    runner = Runner.from_cfg(cfg(folder, 2))
    runner.save_checkpoint(folder, "good", sharded=True)
    write, told = FileSystemWriter.write_data, []

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    def save(**settings: Any) -> None:
        try:
            runner.save_checkpoint(folder, "good", sharded=True, **settings)
        except CheckpointError as error:
            told.append(str(error))

    if rank == 1:
        FileSystemWriter.write_data = fail
    save()
    FileSystemWriter.write_data = write
    save(meta=dict(model=runner))
    save()
    return dict(told=told, left=sorted(path.name for path in Path(folder).iterdir()))


def killed(rank: int, folder: str) -> None:
    """The second process is killed while it writes its shards of the second checkpoint."""
    from torch.distributed.checkpoint import FileSystemWriter

    write, calls = FileSystemWriter.write_data, []

    def write_or_die(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args)

    if rank == 1:
        FileSystemWriter.write_data = write_or_die
    train(cfg(folder, 2, default_hooks=saving(interval=1, sharded=True)))


def four(rank: int, folder: str) -> dict[str, Any]:
    """HSDP, which also writes for :func:`resharded`."""
    wrapper = {**SHARDS, "mesh": dict(mesh_shape=(2, 2))}
    hooks = dict(custom_hooks=[EMA], model_wrapper_cfg=wrapper)
    runner = train(cfg(f"{folder}/folder", 4, default_hooks=saving(interval=1, sharded=True), **hooks))
    train(cfg(f"{folder}/file", 4, default_hooks=saving(interval=1), **hooks))
    return dict(
        weights=dict(gathered(runner.bare_model.state_dict())),
        local=[param._local_tensor.numel() for param in runner.model.parameters()],
        placements=str(next(runner.model.parameters()).placements),
    )


KEEP = dict(interval=1, max_keep_ckpts=1, save_best="accuracy", sharded=True, published_keys=["state_dict"])
SCENARIOS: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    **{f"plain-{optimizer}": (plain, dict(optimizer=optimizer)) for optimizer in OPTIMIZERS},
    "begun_unsharded": (begun_unsharded, {}),
    "file": (resumed, dict(sharded=False)),
    "folder": (resumed, dict(sharded=True)),
    "ema": (trained, dict(custom_hooks=[EMA], default_hooks=saving(**KEEP))),
    # Without modules to be gathered by themselves, a forward pass leaves the parameters gathered.
    "gathered": (
        trained,
        dict(
            custom_hooks=[EMA],
            default_hooks=dict(checkpoint=None),
            model_wrapper_cfg=dict(type="fully_shard"),
        ),
    ),
    "offload": (trained, dict(model_wrapper_cfg=dict(type="fully_shard", min_num_params=20, cpu_offload=True))),
    "attention": (
        trained,
        dict(
            model=dict(type=Attending, dropout=0.0),
            model_wrapper_cfg=dict(type="fully_shard", modules="Linear", min_num_params=20),
        ),
    ),
    "parts": (
        trained,
        dict(
            model=dict(type=Parts, dropout=0.0),
            optim_wrapper=dict(
                constructor="MultiOptimWrapperConstructor",
                backbone=dict(optimizer=dict(type="AdamW", lr=1e-2)),
                head=dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
            ),
            default_hooks=saving(interval=1),
        ),
    ),
    "policy": (policy, {}),
    "scaled-fsdp1": (scaled, dict(fsdp1=True, optimizer="SGD")),
    **{f"scaled-{optimizer}": (scaled, dict(fsdp1=False, optimizer=optimizer)) for optimizer in OPTIMIZERS},
    "clipped": (clipped, {}),
    "made_equal": (made_equal, {}),
    "average": (average, {}),
    "mistakes": (mistakes, {}),
    "failing": (failing, {}),
}


def main(folder: str, source: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    if dist_world() == 4:
        outcomes = {"four": four(rank, folder)}
    elif dist_world() == 1:
        one = dict(launcher="pytorch", model_wrapper_cfg=SHARDS)
        outcomes = {**trained(rank, folder, **one), **resharded(rank, folder, source, **one)}
    elif source == "killed":
        killed(rank, folder)
    else:
        SCENARIOS["resharded"] = resharded, dict(source=source)
        outcomes = {name: function(rank, f"{folder}/{name}", **rest) for name, (function, rest) in SCENARIOS.items()}
    torch.save(outcomes, f"{folder}/{rank}.pt")


def start(folder: Path, processes: int, source: Path | str = "") -> None:
    """Let processes run, and leave what each has in a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    result = subprocess.run(
        [*command, __file__, str(folder), str(source)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def read(folder: Path, processes: int) -> list[dict[str, Any]]:
    """What each process has left, by rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


@pytest.fixture(scope="module")
def by_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder where four processes have run, and what each has."""
    folder = once(tmp_path_factory, "engine_by_four", lambda folder: start(folder, 4))
    return folder, [outcome["four"] for outcome in read(folder, 4)]


@pytest.fixture(scope="module")
def by_two(by_four, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder where two processes have run every scenario, and what each scenario gave in each process."""
    folder = once(tmp_path_factory, "engine_by_two", lambda folder: start(folder, 2, by_four[0]))
    by_rank = read(folder, 2)
    return folder, {name: [outcome[name] for outcome in by_rank] for name in by_rank[0]}


@pytest.fixture(scope="module")
def outcomes(by_two) -> dict[str, list[dict[str, Any]]]:
    return by_two[1]


def assert_close(actual: dict[str, Any], expected: dict[str, Any], **tolerance: float) -> None:
    assert list(actual) == list(expected)
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], **(tolerance or TOLERANCE), msg=lambda told, n=name: f"{n}: {told}"
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sharded_model_trains_as_a_whole_one(outcomes, tmp_path, optimizer):
    alone = Runner.from_cfg({**cfg(tmp_path, 1, optimizer), "custom_hooks": [norms := Norms()]})
    names, table = [name for name, _ in alone.model.named_parameters()], rows_of(alone)
    alone.train()
    first, second = outcomes[f"plain-{optimizer}"]
    assert_same(first["weights"], second["weights"])
    assert_close(first["weights"], alone.model.state_dict())
    for outcome in (first, second):
        assert all(outcome["sharded"]) and outcome["kind"] == "FSDPPointNet"
        assert outcome["names"] == names and outcome["table"] == table
        for norm, expected in zip(outcome["norms"], norms.norms, strict=True):
            assert type(norm) is torch.Tensor, "a DTensor would have to be gathered when it is logged"
            torch.testing.assert_close(norm, expected, **TOLERANCE)
    whole_numbers = [param.numel() for param in alone.model.parameters()]
    assert [one + other for one, other in zip(first["local"], second["local"], strict=True)] == whole_numbers
    assert max(first["local"]) == max(whole_numbers) / 2


def test_half_as_many_shards_in_two_replicas_each(by_four, tmp_path):
    alone = train(cfg(tmp_path, 1))
    _, (first, *others) = by_four
    assert "Replicate" in first["placements"] and "Shard(dim=0)" in first["placements"]
    assert_close(first["weights"], alone.model.state_dict())
    for other in others:
        assert_same(first["weights"], other["weights"])
    assert max(first["local"]) == max(param.numel() for param in alone.model.parameters()) / 2


@pytest.mark.parametrize("scenario", ["offload", "attention", "parts"])
def test_other_ways_to_shard_train_as_one_process(outcomes, tmp_path, scenario):
    changes = {key: value for key, value in SCENARIOS[scenario][1].items() if key != "model_wrapper_cfg"}
    alone = train(cfg(tmp_path, 1, **changes))
    for outcome in outcomes[scenario]:
        assert outcome["sharded"]
        assert_close(outcome["weights"], alone.model.state_dict())
        assert outcome["metrics"] == recorded(alone).metrics


@pytest.mark.parametrize("scenario", ["ema", "gathered"])
def test_averages_are_those_of_one_process_and_leave_the_training_alone(outcomes, tmp_path, scenario):
    alone = train(cfg(tmp_path, 1, custom_hooks=[EMA]))
    without = train(cfg(tmp_path / "without", 1))
    for outcome in outcomes[scenario]:
        assert_close(outcome["average"], average_of(alone))
        assert outcome["metrics"] == recorded(alone).metrics != recorded(without).metrics
        assert_close(outcome["weights"], without.model.state_dict())
        assert outcome["sharded"]


def test_parameters_keep_their_dtype_when_others_compute(outcomes, tmp_path):
    alone = train(cfg(tmp_path, 1))
    for outcome in outcomes["policy"]:
        assert outcome["forward"] == {torch.bfloat16} and outcome["own"] == {torch.float32}
        assert_close(outcome["weights"], alone.model.state_dict(), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("scenario", ["file", "folder"])
def test_a_resumed_run_is_the_uninterrupted_one(by_two, outcomes, scenario):
    """In the middle of an accumulation, with an average, BatchNorm and dropout of each process."""
    for outcome in outcomes[scenario]:
        assert 0 < outcome["trained"] < 10
        assert_same(outcome["resumed"], outcome["straight"])
    middle = by_two[0] / scenario / "resumed" / "iter_6"
    path = middle / "checkpoint.pth" if scenario == "folder" else middle.with_suffix(".pth")
    assert len(torch.load(path, weights_only=True)["gradients"]) == 6


@pytest.mark.parametrize("scenario", ["file", "folder"])
def test_one_process_continues_the_accumulation_of_two(by_two, tmp_path, scenario):
    folder = by_two[0]
    path = folder / scenario / "resumed" / ("iter_6.pth" if scenario == "file" else "iter_6")
    runner = Runner.from_cfg(cfg(tmp_path, 1, **ACCUMULATE, resume=True, load_from=str(path)))
    runner.load_or_resume()
    saved = torch.load(folder / "file" / "resumed" / "iter_6.pth", weights_only=True)
    assert len(saved["gradients"]) == 6 and runner.optim_wrapper.inner_count == 6
    assert_same({name: param.grad for name, param in runner.model.named_parameters()}, saved["gradients"])


def test_an_accumulation_that_was_begun_unsharded_is_continued(by_two, outcomes):
    saved = torch.load(by_two[0] / "begun_unsharded" / "iter_6.pth", weights_only=True)
    first, second = (process["gradients"] for process in saved["processes"])
    assert len(first) == 6 and "gradients" not in saved
    for outcome in outcomes["begun_unsharded"]:
        assert outcome["sharded"] and outcome["count"] == 6
        assert_close(outcome["gradients"], {name: (first[name] + second[name]) / 2 for name in first})


@pytest.mark.parametrize("name", ["folder/epoch_1", "file/epoch_1.pth"])
def test_four_then_two_then_one_process_have_the_same_state(by_four, outcomes, tmp_path, name):
    source, _ = by_four
    saved = torch.load(source / "file" / "epoch_1.pth", weights_only=True)
    alone = Runner.from_cfg(cfg(tmp_path, 1, resume=True, load_from=str(source / name), custom_hooks=[EMA]))
    alone.load_or_resume()
    for state in (parts_of(alone), *(outcome[name] for outcome in outcomes["resharded"])):
        assert_same(state["optimizer"]["state"], saved["optimizer"]["state"])
        own = {name.removeprefix("module."): value for name, value in saved["ema_state_dict"].items()}
        assert_same(state["weights"], {name: own[name] for name in state["weights"]})
        assert_same(
            {name.removeprefix("module."): value for name, value in state["average"].items() if name != "steps"},
            dict(saved["state_dict"]),
        )
        assert state["place"][:2] == (1, 5)
    for outcome in outcomes["resharded"]:
        assert set(outcome[name]["read"]) == {name == "folder/epoch_1"}
    alone.train()


@pytest.mark.parametrize("name", ["folder/epoch_2", "file/epoch_2.pth"])
def test_weights_alone_are_loaded_from_both(by_four, tmp_path, name):
    source, _ = by_four
    runner = Runner.from_cfg(cfg(tmp_path, 1, load_from=str(source / name)))
    runner.load_or_resume()
    saved = torch.load(source / "file" / "epoch_2.pth", weights_only=True)
    assert_same(dict(runner.model.state_dict()), dict(saved["state_dict"]))


def test_convert_makes_a_file_of_a_folder(by_four, tmp_path, capsys):
    source, _ = by_four
    assert cli.main(["convert", str(source / "folder" / "epoch_2"), str(tmp_path / "weights.pth")]) == 0
    assert "4 weights from its 'state_dict'; left out: " in capsys.readouterr().out
    saved = torch.load(source / "file" / "epoch_2.pth", weights_only=True)
    assert_same(dict(torch.load(tmp_path / "weights.pth", weights_only=True)), dict(saved["state_dict"]))


def test_shards_of_several_optimizers_resume_in_one_process(by_two, tmp_path):
    folder, _ = by_two
    parts = SCENARIOS["parts"][1]
    runner = Runner.from_cfg(cfg(tmp_path, 1, **parts, resume=True, load_from=str(folder / "parts" / "epoch_1.pth")))
    runner.load_or_resume()
    runner.train()
    assert runner.epoch == EPOCHS


def test_old_folders_are_removed_and_the_last_and_best_kept(by_two):
    folder = by_two[0] / "ema"
    kept = sorted(path.name for path in folder.iterdir() if "_202" not in path.name)
    assert [name for name in kept if not name.startswith("best")] == [
        "epoch_2",
        next(name for name in kept if name.startswith("epoch_2-")),
        "last_checkpoint",
        "vis_data",
    ]
    best = [name for name in kept if name.startswith("best_accuracy_epoch_")]
    assert len([name for name in best if (folder / name).is_dir()]) == 1
    published = torch.load(next(folder.glob("epoch_2-*.pth")), weights_only=True)
    assert set(published) == {"state_dict"} and all(map(torch.is_tensor, published["state_dict"].values()))


def test_nothing_in_a_folder_is_run(by_two, tmp_path):
    """Other programs read torch's .metadata, a pickle, and so it is no part of what a Runner reads."""
    folder = by_two[0] / "folder" / "straight" / "iter_3"
    planted, ran = pickle.dumps(Planted(tmp_path / "ran")), tmp_path / "ran"
    pickle.loads(planted)
    ran.unlink()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(planted if path.name == ".metadata" else path.read_bytes())
    runner = Runner.from_cfg(cfg(tmp_path / "run", 1, model=ACCUMULATE["model"], load_from=str(tmp_path)))
    runner.load_or_resume()
    assert not ran.exists()


def lose_a_chunk(shards: dict[str, Any]) -> None:
    shards["state_dict/head.weight"]["chunks"].pop()


def name_a_file_elsewhere(shards: dict[str, Any]) -> None:
    shards["state_dict/head.weight"]["chunks"][0]["file"] = "../__0_0.distcp"


def put_it_elsewhere(shards: dict[str, Any]) -> None:
    shards["state_dict/head.weight"]["place"] = ["meta", "epoch"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose_a_chunk, r"the chunks of 'state_dict/head.weight' do not make up its shape \(3, 8\)"),
        (name_a_file_elsewhere, r"'\.\./__0_0\.distcp', which is not a file of the folder"),
        (put_it_elsewhere, "there is a value in the place"),
        (dict.clear, "does not fit the model|no weights"),
        ("__1_0.distcp", "No such file"),
        ("checkpoint.pth", "is not a file"),
    ],
)
def test_a_damaged_folder_is_refused(by_two, tmp_path, damage, told):
    folder = by_two[0] / "folder" / "straight" / "iter_3"
    copied = tmp_path / "copied"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    if isinstance(damage, str):
        (copied / damage).unlink()
    else:
        rest = torch.load(copied / "checkpoint.pth", weights_only=True)
        damage(rest["shards"])
        torch.save(rest, copied / "checkpoint.pth")
    changes = {**ACCUMULATE, "resume": True, "load_from": str(copied)}
    runner = Runner.from_cfg(cfg(tmp_path, 1, **changes))
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=told):
        runner.load_or_resume()
    assert_same(dict(runner.model.state_dict()), before)


@pytest.mark.parametrize("scenario", ["scaled-fsdp1", *(f"scaled-{optimizer}" for optimizer in OPTIMIZERS)])
def test_an_overflow_in_one_shard_skips_the_step_in_all(outcomes, scenario):
    for outcome in outcomes[scenario]:
        assert outcome["moved"] == [True, False, True] and outcome["skipped"] == [False, True, False]
        assert outcome["scales"] == [8.0, 4.0, 4.0]
        assert outcome["scaler"] == ("ShardedGradScaler" if scenario == "scaled-fsdp1" else "GradScaler")


def test_norms_over_several_meshes_and_plain_tensors(outcomes):
    values = [torch.arange(1.0, 4), torch.arange(1.0, 6), torch.arange(1.0, 3)]
    for outcome in outcomes["clipped"]:
        for norm_type in (2.0, 1.0, float("inf")):
            norm, grads = outcome[str(norm_type)]
            expected = torch.linalg.vector_norm(torch.cat(values), norm_type)
            assert type(norm) is torch.Tensor
            torch.testing.assert_close(norm, expected)
            torch.testing.assert_close(grads, [value / expected for value in values], rtol=1e-5, atol=0)
        assert "missed" not in outcome
        assert "is a shard of a FullyShardedDataParallel model" in outcome["refused"]


def test_all_processes_begin_with_the_weights_of_the_first(outcomes):
    first, second = outcomes["made_equal"]
    assert_same(first["after"], first["before"])
    assert_same(second["after"], first["before"])
    assert not torch.equal(second["before"]["head.weight"], first["before"]["head.weight"])


def test_averages_of_shards(outcomes):
    for outcome in outcomes["average"]:
        pairs = zip(outcome["before"], outcome["own"], strict=True)
        torch.testing.assert_close(outcome["averaged"], [0.75 * old.float() + 0.25 * new.float() for old, new in pairs])
        torch.testing.assert_close(outcome["applied"], [value.bfloat16() for value in outcome["averaged"]])
        early, device, called = outcome["refused"]
        assert "'weight' is sharded as" in early and "make the average after the model is sharded" in early
        assert "device='cpu' cannot be set" in device
        assert "with average.applied_to(model)" in called


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_and_change_nothing(outcomes, name):
    for outcome in outcomes["mistakes"]:
        told, intact = outcome[name]
        assert MISTAKES[name][2] in told
        assert intact


def test_a_model_can_be_sharded_again_after_a_mistake(outcomes, tmp_path):
    torch.manual_seed(0)
    alone = train(cfg(tmp_path, 1, model=PointNet(dropout=0.0)))
    for outcome in outcomes["mistakes"]:
        assert_close(outcome["corrected"], alone.model.state_dict())


def test_what_killed_processes_leave_is_removed_or_completed(tmp_path):
    train(cfg(tmp_path, 1, default_hooks=saving(interval=1, sharded=True)))
    (tmp_path / "epoch_9.unfinished").mkdir()
    (tmp_path / "epoch_7.removed.unfinished").mkdir()
    # Between two renames: the old folder is moved away, and the new one not yet in its place.
    (tmp_path / "epoch_2").rename(tmp_path / "epoch_2.replaced.unfinished")
    runner = Runner.from_cfg(cfg(tmp_path, 1, resume=True, train_cfg=dict(by_epoch=True, max_epochs=3)))
    runner.load_or_resume()
    assert runner.epoch == 2
    train(cfg(tmp_path, 1, resume=True, train_cfg=dict(by_epoch=True, max_epochs=2)))
    assert sorted(path.name for path in tmp_path.glob("epoch_*")) == ["epoch_1", "epoch_2"]


def test_an_optimizer_of_the_unsharded_parameters_is_refused(outcomes):
    for outcome in outcomes["mistakes"]:
        told, intact = outcome["optimizer"]
        assert "the optimizer has parameters that the model no longer has" in told and intact


def test_a_model_that_was_sharded_elsewhere_is_refused(outcomes):
    for outcome in outcomes["mistakes"]:
        assert "FSDPPointNet is sharded already" in outcome["own"]


def test_one_process_with_a_launcher_trains_and_resumes_as_one_without(by_four, tmp_path):
    source, _ = by_four
    start(tmp_path, 1, source)
    (outcome,) = read(tmp_path, 1)
    alone = train(cfg(tmp_path / "alone", 1))
    assert outcome["sharded"] and outcome["metrics"] == recorded(alone).metrics
    assert_close(outcome["weights"], alone.model.state_dict())
    saved = torch.load(source / "file" / "epoch_1.pth", weights_only=True)
    for name in ("folder/epoch_1", "file/epoch_1.pth"):
        assert_same(outcome[name]["optimizer"]["state"], saved["optimizer"]["state"])


def test_a_wrapper_without_processes_is_checked_all_the_same(tmp_path):
    with pytest.raises(ValueError, match="modules='Liner' matches no module"):
        Runner.from_cfg(cfg(tmp_path, 1, model_wrapper_cfg=dict(type="fully_shard", modules=["Liner"])))
    runner = Runner.from_cfg(cfg(tmp_path, 1, model_wrapper_cfg=SHARDS))
    assert type(runner.model) is PointNet


def test_a_save_that_fails_in_one_process_fails_in_all_and_keeps_the_former_checkpoint(outcomes):
    for outcome in outcomes["failing"]:
        first, second = outcome["told"]
        assert "good cannot be written and is unchanged" in first and "no space left" in first
        assert "was not written: checkpoint['meta']['model'] (Runner)" in second
        assert outcome["left"] == ["good", "vis_data"] or outcome["left"] == ["good"]


def test_a_process_that_is_killed_in_a_save_leaves_the_former_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    environment = {**os.environ, **address, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path), "killed"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == -signal.SIGKILL, told[1]
    assert processes[0].returncode == 1 and "epoch_2 cannot be written and is unchanged" in told[0]
    assert not (tmp_path / "epoch_2").exists()
    assert (tmp_path / "last_checkpoint").read_text() == str(tmp_path / "epoch_1")
    (tmp_path / "epoch_2.unfinished").mkdir(exist_ok=True)  # if the first process is killed as well
    runner = train(cfg(tmp_path, 1, resume=True, default_hooks=saving(interval=1, sharded=True)))
    assert min(recorded(runner).losses) == 5 and runner.epoch == EPOCHS
    assert (tmp_path / "epoch_2").is_dir() and not list(tmp_path.glob("*.unfinished"))


if __name__ == "__main__":
    main(*sys.argv[1:])
