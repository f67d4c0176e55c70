"""The configs of MMPretrain, MMSegmentation, MMDetection and MMagic: loading, groups, schedules, and our Runner."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, REFUSED, SAME, missing, outcomes, quiet
from family_runners import BUILT, runners

from fusedopt.training.constructors.depth import layer_depth

pytestmark = [
    pytest.mark.slow,
    # The models of others warn of much.
    pytest.mark.filterwarnings("ignore"),
]

#: Of each family: configs that load here with the values that MMEngine reads, with the same groups, distinct schedules
#: with the same values, and configs whose Runner is built.
FLOORS = {
    "MMPretrain": (530, 460, 87, 510),
    "MMSegmentation": (681, 679, 26, 681),
    "MMDetection": (811, 688, 104, 788),
    "MMagic": (250, 102, 21, 211),
}


def needed(family: str) -> None:
    reason = missing(family)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_load_with_the_same_groups_and_schedules(family: str) -> None:
    needed(family)
    found = outcomes(family)
    counts = {kind: {outcome: len(names) for outcome, names in results.items()} for kind, results in found.items()}
    assert not [outcome for results in counts.values() for outcome in results if "other" in outcome], counts
    for kind, floor in zip(("loaded", "groups", "schedules"), FLOORS[family], strict=False):
        assert counts[kind][SAME] >= floor, counts[kind]
    assert all(outcome in (SAME, REFUSED) or "its own" in outcome for outcome in counts["schedules"]), counts
    assert all("DeepSpeed" in outcome for outcome in counts["groups"] if outcome.startswith("refused here")), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runner_is_built_of_their_sections(family: str) -> None:
    needed(family)
    counts = {outcome: len(names) for outcome, names in runners(family).items()}
    assert counts[BUILT] >= FLOORS[family][3], counts
    refused = [outcome for outcome in counts if outcome.startswith("refused here")]
    known = ("WandbVisBackend", "DeepSpeedOptimWrapper", "evaluate_on_origin")
    assert all(any(name in outcome for name in known) for outcome in refused), counts


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
def test_the_rules_for_depths_are_those_of_mmpretrains_models(kind: str, arch: str) -> None:
    needed("MMPretrain")
    with quiet():
        from mmengine.registry import DefaultScope
        from mmpretrain.registry import MODELS

        with torch.device("meta"), DefaultScope.overwrite_default_scope("mmpretrain"):
            backbone = MODELS.build(dict(type=kind, arch=arch))
    rule = layer_depth(backbone, "backbone.")
    names = [f"backbone.{name}" for name, _ in backbone.named_parameters()]
    assert len(names) > 100
    assert {name: rule(name) for name in names} == {name: backbone.get_layer_depth(name, "backbone.") for name in names}
    assert rule("head.fc.weight") == backbone.get_layer_depth("head.fc.weight", "backbone.")
