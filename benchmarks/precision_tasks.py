"""Small real tasks for comparing precisions: two classifiers of digits and a language model of Python's help texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedopt
from examples.digits.data import load_digits
from examples.digits.models import DigitsResNet, DigitsViT

__all__ = ["TASKS", "CharGPT", "Task"]


class _CausalBlock(nn.Module):
    """Pre-norm: each branch reads the normalized stream and adds to the raw one."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class CharGPT(nn.Module):
    """A character-level GPT (Radford et al., 2018).

    Args:
        vocabulary: number of different characters.
        width: embedding width.
        layers: number of blocks.
        heads: attention heads; divides ``width``.
        context: the longest text that it reads.
    """

    def __init__(self, vocabulary: int, width: int = 96, layers: int = 2, heads: int = 4, context: int = 64):
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(_CausalBlock(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """N x T x ``vocabulary`` logits of the next characters of N x T characters."""
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@cache
def _text() -> tuple[Tensor, int]:
    """The help texts that ``help('if')`` shows, as numbers of characters, and how many characters there are."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    return load_digits()[0]


def _digits_loss(model: nn.Module, generator: torch.Generator, batch: int) -> Tensor:
    images, labels = _digits()
    index = torch.randint(len(labels), (batch,), generator=generator)
    dtype = next(model.parameters()).dtype
    logits = model.logits(images[index].to(dtype))  # type: ignore[operator]
    return functional.cross_entropy(logits.float(), labels[index])


def _text_loss(model: nn.Module, generator: torch.Generator, batch: int) -> Tensor:
    text, _ = _text()
    context = model.positions.num_embeddings  # type: ignore[union-attr]
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    chosen = text[starts + torch.arange(context + 1)]
    return functional.cross_entropy(model(chosen[:, :-1]).flatten(0, 1).float(), chosen[:, 1:].flatten())


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    Args:
        about: the model and its data, in words.
        model: makes one, from torch's global generator.
        loss: of a model on a new batch, drawn from a generator, of so many samples.
        optimizer: the class of the fused optimizer.
        settings: of the optimizer; ``lr`` is the largest learning rate.
        batch: samples in a batch.
        steps: how many there are, unless somebody asks for another number.
    """

    about: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, torch.Generator, int], Tensor]
    optimizer: type[fusedopt.FusedSGD] | type[fusedopt.FusedAdam] | type[fusedopt.FusedAdamW]
    settings: dict[str, Any]
    batch: int
    steps: int

    def lr(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0: a linear warm-up of 5 %, then a cosine down to 1 % of the largest."""
        warmup = max(1, steps // 20)
        if step < warmup:
            return self.settings["lr"] * (step + 1) / warmup
        share = (step - warmup) / max(1, steps - warmup - 1)
        return self.settings["lr"] * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)


_ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.01}

TASKS = {
    "vit": Task(
        "vision transformer, digits",
        lambda: DigitsViT(embed_dims=48, num_layers=2, dropout=0.0),
        _digits_loss,
        fusedopt.FusedAdamW,
        _ADAMW,
        batch=32,
        steps=600,
    ),
    "resnet": Task(
        "ResNet, digits",
        lambda: DigitsResNet((8, 16, 32)),
        _digits_loss,
        fusedopt.FusedSGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        batch=32,
        steps=600,
    ),
    "resnet-adam": Task(
        "ResNet, digits",
        lambda: DigitsResNet((8, 16, 32)),
        _digits_loss,
        fusedopt.FusedAdam,
        {"lr": 1e-3, "betas": (0.9, 0.999)},
        batch=32,
        steps=600,
    ),
    "gpt": Task(
        "character GPT, Python's help texts",
        lambda: CharGPT(_text()[1]),
        _text_loss,
        fusedopt.FusedAdamW,
        _ADAMW,
        batch=8,
        steps=500,
    ),
}
