"""The parameters that benchmarks optimize: published counts, names, and how they fall into groups."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest

from fusedopt.bench.workloads import (
    GROUPINGS,
    ODD_SIZES,
    WORKLOADS,
    biggan_128_discriminator,
    biggan_128_generator,
    groups,
    numel,
    ragged,
    resnet,
    vit,
)

#: Tensors and elements. Of models, as published; BigGAN's are in the tests of google/compare_gan.
COUNTS = {
    "resnet-50": (161, 25_557_032),
    "vit-tiny": (152, 5_717_416),
    "vit-b": (152, 86_567_656),
    "vit-l": (296, 304_326_632),
    "convnext-b": (344, 88_591_464),
    "biggan-128": (104, 70_433_988 + 87_982_370),
    "gpt2-124m": (148, 124_439_808),
    "llama-1b": (146, 1_235_814_400),
    "64x1Mi": (64, 64 * 2**20),
    "400x64": (400, 400 * 64),
    "10000x64": (10_000, 10_000 * 64),
    "ragged": (312, 2_696_868),
}

#: A norm layer's own weight or bias. BigGAN's conditional norms have layers that compute theirs.
NORM = re.compile(r"(^|\.)((\w+_)?(layer)?norm\d?|bn\d|ln_\w+|downsample\.1)\.(weight|bias)$")

each_workload = pytest.mark.parametrize("name", WORKLOADS)


def test_every_workload_has_its_counts_here():
    assert list(WORKLOADS) == list(COUNTS)


@each_workload
def test_counts(name):
    shapes = WORKLOADS[name].shapes()
    assert (len(shapes), numel(shapes)) == COUNTS[name]
    assert all(math.prod(shape) > 0 for shape in shapes.values())


def test_biggan_is_its_two_networks():
    assert numel(biggan_128_generator()) == 70_433_988
    assert numel(biggan_128_discriminator()) == 87_982_370
    prefixes = Counter(name.split(".")[0] for name in WORKLOADS["biggan-128"].shapes())
    assert prefixes == {"generator": len(biggan_128_generator()), "discriminator": len(biggan_128_discriminator())}


def test_other_sizes_of_the_same_models():
    assert numel(resnet((3, 4, 23, 3))) == 44_549_160  # ResNet-101
    assert numel(vit(384, 12)) == 22_050_664  # ViT-S/16
    assert numel(vit(768, 12, patch=32)) == 88_224_232  # ViT-B/32


@each_workload
def test_names_are_those_of_parameters_in_modules(name):
    assert all(re.fullmatch(r"\w+(\.\w+)*", parameter) for parameter in WORKLOADS[name].shapes())
    assert WORKLOADS[name].description


@pytest.mark.parametrize(
    ("name", "norms"),
    [("resnet-50", 106), ("vit-b", 50), ("convnext-b", 74), ("gpt2-124m", 50), ("llama-1b", 33)],
)
def test_norms_are_1d(name, norms):
    dims = [len(shape) for parameter, shape in WORKLOADS[name].shapes().items() if NORM.search(parameter)]
    assert dims == [1] * norms


def test_order_and_shapes_of_a_block():
    assert list(resnet((1,)).items()) == [
        ("conv1.weight", (64, 3, 7, 7)),
        ("bn1.weight", (64,)),
        ("bn1.bias", (64,)),
        ("layer1.0.conv1.weight", (64, 64, 1, 1)),
        ("layer1.0.bn1.weight", (64,)),
        ("layer1.0.bn1.bias", (64,)),
        ("layer1.0.conv2.weight", (64, 64, 3, 3)),
        ("layer1.0.bn2.weight", (64,)),
        ("layer1.0.bn2.bias", (64,)),
        ("layer1.0.conv3.weight", (256, 64, 1, 1)),
        ("layer1.0.bn3.weight", (256,)),
        ("layer1.0.bn3.bias", (256,)),
        ("layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        ("layer1.0.downsample.1.weight", (256,)),
        ("layer1.0.downsample.1.bias", (256,)),
        ("fc.weight", (1000, 256)),
        ("fc.bias", (1000,)),
    ]


@each_workload
@pytest.mark.parametrize("kind", GROUPINGS)
def test_groups_hold_each_parameter_once(name, kind):
    shapes = WORKLOADS[name].shapes()
    split = groups(shapes, kind)
    assert sorted(parameter for group in split for parameter in group) == sorted(shapes)
    assert all(split)
    # The vectors' workloads have nothing to decay.
    two = 1 if {len(shape) for shape in shapes.values()} == {1} else 2
    assert len(split) == {"one": 1, "two": two, "each": len(shapes)}[kind]


def test_two_groups_of_vit_b():
    shapes = WORKLOADS["vit-b"].shapes()
    decay, no_decay = groups(shapes, "two")
    assert (len(decay), len(no_decay)) == (52, 100)
    assert decay[:4] == ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"]
    assert {len(shapes[parameter]) for parameter in no_decay} == {1}
    assert all(re.search(r"bias$|norm\d?\.weight$", parameter) for parameter in no_decay)


def test_groups_of_one_kind_only():
    assert groups({"a": (2, 2), "b": (1, 1, 1)}, "two") == [["a", "b"]]
    assert groups({"a": (2,), "b": ()}, "two") == [["a", "b"]]


def test_unknown_grouping():
    with pytest.raises(ValueError, match="unknown grouping 'three'; expected one of one, two, each"):
        groups({"a": (1,)}, "three")


def test_ragged_is_the_same_each_time():
    assert list(ragged().items()) == list(ragged().items()) != list(ragged(seed=1).items())
    assert list(ragged().values())[:4] == [(65521,), (13, 9, 23), (1, 21, 19), (64,)]


def test_ragged_has_odd_sizes():
    shapes = Counter(ragged(repeats=5).values())
    assert all(shapes[size,] == 5 for size in ODD_SIZES)
    assert shapes[()] == 5
    deep = [shape for shape in shapes if len(shape) > 1]
    assert all(len(shape) == 3 and all(side % 2 for side in shape) for shape in deep)


def test_only_the_largest_is_for_gpus_alone():
    assert [name for name, workload in WORKLOADS.items() if workload.gpu_only] == ["llama-1b"]
