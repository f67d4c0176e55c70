"""accelerate in two processes: DistributedDataParallel, and FSDP2, where the step asks the other one for the norm."""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

import fusedopt

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'fusedopt[accelerate]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

STEPS, OVERFLOW = 8, 3
KINDS = ["ddp", "fsdp2"]
PRECISIONS = ["no", "fp16"]
CLIPS = ["norm", "report", "early", "part"]


def accelerator_of(kind: str, precision: str) -> Any:
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if kind == "fsdp2":  # as accelerate does it, but not on a CPU
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
        )
        assert accelerator.is_fsdp2
    if precision == "fp16":
        accelerator.state._mixed_precision = "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        accelerator.native_amp = True
    return accelerator


class Model(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().forward(x)


class Run:
    def __init__(self, fused: bool, kind: str, precision: str):
        from fusedopt.integrations.accelerate import fuse

        self.accelerator = accelerator_of(kind, precision)
        torch.manual_seed(0)
        model = Model(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        if fused:
            fuse(self.accelerator)
            optimizer: torch.optim.Optimizer = fusedopt.FusedAdamW(model.parameters(), lr=0.002, eps=1e-3)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, eps=1e-3, foreach=False)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.norms: list[float] = []
        self.skipped: list[bool] = []
        self.asked = 0

    def clip(self, how: str) -> Any:
        params = list(self.model.parameters())
        if how == "part":
            return self.accelerator.clip_grad_norm_(params[:2], 0.2)
        norm = self.accelerator.clip_grad_norm_(params, float("inf") if how == "report" else 0.2)
        return float(norm) if how == "early" else norm

    def train(self, how: str, steps: range = range(STEPS)) -> Run:
        inner = self.optimizer.optimizer
        for step in steps:
            for part in range(2):
                with self.accelerator.accumulate(self.model):
                    draw = torch.Generator().manual_seed(4 * step + 2 * part + dist.get_rank())
                    loss = self.model(torch.randn(4, 6, generator=draw)).square().mean()
                    if self.accelerator.scaler and (step, part, dist.get_rank()) == (OVERFLOW, 1, 1):
                        loss = loss * 1e38  # in one of the processes
                    self.accelerator.backward(loss)
                    norm = self.clip(how) if self.accelerator.sync_gradients else None
                    if norm is not None:
                        self.asked += getattr(getattr(inner, "_shared", None), "next", None) is not None
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            self.skipped.append(self.accelerator.optimizer_step_was_skipped)
        return self

    def result(self) -> dict[str, Any]:
        params = [param.full_tensor() if hasattr(param, "full_tensor") else param for param in self.model.parameters()]
        params = [param.detach().clone() for param in params]
        return dict(params=params, norms=self.norms, skipped=self.skipped, asked=self.asked)


def run(rank: int, folder: str) -> None:
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
    )
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timeout)
    results: dict[Any, Any] = {}
    for kind in KINDS:
        for precision in PRECISIONS:
            for how in CLIPS:
                for fused in (False, True):
                    try:
                        results[kind, precision, how, fused] = Run(fused, kind, precision).train(how).result()
                    except RuntimeError as error:
                        results[kind, precision, how, fused] = str(error)
            for fused in (False, True):
                checkpoint = f"{folder}/{kind}-{precision}-{fused}"
                Run(fused, kind, precision).train("norm", range(4)).accelerator.save_state(checkpoint)
                dist.barrier()
                second = Run(not fused, kind, precision)
                second.accelerator.load_state(checkpoint)
                results[kind, precision, "resumed", fused] = second.train("norm", range(4, STEPS)).result()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_same(ours: Any, theirs: Any, steps: slice = slice(None)) -> None:
    for param, want in zip(ours["params"], theirs["params"], strict=True):
        torch.testing.assert_close(param, want, rtol=1e-6, atol=1e-6)
    assert ours["norms"] == pytest.approx(theirs["norms"][steps], rel=1e-5, nan_ok=True)
    assert ours["skipped"] == theirs["skipped"][steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("how", CLIPS)
def test_trains_as_the_stock_optimizer(results: list[dict[Any, Any]], kind: str, precision: str, how: str) -> None:
    for mine in results:
        ours, stock = mine[kind, precision, how, True], mine[kind, precision, how, False]
        if (kind, how) == ("fsdp2", "early"):
            assert ours.startswith("the norm of gradients that have parts in other processes is found in the step")
            continue
        if (kind, precision, how) == ("fsdp2", "fp16", "part"):  # accelerate unscales twice there
            assert ours == stock == "unscale_() has already been called on this optimizer since the last update()."
            continue
        assert_same(ours, stock)
        assert sum(ours["skipped"]) == (precision == "fp16")
        assert ours["asked"] == (0 if how == "part" else STEPS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("fused", [True, False])
def test_checkpoints_go_on_with_the_other(
    results: list[dict[Any, Any]], kind: str, precision: str, fused: bool
) -> None:
    for mine in results:
        assert_same(mine[kind, precision, "resumed", fused], mine[kind, precision, "norm", False], slice(4, None))
