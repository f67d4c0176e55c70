"""What to optimize: the named parameter shapes of real models, and synthetic ones that isolate one cost."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

__all__ = [
    "GROUPINGS",
    "WORKLOADS",
    "Shapes",
    "Workload",
    "biggan_128_discriminator",
    "biggan_128_generator",
    "convnext",
    "gpt2",
    "groups",
    "llama",
    "numel",
    "ragged",
    "resnet",
    "uniform",
    "vit",
]

Shape = tuple[int, ...]
#: Names to shapes, in the order of ``model.named_parameters()``.
Shapes = dict[str, Shape]

#: How ``groups`` can split parameters.
GROUPINGS = ("one", "two", "each")

#: One-dimensional sizes next to the sizes of vectors, blocks and chunks in kernels: off by one, or prime.
ODD_SIZES = (1, 3, 7, 63, 64, 65, 127, 1023, 16381, 16411, 65521, 65537)


def numel(shapes: Shapes) -> int:
    """The number of elements of all parameters."""
    return sum(map(math.prod, shapes.values()))


def groups(shapes: Shapes, kind: str) -> list[list[str]]:
    """The names of ``shapes`` in parameter groups.

    ``one`` group of all; ``two`` groups, with weight decay (two dimensions or more) and without, less an empty one; or
    a group for ``each`` parameter.

    Raises:
        ValueError: ``kind`` is not in ``GROUPINGS``.
    """
    if kind == "one":
        return [list(shapes)]
    if kind == "two":
        decay = [name for name, shape in shapes.items() if len(shape) >= 2]
        no_decay = [name for name, shape in shapes.items() if len(shape) < 2]
        return [group for group in (decay, no_decay) if group]
    if kind == "each":
        return [[name] for name in shapes]
    raise ValueError(f"unknown grouping {kind!r}; expected one of {', '.join(GROUPINGS)}")


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def conv(name: str, outputs: int, inputs: int, kernel: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)} | ({f"{name}.bias": (outputs,)} if bias else {})


def norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def merge(parts: Iterable[Shapes]) -> Shapes:
    return {name: shape for part in parts for name, shape in part.items()}


def within(name: str, shapes: Shapes) -> Shapes:
    """``shapes`` as parameters of the submodule ``name``."""
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def stack(name: str, blocks: Iterable[Shapes]) -> Shapes:
    """``blocks`` as the submodules of the module list ``name``."""
    return merge(within(f"{name}.{i}", block) for i, block in enumerate(blocks))


def resnet(layers: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> Shapes:
    """A bottleneck ResNet (He et al., 2016) as in torchvision: ResNet-50 by default."""

    def block(inputs: int, width: int) -> Shapes:
        outputs = 4 * width
        shapes = {
            **conv("conv1", width, inputs, 1, bias=False),
            **norm("bn1", width),
            **conv("conv2", width, width, 3, bias=False),
            **norm("bn2", width),
            **conv("conv3", outputs, width, 1, bias=False),
            **norm("bn3", outputs),
        }
        if inputs != outputs:
            shapes |= conv("downsample.0", outputs, inputs, 1, bias=False) | norm("downsample.1", outputs)
        return shapes

    channels = 64
    shapes = conv("conv1", channels, 3, 7, bias=False) | norm("bn1", channels)
    for stage, depth in enumerate(layers):
        width = 64 * 2**stage
        inputs = [channels] + [4 * width] * (depth - 1)
        shapes |= stack(f"layer{stage + 1}", (block(channels, width) for channels in inputs))
        channels = 4 * width
    return shapes | linear("fc", classes, channels)


def vit(dim: int, depth: int, patch: int = 16, image: int = 224, classes: int = 1000) -> Shapes:
    """A vision transformer (Dosovitskiy et al., 2021) as in timm: a class token, and qkv in one matrix."""
    block = {
        **norm("norm1", dim),
        **linear("attn.qkv", 3 * dim, dim),
        **linear("attn.proj", dim, dim),
        **norm("norm2", dim),
        **linear("mlp.fc1", 4 * dim, dim),
        **linear("mlp.fc2", dim, 4 * dim),
    }
    return {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, (image // patch) ** 2 + 1, dim),
        **conv("patch_embed.proj", dim, 3, patch),
        **stack("blocks", [block] * depth),
        **norm("norm", dim),
        **linear("head", classes, dim),
    }


def convnext(
    depths: tuple[int, ...] = (3, 3, 27, 3), dims: tuple[int, ...] = (128, 256, 512, 1024), classes: int = 1000
) -> Shapes:
    """A ConvNeXt (Liu et al., 2022) as in its authors' code, with layer scale: ConvNeXt-B by default."""

    def block(dim: int) -> Shapes:
        return {
            "gamma": (dim,),
            **conv("dwconv", dim, 1, 7),
            **norm("norm", dim),
            **linear("pwconv1", 4 * dim, dim),
            **linear("pwconv2", dim, 4 * dim),
        }

    stem = conv("0", dims[0], 3, 4) | norm("1", dims[0])
    between = [norm("0", inputs) | conv("1", outputs, inputs, 2) for inputs, outputs in pairwise(dims)]
    stages = [[block(dim)] * depth for depth, dim in zip(depths, dims, strict=True)]
    return {
        **stack("downsample_layers", [stem, *between]),
        **merge(stack(f"stages.{i}", stage) for i, stage in enumerate(stages)),
        **norm("norm", dims[-1]),
        **linear("head", classes, dims[-1]),
    }


def _self_attention(channels: int) -> Shapes:
    """Self-attention over an image (Zhang et al., 2019), with a scalar gain."""
    return {
        "gamma": (),
        **conv("theta", channels // 8, channels, 1, bias=False),
        **conv("phi", channels // 8, channels, 1, bias=False),
        **conv("g", channels // 2, channels, 1, bias=False),
        **conv("o", channels, channels // 2, 1, bias=False),
    }


def biggan_128_generator(ch: int = 96, latent: int = 120, embedding: int = 128, classes: int = 1000) -> Shapes:
    """BigGAN's generator of 128 x 128 images (Brock et al., 2019), as in the first author's PyTorch code.

    Each block's batch norms get their gains and biases from the shared class embedding and a sixth of the latent.
    """
    widths = [ch * multiple for multiple in (16, 16, 8, 4, 2, 1)]
    chunk = latent // len(widths)

    def conditional_norm(name: str, dim: int) -> Shapes:
        return merge(linear(f"{name}.{part}", dim, embedding + chunk, bias=False) for part in ("gain", "bias"))

    def block(inputs: int, outputs: int) -> Shapes:
        return {
            **conv("conv1", outputs, inputs, 3),
            **conv("conv2", outputs, outputs, 3),
            **conv("conv_sc", outputs, inputs, 1),
            **conditional_norm("bn1", inputs),
            **conditional_norm("bn2", outputs),
        }

    levels = [[block(inputs, outputs)] for inputs, outputs in pairwise(widths)]
    levels[3].append(_self_attention(widths[4]))  # at 64 x 64
    return {
        "shared.weight": (classes, embedding),
        **linear("linear", 4 * 4 * widths[0], chunk),
        **merge(stack(f"blocks.{i}", level) for i, level in enumerate(levels)),
        "output_layer.0.gain": (widths[-1],),
        "output_layer.0.bias": (widths[-1],),
        **conv("output_layer.2", 3, widths[-1], 3),
    }


def biggan_128_discriminator(ch: int = 96, classes: int = 1000) -> Shapes:
    """BigGAN's discriminator of 128 x 128 images (Brock et al., 2019), as in the first author's PyTorch code."""
    widths = [3, *(ch * multiple for multiple in (1, 2, 4, 8, 16, 16))]

    def block(inputs: int, outputs: int) -> Shapes:
        shapes = conv("conv1", outputs, inputs, 3) | conv("conv2", outputs, outputs, 3)
        return shapes | (conv("conv_sc", outputs, inputs, 1) if inputs != outputs else {})

    levels = [[block(inputs, outputs)] for inputs, outputs in pairwise(widths)]
    levels[0].append(_self_attention(widths[1]))  # at 64 x 64
    return {
        **merge(stack(f"blocks.{i}", level) for i, level in enumerate(levels)),
        **linear("linear", 1, widths[-1]),
        "embed.weight": (classes, widths[-1]),
    }


def gpt2(layers: int = 12, dim: int = 768, vocab: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2 (Radford et al., 2019), the head tied to the token embedding: the 124M model by default.

    Weights are (outputs, inputs), as in nanoGPT; OpenAI's are transposed.
    """
    block = {
        **norm("ln_1", dim),
        **linear("attn.c_attn", 3 * dim, dim),
        **linear("attn.c_proj", dim, dim),
        **norm("ln_2", dim),
        **linear("mlp.c_fc", 4 * dim, dim),
        **linear("mlp.c_proj", dim, 4 * dim),
    }
    shapes = {"wte.weight": (vocab, dim), "wpe.weight": (context, dim), **stack("h", [block] * layers)}
    return within("transformer", shapes | norm("ln_f", dim))


def llama(
    layers: int = 16, dim: int = 2048, heads: int = 32, kv_heads: int = 8, ffn: int = 8192, vocab: int = 128256
) -> Shapes:
    """A Llama 3 (Grattafiori et al., 2024), the head tied to the token embedding: Llama 3.2 1B by default."""
    kv = dim // heads * kv_heads
    weights = {
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "mlp.gate_proj": (ffn, dim),
        "mlp.up_proj": (ffn, dim),
        "mlp.down_proj": (dim, ffn),
        "input_layernorm": (dim,),
        "post_attention_layernorm": (dim,),
    }
    block = {f"{name}.weight": shape for name, shape in weights.items()}
    shapes = {"embed_tokens.weight": (vocab, dim), **stack("layers", [block] * layers), "norm.weight": (dim,)}
    return within("model", shapes)


def uniform(count: int, size: int) -> Shapes:
    """``count`` vectors of ``size`` elements."""
    return {f"vectors.{i}": (size,) for i in range(count)}


def ragged(repeats: int = 12, seed: int = 0) -> Shapes:
    """Scalars, vectors of ``ODD_SIZES``, and as many 3-d tensors with odd sides up to 31, ordered by ``seed``."""
    rng = random.Random(seed)
    flat = [(), *((size,) for size in ODD_SIZES)] * repeats
    deep = [tuple(rng.choices(range(1, 32, 2), k=3)) for _ in flat]
    shuffled = sorted([*flat, *deep], key=lambda _: rng.random())
    return {f"tensors.{i}": shape for i, shape in enumerate(shuffled)}


@dataclass(frozen=True)
class Workload:
    """Parameters to optimize. ``gpu_only``: too large for a CPU."""

    description: str
    shapes: Callable[[], Shapes]
    gpu_only: bool = False


def _biggan_128() -> Shapes:
    return within("generator", biggan_128_generator()) | within("discriminator", biggan_128_discriminator())


#: Workloads by name.
WORKLOADS: dict[str, Workload] = {
    "resnet-50": Workload("ResNet-50: convolutions and many small batch norms", resnet),
    "vit-tiny": Workload("ViT-Ti/16: little work in many tensors", lambda: vit(192, 12)),
    "vit-b": Workload("ViT-B/16", lambda: vit(768, 12)),
    "vit-l": Workload("ViT-L/16", lambda: vit(1024, 24)),
    "convnext-b": Workload("ConvNeXt-B: depthwise convolutions and layer scale", convnext),
    "biggan-128": Workload("BigGAN at 128 x 128: generator and discriminator", _biggan_128),
    "gpt2-124m": Workload("GPT-2 124M: a large tied embedding", gpt2),
    "llama-1b": Workload("Llama 3.2 1B: nearly all in large matrices", llama, gpu_only=True),
    "64x1Mi": Workload("64 vectors of 1 Mi elements: memory bandwidth", lambda: uniform(64, 2**20)),
    "400x64": Workload("400 vectors of 64 elements: overhead per tensor", lambda: uniform(400, 64)),
    "10000x64": Workload("10,000 vectors of 64 elements: overhead at scale", lambda: uniform(10_000, 64)),
    "ragged": Workload("Scalars, odd and prime sizes: edges of vectors, blocks and chunks", ragged),
}
