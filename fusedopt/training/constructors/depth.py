"""How deep in a model a parameter lies, for learning rates that decay from layer to layer.

A depth is ``(layer_id, depths)``: 0 for the stem, ``depths - 1`` for everything after the backbone, and in between one
number per layer or per few layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..unwrapping import named_parameters, unwrap

__all__ = ["DepthFunction", "family_of", "family_of_segmentation", "layer_depth", "own_depth", "stage_depth"]

#: Maps a parameter's name to its depth.
DepthFunction = Callable[[str], tuple[int, int]]

_STEM = ("cls_token", "mask_token", "pos_embed")

#: Backbones with a known rule, by the name of their class or of a base class.
_FAMILIES = {
    "ConvNeXt": "convnext",
    "SwinTransformer": "swin",
    "BEiT": "vit",
    "BEiTViT": "vit",
    "MAE": "vit",
    "MAEViT": "vit",
    "VisionTransformer": "vit",
    "ViT": "vit",
    "ViTSAM": "vit",
}

_ADVICE = "give the model a method get_layer_depth(name) -> (layer_id, number of depths)"


def family_of(backbone: nn.Module) -> str | None:
    """``'convnext'``, ``'swin'`` or ``'vit'`` (also BEiT and MAE), by the name of the class or a base; else None."""
    families = (_FAMILIES.get(cls.__name__) for cls in type(backbone).__mro__)
    return next((family for family in families if family is not None), None)


def family_of_segmentation(backbone: nn.Module) -> str | None:
    """As :func:`family_of`; like MMSegmentation, it also finds three of the names within the class name."""
    parts = (part for part in ("ConvNeXt", "BEiT", "MAE") if part in type(backbone).__name__)
    return _FAMILIES.get(next(parts, ""), family_of(backbone))


def _index(name: str, position: int) -> int:
    return int(name.split(".")[position])


def _convnext(name: str, last_layer: int) -> int:
    """Layer of a ConvNeXt parameter: three blocks of the third stage count as one layer, as does each other stage."""
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
    """Layer of a Swin parameter; the downsampling after a stage belongs to the stage's last block."""
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
                number = rest.partition(".")[0]
                if number.isdecimal():
                    yield int(number)


def _count(names: Iterable[str], *prefixes: str) -> int:
    return max(_numbers_after(names, *prefixes), default=-1) + 1


def _convnext_layers(names: Iterable[str]) -> int:
    return 12 if _count(names, "stages.2.") > 9 else 6


def _names(backbone: nn.Module) -> list[str]:
    return [name for name, _ in named_parameters(backbone, remove_duplicate=False)]


def layer_depth(
    backbone: nn.Module, prefix: str, num_layers: int | None = None, family: str | None = None
) -> DepthFunction:
    """The rule for a known backbone, by layers.

    Args:
        backbone: a backbone of a known family, with that family's parameter names.
        prefix: the prefix of its parameters' names in the model.
        num_layers: number of layers between stem and head; by default, and always for a Swin, they are counted.
        family: the family; by default found by :func:`family_of`.

    Raises:
        NotImplementedError: the backbone's family is not known, or it has no numbered layers or nothing before them.
    """
    family = family or family_of(backbone)
    names = _names(backbone)
    layer: Callable[[str], int]
    if family == "convnext":
        counted = _count(names, "stages.")
        last = num_layers if num_layers is not None else _convnext_layers(names)
        count, layer = last, functools.partial(_convnext, last_layer=last)
    elif family == "swin":
        blocks = [_count(names, f"stages.{stage}.blocks.") for stage in range(_count(names, "stages."))]
        counted = count = sum(blocks)
        layer = functools.partial(_swin, blocks_per_stage=blocks)
    elif family == "vit":
        counted = _count(names, "layers.", "blocks.")
        layers = num_layers if num_layers is not None else counted
        count, layer = layers, functools.partial(_vit, num_layers=layers)
    else:
        raise NotImplementedError(
            f"no layer depths are known for a {type(backbone).__name__}; known are ViT, BEiT, MAE, ConvNeXt and Swin, "
            f"by class name. For others, {_ADVICE}"
        )
    return _checked_rule(backbone, names, prefix, layer, counted, count + 2)


def stage_depth(
    backbone: nn.Module, prefix: str, num_layers: int | None = None, family: str | None = None
) -> DepthFunction:
    """The rule for a ConvNeXt, by stages: 0 for stem and downsampling, one number per stage, the last for the rest.

    Raises:
        NotImplementedError: the backbone is not a ConvNeXt.
    """
    if (family or family_of(backbone)) != "convnext":
        raise NotImplementedError(
            f"decay by stages is known for ConvNeXt only, not for a {type(backbone).__name__}; {_ADVICE}"
        )
    names = _names(backbone)
    layers = num_layers if num_layers is not None else _convnext_layers(names)

    def stage(name: str) -> int:
        if name in _STEM or name.startswith("downsample_layers."):
            return 0
        return _index(name, 1) + 1 if name.startswith("stages.") else layers + 1

    return _checked_rule(backbone, names, prefix, stage, _count(names, "stages."), layers + 2)


def _checked_rule(
    backbone: nn.Module, names: list[str], prefix: str, layer: Callable[[str], int], counted: int, depths: int
) -> DepthFunction:
    """The rule for a whole model, checked on the backbone; parameters outside come after the backbone."""
    kind = type(backbone).__name__

    def depth(name: str) -> tuple[int, int]:
        try:
            layer_id = layer(name.removeprefix(prefix)) if name.startswith(prefix) else depths - 1
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"parameter {name!r} is in no layer that the rule for the {kind} backbone knows; {_ADVICE}"
            ) from error
        if layer_id >= depths:
            raise ValueError(f"parameter {name!r} is in layer {layer_id}: num_layers {depths - 2} is too small")
        return layer_id, depths

    if not counted or all(depth(prefix + name)[0] for name in names):
        missing = "no numbered layers" if not counted else "nothing before its first layer"
        raise NotImplementedError(f"no layer depths are known for this {kind}: it has {missing}; {_ADVICE}")
    return depth


def own_depth(model: nn.Module) -> DepthFunction | None:
    """The model's ``get_layer_depth``, or its backbone's, or None if neither works for this model.

    The backbone's is called as in MMPretrain's classifiers: ``get_layer_depth(name, 'backbone.')``.
    """
    candidates: list[DepthFunction] = []
    if hasattr(model, "get_layer_depth"):
        candidates.append(model.get_layer_depth)  # type: ignore[arg-type]
    backbone: Any = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module):
        backbone = unwrap(backbone)
    if hasattr(backbone, "get_layer_depth"):
        candidates.append(lambda name: backbone.get_layer_depth(name, "backbone."))
    first = next((name for name, _ in named_parameters(model)), None)
    for candidate in candidates:
        try:
            if first is not None:
                candidate(first)
        except NotImplementedError:  # a model may have the method although its backbone does not
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
