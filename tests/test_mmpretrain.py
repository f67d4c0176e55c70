"""MMPretrain's wheel ships hundreds of real configs: their schedules, and the groups of models that can be built."""

from __future__ import annotations

import pytest
import torch
from mmpretrain_zoo import REFUSED, SAME, SAME_VALUES, missing, outcomes, schedules, zoo

from fusedopt.training.constructors.depth import layer_depth

pytestmark = [
    pytest.mark.slow,
    # The models of others warn of much.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]


def test_the_groups_of_its_configs_are_the_same() -> None:
    found = outcomes()
    counts = {outcome: len(names) for outcome, names in found.items()}
    assert not {outcome: names for outcome, names in found.items() if "other" in outcome}, counts
    assert counts[SAME] >= 400, counts


def test_the_schedules_of_its_configs_have_the_same_values() -> None:
    counts = {outcome: len(names) for outcome, names in schedules().items()}
    assert set(counts) <= {SAME_VALUES, REFUSED} and counts[SAME_VALUES] >= 50, counts


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ("VisionTransformer", "base"),
        ("BEiTViT", "base"),
        ("MAEViT", "base"),
        ("SwinTransformer", "tiny"),
        ("SwinTransformer", "base"),
        ("ConvNeXt", "tiny"),
        ("ConvNeXt", "base"),
    ],
)
def test_the_rules_for_depths_are_those_of_its_models(kind: str, arch: str) -> None:
    with zoo():
        from mmpretrain.registry import MODELS

        with torch.device("meta"):
            backbone = MODELS.build(dict(type=kind, arch=arch))
    rule = layer_depth(backbone, "backbone.")
    names = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
    assert len(names) > 100
    assert {name: rule(name) for name in names} == {name: backbone.get_layer_depth(name, "backbone.") for name in names}
    assert rule("head.fc.weight") == backbone.get_layer_depth("head.fc.weight", "backbone.")
