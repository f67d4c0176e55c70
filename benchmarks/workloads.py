"""Parameter shapes to optimize: those of real models, and uniform ones that isolate one cost."""

from __future__ import annotations

from collections.abc import Callable

Shapes = list[tuple[int, ...]]


def uniform(count: int, size: int) -> Shapes:
    """``count`` one-dimensional tensors of ``size`` elements."""
    return [(size,)] * count


def vit(dim: int, depth: int, patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """A vision transformer (Dosovitskiy et al., 2021) with a class token and qkv in one matrix."""
    tokens = (image // patch) ** 2 + 1
    block: Shapes = [
        (dim,),
        (dim,),
        (3 * dim, dim),
        (3 * dim,),
        (dim, dim),
        (dim,),
        (dim,),
        (dim,),
        (4 * dim, dim),
        (4 * dim,),
        (dim, 4 * dim),
        (dim,),
    ]
    stem: Shapes = [(1, 1, dim), (1, tokens, dim), (dim, 3, patch, patch), (dim,)]
    return [*stem, *(block * depth), (dim,), (dim,), (classes, dim), (classes,)]


#: Shape functions by name.
WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "64 x 1Mi": lambda: uniform(64, 2**20),
    "400 x 64": lambda: uniform(400, 64),
    "ViT-tiny": lambda: vit(192, 12),
    "ViT-B": lambda: vit(768, 12),
}
