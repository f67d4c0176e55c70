"""Train a small network on handwritten digits in several processes, with DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/ddp_digits.py

The optimizer needs to know nothing of the processes: after a backward pass each of them has all gradients, so that the
norms by which they clip are the same, and so are the weights. Each step here accumulates the gradients of two batches,
which are exchanged once. It runs over gloo, or over nccl with a GPU for each process. Needs scikit-learn.
"""

from __future__ import annotations

import contextlib
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from fusedopt import FusedAdamW

EPOCHS = 6
BATCH = 32  # for each process
ACCUMULATION = 2


def main() -> None:
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("start it with torchrun: torchrun --nproc-per-node 2 examples/ddp_digits.py")
    local_rank = int(os.environ["LOCAL_RANK"])
    use_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if use_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if use_gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same split and order of the images in each process
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).flatten(1).to(device)
    labels = torch.from_numpy(digits.target).to(device)
    train, val = torch.randperm(len(labels)).split([1437, 360])

    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model = DistributedDataParallel(network.to(device), device_ids=[local_rank] if use_gpus else None)
    optimizer = FusedAdamW(model.parameters(), lr=3e-3, weight_decay=0.05, clip_grad={"max_norm": 1.0})

    for epoch in range(1, EPOCHS + 1):
        order = train[torch.randperm(len(train))]
        shares = order[: len(order) // world * world].view(-1, world)[:, rank]
        batches = [batch for batch in shares.split(BATCH) if len(batch) == BATCH]
        for number, batch in enumerate(batches, 1):
            complete = number % ACCUMULATION == 0 or number == len(batches)
            with contextlib.nullcontext() if complete else model.no_sync():
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                (loss / ACCUMULATION).backward()
            if complete:
                optimizer.step()
                optimizer.zero_grad()
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, norm of the gradient {optimizer.last_step.grad_norm:.3f}")

    with torch.no_grad():
        right = (network(images[val]).argmax(1) == labels[val]).float().mean()
    weights = torch.cat([param.detach().flatten() for param in network.parameters()])
    everywhere = [torch.empty_like(weights) for _ in range(world)]
    dist.all_gather(everywhere, weights)
    if rank == 0:
        same = all(torch.equal(weights, others) for others in everywhere)
        print(f"accuracy: {right:.1%}; {world} processes with {'the same' if same else 'different'} weights")
    dist.destroy_process_group()
    time.sleep(0.05)  # gloo's threads let go of their tensors; ending before them may abort (pytorch/pytorch#190489)


if __name__ == "__main__":
    main()
