"""Two small classifiers of 8 x 8 grey images, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusedopt.training.engine.evaluator import BaseMetric
from fusedopt.training.engine.model import BaseModel
from fusedopt.training.registry import METRICS, MODELS

__all__ = ["ClassificationMetrics", "DigitsResNet", "DigitsViT"]

IMAGE_SIZE = 8


class _Classifier(BaseModel):
    """Base of both models: the cross-entropy loss and the predictions."""

    def logits(self, images: Tensor) -> Tensor:
        """N x ``num_classes`` logits of N x 1 x 8 x 8 images."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:  # type: ignore[override]
        """See :class:`fusedopt.training.engine.BaseModel`; ``'tensor'`` gives the logits.

        Args:
            inputs: images, N x 1 x 8 x 8.
            labels: N, int64; may be None in mode ``'tensor'`` only.
            mode: ``'loss'``, ``'predict'`` or ``'tensor'``.
        """
        logits = self.logits(inputs)
        if mode == "tensor":
            return logits
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        if mode == "loss":
            return {"loss": losses.mean()}
        columns = zip(logits.argmax(dim=1), labels, losses, strict=True)
        return [{"pred_label": label, "gt_label": truth, "loss": loss} for label, truth, loss in columns]


@METRICS.register_module()
class ClassificationMetrics(BaseMetric):
    """``accuracy``, the share of right labels from 0 to 1, and ``loss``, the mean cross entropy."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Tensor]]) -> None:
        """Store the loss of each sample and whether its label is right."""
        hits = (sample["pred_label"] == sample["gt_label"] for sample in data_samples)
        self.results += [(float(sample["loss"]), float(hit)) for sample, hit in zip(data_samples, hits, strict=True)]

    def compute_metrics(self, results: list[tuple[float, float]]) -> dict[str, float]:
        """Return the means."""
        loss, accuracy = torch.tensor(results, dtype=torch.float64).mean(dim=0).tolist()
        return {"accuracy": accuracy, "loss": loss}


class _Attention(nn.Module):
    def __init__(self, embed_dims: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _TransformerBlock(nn.Module):
    """Pre-norm: each branch reads the normalized stream and adds to the raw one."""

    def __init__(self, embed_dims: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        hidden = round(mlp_ratio * embed_dims)
        self.norm1 = nn.LayerNorm(embed_dims)
        self.attn = _Attention(embed_dims, num_heads)
        self.norm2 = nn.LayerNorm(embed_dims)
        self.fc1 = nn.Linear(embed_dims, hidden)
        self.fc2 = nn.Linear(hidden, embed_dims)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        return x + self.dropout(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))


@MODELS.register_module()
class DigitsViT(_Classifier):
    """Vision transformer (Dosovitskiy et al., 2021) for N x 1 x 8 x 8 images.

    Args:
        embed_dims: embedding width.
        num_layers: number of pre-norm transformer blocks, named ``layers.0`` and so on.
        num_heads: attention heads; divides ``embed_dims``.
        mlp_ratio: width of a block's hidden layer divided by ``embed_dims``.
        patch_size: side of a patch in pixels; divides 8.
        dropout: dropout probability of every branch and of the embedded patches.
        num_classes: number of logits.

    Raises:
        ValueError: ``patch_size`` does not divide 8, or ``num_heads`` does not divide ``embed_dims``.
    """

    def __init__(
        self,
        embed_dims: int = 128,
        num_layers: int = 6,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        dropout: float = 0.1,
        num_classes: int = 10,
    ):
        super().__init__()
        if IMAGE_SIZE % patch_size:
            raise ValueError(f"Invalid patch_size: {patch_size}; expected a divisor of {IMAGE_SIZE}")
        if embed_dims % num_heads:
            raise ValueError(f"Invalid num_heads: {num_heads}; expected a divisor of embed_dims ({embed_dims})")
        num_patches = (IMAGE_SIZE // patch_size) ** 2
        self.patch_embed = nn.Conv2d(1, embed_dims, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dims))
        self.pos_embed = nn.Parameter(torch.empty(1, num_patches + 1, embed_dims))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            _TransformerBlock(embed_dims, num_heads, mlp_ratio, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dims)
        self.head = nn.Linear(embed_dims, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        """A parameter's layer, and the number of layers with stem and head, for layer-wise learning-rate decay."""
        depths = len(self.layers) + 2
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1, depths
        return (0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else depths - 1), depths

    def logits(self, images: Tensor) -> Tensor:
        """N x ``num_classes`` logits of N x 1 x 8 x 8 images."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        x = self.dropout(x + self.pos_embed)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x[:, 0]))


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return functional.relu(branch + self.downsample(x))


@MODELS.register_module()
class DigitsResNet(_Classifier):
    """ResNet (He et al., 2016) for N x 1 x 8 x 8 images.

    The convolution weights are channels-last, the faster layout for small images on a CPU.

    Args:
        channels: width of each stage; every stage but the first halves the image.
        blocks_per_stage: residual blocks in each stage.
        num_classes: number of logits.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 64), blocks_per_stage: int = 1, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.stages = nn.ModuleList()
        in_channels = channels[0]
        for index, out_channels in enumerate(channels):
            blocks = []
            for block in range(blocks_per_stage):
                blocks.append(_ResidualBlock(in_channels, out_channels, 2 if index and not block else 1))
                in_channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.head = nn.Linear(in_channels, num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def logits(self, images: Tensor) -> Tensor:
        """N x ``num_classes`` logits of N x 1 x 8 x 8 images."""
        x = functional.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(dim=(2, 3)))
