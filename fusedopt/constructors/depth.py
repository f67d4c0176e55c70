"""How deep in a model a parameter lies, for learning rates that decay from layer to layer.

A depth is ``(layer_id, depths)``: 0 for the stem, ``depths - 1`` for what comes after the backbone, and one number per
layer, or per few layers, between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import nn

__all__ = ["DepthFunction", "family_of", "layer_depth", "own_depth", "stage_depth"]

#: The depth of the parameter of this name.
DepthFunction = Callable[[str], tuple[int, int]]

_STEM = ("cls_token", "mask_token", "pos_embed")

#: Backbones whose rule is known, by a part of their class' name. The first that is found decides.
_FAMILIES = {
    "ConvNeXt": "convnext",
    "Swin": "swin",
    "BEiT": "vit",
    "MAE": "vit",
    "VisionTransformer": "vit",
    "ViT": "vit",
}


def family_of(backbone: nn.Module) -> str | None:
    """``'convnext'``, ``'swin'`` or ``'vit'`` (which BEiT and MAE are too), by the name of the class or of a base."""
    for cls in type(backbone).__mro__:
        for part, family in _FAMILIES.items():
            if part in cls.__name__:
                return family
    return None


def _index(name: str, position: int) -> int:
    return int(name.split(".")[position])


def _convnext(name: str, last_layer: int) -> int:
    """Layer of a ConvNeXt parameter: the third stage counts by three blocks, the others whole."""
    if name in _STEM:
        return 0
    if name.startswith("downsample_layers."):
        return (0, 2, 3, last_layer)[_index(name, 1)]
    if name.startswith("stages."):
        return (1, 2, 3 + _index(name, 2) // 3, last_layer)[_index(name, 1)]
    return last_layer + 1


def _vit(name: str, num_layers: int) -> int:
    """Layer of a ViT, BEiT or MAE parameter."""
    if name in _STEM or name.startswith("patch_embed"):
        return 0
    return _index(name, 1) + 1 if name.startswith(("layers.", "blocks.")) else num_layers + 1


def _swin(name: str, blocks_per_stage: list[int]) -> int:
    """Layer of a Swin parameter; what shrinks the image after a stage belongs to the stage's last block."""
    if name.startswith("patch_embed"):
        return 0
    if name.startswith("stages."):
        stage = _index(name, 1)
        part, block = name.split(".")[2:4]
        before = sum(blocks_per_stage[:stage])
        return before + int(block) + 1 if part == "blocks" else before + blocks_per_stage[stage]
    return sum(blocks_per_stage) + 1


def _numbers_after(names: Iterable[str], *prefixes: str) -> Iterator[int]:
    """The numbers that follow one of the prefixes in names."""
    for name in names:
        for prefix in prefixes:
            rest = name.removeprefix(prefix)
            if rest != name:
                yield int(rest.partition(".")[0])


def _count(names: Iterable[str], *prefixes: str) -> int:
    return max(_numbers_after(names, *prefixes), default=-1) + 1


def _convnext_layers(names: Iterable[str]) -> int:
    return 12 if _count(names, "stages.2.") > 9 else 6


def layer_depth(backbone: nn.Module, prefix: str, num_layers: int | None = None) -> DepthFunction:
    """The rule for a known backbone, by layers.

    Args:
        backbone: of a family that :func:`family_of` knows.
        prefix: what its parameters' names begin with.
        num_layers: number of layers between stem and head, by default what the backbone has. A Swin's are counted.

    Raises:
        NotImplementedError: the backbone's family is not known.
    """
    family = family_of(backbone)
    names = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    layer: Callable[[str], int]
    if family == "convnext":
        last = num_layers if num_layers is not None else _convnext_layers(names)
        count, layer = last, lambda name: _convnext(name, last)
    elif family == "swin":
        blocks = [_count(names, f"stages.{stage}.blocks.") for stage in range(_count(names, "stages."))]
        count, layer = sum(blocks), lambda name: _swin(name, blocks)
    elif family == "vit":
        layers = num_layers if num_layers is not None else _count(names, "layers.", "blocks.")
        count, layer = layers, lambda name: _vit(name, layers)
    else:
        raise NotImplementedError(
            f"no layer depths are known for a {type(backbone).__name__}; known are ViT, BEiT, MAE, ConvNeXt and Swin. "
            "Give the model a method get_layer_depth(name) -> (layer_id, number of depths)"
        )
    return _within(prefix, layer, count + 2)


def stage_depth(backbone: nn.Module, prefix: str, num_layers: int | None = None) -> DepthFunction:
    """The rule for a ConvNeXt, by stages: 0 for all that shrinks the image, a number per stage, the last for the rest.

    Raises:
        NotImplementedError: another backbone.
    """
    if family_of(backbone) != "convnext":
        raise NotImplementedError(
            f"decay by stages is known for ConvNeXt only, not for a {type(backbone).__name__}; give the model a method "
            "get_layer_depth(name) -> (layer_id, number of depths)"
        )
    layers = num_layers if num_layers is not None else _convnext_layers(name for name, _ in backbone.named_parameters())

    def stage(name: str) -> int:
        if name in _STEM or name.startswith("downsample_layers."):
            return 0
        return _index(name, 1) + 1 if name.startswith("stages.") else layers + 1

    return _within(prefix, stage, layers + 2)


def _within(prefix: str, layer: Callable[[str], int], depths: int) -> DepthFunction:
    """The rule for a whole model: what is outside the backbone comes after it."""

    def depth(name: str) -> tuple[int, int]:
        layer_id = layer(name.removeprefix(prefix)) if name.startswith(prefix) else depths - 1
        if layer_id >= depths:
            raise ValueError(f"parameter {name!r} is in layer {layer_id}: num_layers {depths - 2} is too small")
        return layer_id, depths

    return depth


def own_depth(model: nn.Module) -> DepthFunction | None:
    """The model's ``get_layer_depth``, or its backbone's, or None when there is none that works for this model.

    That of the backbone is called as MMPretrain's classifiers do: ``get_layer_depth(name, 'backbone.')``.
    """
    candidates: list[DepthFunction] = []
    if hasattr(model, "get_layer_depth"):
        candidates.append(model.get_layer_depth)  # type: ignore[arg-type]
    backbone = getattr(model, "backbone", None)
    if hasattr(backbone, "get_layer_depth"):
        candidates.append(lambda name: backbone.get_layer_depth(name, "backbone."))  # type: ignore[union-attr]
    first = next((name for name, _ in model.named_parameters()), None)
    for candidate in candidates:
        try:
            if first is not None:
                candidate(first)
        except NotImplementedError:  # a model may have it and say that its backbone does not
            continue
        return _checked(candidate)
    return None


def _checked(function: DepthFunction) -> DepthFunction:
    def checked(name: str) -> tuple[int, int]:
        depth = function(name)
        if not (isinstance(depth, tuple) and len(depth) == 2 and 0 <= depth[0] < depth[1]):
            raise ValueError(
                f"get_layer_depth({name!r}) returned {depth!r}; expected (layer_id, number of depths) with "
                "0 <= layer_id < number of depths"
            )
        return depth

    return checked
