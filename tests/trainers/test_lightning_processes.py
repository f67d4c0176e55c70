"""Lightning's Trainer and Fabric in two processes: DistributedDataParallel, and models that FSDP2 shards."""

from __future__ import annotations

import datetime
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: pip install 'fusedopt[lightning]'")

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend"),
    pytest.mark.skipif(sys.platform != "linux", reason="gloo is told to use the interface 'lo'"),
]

WORLD = 2
CASES = [
    ("ddp", "16-mixed", (0.5, "norm")),
    ("fsdp2", "32-true", (0.5, "norm")),
    ("fsdp2", "16-mixed", (0.5, "norm")),
    ("fsdp2", "16-mixed", (0.01, "value")),
]


def whole(param: Any) -> torch.Tensor:
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().clone()


def train(make: Any, strategy: str, precision: str, clip: tuple[float, str], rank: int) -> tuple[Any, Any, list[str]]:
    """By the Trainer: the parameters, the scale and the passes over the gradients."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from lightning_cases import OVERFLOW, SCALE, FusedClipping, MixedPrecision, Net, batches, fit, fused
    from probe import GradientPasses
    from torch.distributed.fsdp import fully_shard

    class Sharded(Net):
        def configure_model(self) -> None:
            if strategy == "fsdp2":
                fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

        def on_after_backward(self) -> None:
            if self.batch == self.overflow_at:
                grad = self.layers[0].weight.grad
                grad = getattr(grad, "_local_tensor", grad)
                if strategy == "ddp" or rank == 0:  # in one process alone: all must skip
                    grad += torch.eye(*grad.shape) * math.inf

    plugin: Any = precision
    if precision == "16-mixed":
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))
    net = Sharded(make, OVERFLOW if precision == "16-mixed" else None)
    kind = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(WORLD, 1)
    settings = dict(strategy=kind, devices=WORLD, use_distributed_sampler=False)
    with GradientPasses(net.parameters()) as passes:
        own = fit(
            net,
            plugin,
            batches(40)[rank::WORLD],
            callbacks=[FusedClipping()] if make is fused else [],
            gradient_clip_val=clip[0],
            gradient_clip_algorithm=clip[1],
            **settings,
        )
    scaler = getattr(own.precision_plugin, "scaler", None)
    return [whole(param) for param in net.parameters()], scaler and scaler.get_scale(), passes.seen


def run(rank: int, folder: str) -> None:
    here = str(Path(__file__).parent)
    sys.path[:0] = [here, str(Path(here).parent)]
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="1",  # not used: the processes are joined here
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        TORCHELASTIC_RUN_ID="0",
    )
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    from lightning_cases import fused, stock

    found = {case: (train(fused, *case, rank), train(stock, *case, rank)) for case in CASES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """One test, so that the processes are started once."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning.pytorch"])  # imported once
    torch.multiprocessing.start_processes(run, (str(tmp_path),), nprocs=WORLD, start_method="forkserver")
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == CASES
        for case, (ours, theirs) in found.items():
            for param, want in zip(ours[0], theirs[0], strict=True):
                torch.testing.assert_close(
                    param, want, rtol=1e-6, atol=1e-6, msg=lambda text, case=case: f"{case}: {text}"
                )
            if case[0] == "ddp":
                assert set(ours[2]) == {"aten.mul.out"} < set(theirs[2]), case  # DDP's mean
            assert ours[1] == theirs[1] == (512.0 if case[1] == "16-mixed" else None), case
