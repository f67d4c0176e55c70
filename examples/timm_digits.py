"""Train a small vision transformer of timm on handwritten digits, with mixed precision and clipping inside the step.

    python examples/timm_digits.py

It is the loop of timm's training script, with two lines for fusedopt. Needs timm, torchvision and scikit-learn.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler, accuracy
from torch.nn import functional

from fusedopt.integrations.timm import fuse  # this import registers the optimizers in timm

EPOCHS = 5
BATCH = 64


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    train, val = torch.randperm(len(labels)).split([1437, 360])

    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "fusedoptadamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9)
    loss_scaler = fuse(NativeScaler(device="cpu"))
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS, warmup_t=1, warmup_lr_init=1e-4)
    average = ModelEmaV3(model, decay=0.9)

    step = 0
    for epoch in range(EPOCHS):
        scheduler.step(epoch)
        for batch in train[torch.randperm(len(train))].split(BATCH):
            with torch.autocast("cpu", torch.float16):
                loss = functional.cross_entropy(model(images[batch]).float(), labels[batch], label_smoothing=0.1)
            loss_scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            optimizer.zero_grad()
            step += 1
            average.update(model, step=step)

    with torch.no_grad():
        (share,) = accuracy(average.module(images[val]), labels[val])
    report = optimizer.last_step
    print(f"{step} steps of {type(optimizer).__name__}, the last with a gradient norm of {report.grad_norm:.2f}")
    print(f"accuracy of the averaged weights: {share:.1f} %")


if __name__ == "__main__":
    main()
