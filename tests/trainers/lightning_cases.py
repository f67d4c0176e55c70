"""What the tests of Lightning train: a tiny module, with whatever hooks a test gives it, in a quiet Trainer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fusedopt
from fusedopt.integrations.lightning import FusedClipping

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import MixedPrecision

STEPS, SCALE, OVERFLOW = 20, 2.0**10, 7
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]
CLIPS: list[dict[str, Any]] = [
    {},
    dict(gradient_clip_val=0.5),
    dict(gradient_clip_val=0.01, gradient_clip_algorithm="value"),
]
CLIP_IDS = ["none", "norm", "value"]
#: What Lightning itself warns of.
WARNINGS = (
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


def batches(count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator) * 3.0) for _ in range(count)
    ]


def stock(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, foreach=False, fused=False)


def fused(params: Iterable[nn.Parameter]) -> fusedopt.FusedAdamW:
    return fusedopt.FusedAdamW(params, lr=1e-2)


class Layers(nn.Sequential):
    """Two layers, and a loss whose gradients are what is in the batch.

    They do not depend on the parameters, so that a rounding of these does not grow from step to step.
    """

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, batch: Any) -> Tensor:
        inputs, targets = batch
        (first, _, last), factors = self, (inputs, inputs.mean(1), targets.T, targets.sum(0))
        params = first.weight, first.bias, last.weight, last.bias
        return sum((param * factor).sum() for param, factor in zip(params, factors, strict=True))


class Net(pl.LightningModule):
    """One gradient gets an inf after the backward pass of a batch.

    Args:
        make: makes the optimizer of some parameters.
        overflow_at: the batch.
    """

    def __init__(self, make: Callable[..., Any] = fused, overflow_at: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = Layers()
        self.make, self.overflow_at = make, overflow_at
        self.batch = 0

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def loss(self, batch: Any) -> Tensor:
        return self.layers(batch)

    def training_step(self, batch: Any, index: int) -> Any:
        self.batch = index
        return self.loss(batch)

    def on_after_backward(self) -> None:
        if self.batch == self.overflow_at:
            self.layers[0].weight.grad += torch.eye(8, 6) * float("inf")  # NaN, and inf

    def grads(self) -> list[Tensor]:
        return [param.grad.clone() for param in self.parameters()]


class ByHand(Net):
    """Manual optimization that clips, if told to."""

    clip: tuple[float, str] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        self.batch = index
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.before_step(optimizer)
        optimizer.step()

    def before_step(self, optimizer: Any) -> None:
        if self.clip is not None:
            self.clip_gradients(optimizer, *self.clip)


class LooksItself(Net):
    """Notes the gradients that on_before_optimizer_step sees."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append(self.grads())


def trainer(precision: Any = "32-true", *, callbacks: Any = None, steps: int = STEPS, **settings: Any) -> pl.Trainer:
    """A Trainer on the CPU that prints and saves nothing; ``16-mixed`` with a scaler, which Lightning has for GPUs."""
    if isinstance(precision, MixedPrecision):
        settings["plugins"] = precision
    elif precision == "16-mixed":
        settings["plugins"] = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=SCALE))
    else:
        settings["precision"] = precision
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(
        **{
            **quiet,
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "max_epochs": 10,
            "callbacks": [FusedClipping()] if callbacks is None else callbacks,
            **settings,
        }
    )


def fit(net: Net, precision: Any = "32-true", data: Any = None, ckpt_path: Any = None, **settings: Any) -> Any:
    """Train, and return the Trainer."""
    own = trainer(precision, **settings)
    own.fit(net, DataLoader(data or batches(), batch_size=None), ckpt_path=ckpt_path)
    return own


def assert_same(net: Net, want: Net, tolerance: float = 1e-6) -> None:
    for (name, param), expected in zip(net.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(
            param, expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def overflow(precision: str) -> int | None:
    return OVERFLOW if precision == "16-mixed" else None


def scale_of(own: pl.Trainer) -> float | None:
    scaler = getattr(own.precision_plugin, "scaler", None)
    return None if scaler is None else scaler.get_scale()
