"""Layer-wise learning rate decay, in MMPretrain's and in MMSegmentation's dialect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fusedopt import AmpOptimWrapper, LearningRateDecayOptimWrapperConstructor, build_optim_wrapper
from fusedopt.training.constructors.depth import family_of, layer_depth, stage_depth

LR, DECAY = 1e-3, 0.05


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.fc = nn.Linear(2, 2)


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


class VisionTransformer(nn.Module):
    """Names as in MMPretrain."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 2)), nn.Parameter(torch.zeros(1, 3, 2))
        self.patch_embed = nn.ModuleDict(dict(projection=nn.Conv2d(3, 2, 2)))
        self.layers = blocks(depth)
        self.ln1 = nn.LayerNorm(2)


class BEiT(VisionTransformer):
    pass


class MAE(VisionTransformer):
    pass


class ConvNeXt(nn.Module):
    def __init__(self, depths=(3, 3, 9, 3)):
        super().__init__()
        self.downsample_layers = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)) for _ in depths)
        self.stages = nn.ModuleList(nn.Sequential(*blocks(depth)) for depth in depths)
        self.norm3 = nn.LayerNorm(2)


class SwinTransformer(nn.Module):
    def __init__(self, depths=(2, 2, 6, 2)):
        super().__init__()
        self.patch_embed = nn.ModuleDict(dict(projection=nn.Conv2d(3, 2, 2)))
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(depths):
            parts = dict(blocks=blocks(depth))
            if stage + 1 < len(depths):
                parts["downsample"] = nn.ModuleDict(dict(norm=nn.LayerNorm(2), reduction=nn.Linear(2, 2)))
            self.stages.append(nn.ModuleDict(parts))
        self.norm3 = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


class Layered(nn.Module):
    """A model of its own kind, with depths of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def get_layer_depth(self, name: str) -> tuple[int, int]:
        return ["stem", "middle", "head"].index(name.partition(".")[0]), 3


def groups_of(
    constructor: str, key: str, model: nn.Module, optimizer: str, paramwise_cfg: dict[str, Any]
) -> dict[str, dict]:
    """What a constructor makes of a model, by one of the groups' entries."""
    cfg = dict(constructor=constructor, optimizer=dict(type=optimizer, lr=LR, weight_decay=DECAY))
    wrapper = build_optim_wrapper(model, dict(**cfg, paramwise_cfg=paramwise_cfg))
    return {group[key]: group for group in wrapper.optimizer.param_groups}


def pretrain(model: nn.Module, optimizer: str = "FusedAdamW", **paramwise_cfg) -> dict[str, dict]:
    return groups_of("LearningRateDecayOptimWrapperConstructor", "param_name", model, optimizer, paramwise_cfg)


def segmentation(model: nn.Module, optimizer: str = "FusedAdamW", **paramwise_cfg) -> dict[str, dict]:
    return groups_of("LearningRateDecayOptimizerConstructor", "group_name", model, optimizer, paramwise_cfg)


def layers_of(groups: dict[str, dict]) -> dict[str, int]:
    """Parameter to layer, from the groups of either dialect."""
    return {
        name: group["layer_id"] if "layer_id" in group else int(group["group_name"].split("_")[1])
        for group in groups.values()
        for name in group.get("param_names", [group.get("param_name")])
    }


class TestDepthRules:
    """Which layer a parameter counts to, by the class of the backbone; both dialects share these rules."""

    @pytest.mark.parametrize(
        "both",
        [
            lambda model: pretrain(model, layer_decay_rate=0.5),
            lambda model: segmentation(model, decay_rate=0.5),
        ],
        ids=["pretrain", "segmentation"],
    )
    @pytest.mark.parametrize(
        ("backbone", "expected"),
        [
            (
                cls,
                {
                    "backbone.cls_token": 0,
                    "backbone.pos_embed": 0,
                    "backbone.patch_embed.projection.weight": 0,
                    "backbone.layers.0.norm.bias": 1,
                    "backbone.layers.2.fc.weight": 3,
                    "backbone.ln1.weight": 4,
                    "head.weight": 4,
                },
            )
            for cls in (VisionTransformer, BEiT, MAE)
        ]
        + [
            (
                ConvNeXt,
                {
                    "backbone.downsample_layers.0.0.weight": 0,
                    "backbone.stages.0.2.fc.weight": 1,
                    "backbone.downsample_layers.1.0.weight": 2,
                    "backbone.stages.1.0.fc.weight": 2,
                    "backbone.downsample_layers.2.1.bias": 3,
                    "backbone.stages.2.2.fc.weight": 3,
                    "backbone.stages.2.3.fc.weight": 4,
                    "backbone.stages.2.8.fc.weight": 5,
                    "backbone.downsample_layers.3.0.weight": 6,
                    "backbone.stages.3.0.fc.weight": 6,
                    "backbone.norm3.weight": 7,
                    "head.bias": 7,
                },
            ),
            (
                SwinTransformer,
                {
                    "backbone.patch_embed.projection.bias": 0,
                    "backbone.stages.0.blocks.0.fc.weight": 1,
                    "backbone.stages.0.blocks.1.fc.weight": 2,
                    "backbone.stages.0.downsample.reduction.weight": 2,
                    "backbone.stages.1.blocks.0.fc.weight": 3,
                    "backbone.stages.2.blocks.5.fc.weight": 10,
                    "backbone.stages.2.downsample.norm.weight": 10,
                    "backbone.stages.3.blocks.1.fc.weight": 12,
                    "backbone.norm3.bias": 13,
                    "head.weight": 13,
                },
            ),
        ],
        ids=["VisionTransformer", "BEiT", "MAE", "ConvNeXt", "Swin"],
    )
    def test_layers(self, both, backbone, expected):
        groups = both(Model(backbone()))
        layers = layers_of(groups)
        assert {name: layers[name] for name in expected} == expected
        last = max(layers.values())
        for group in groups.values():
            layer = group["layer_id"] if "layer_id" in group else int(group["group_name"].split("_")[1])
            assert group["lr_scale"] == 0.5 ** (last - layer) and group["lr"] == LR * group["lr_scale"]

    def test_a_deep_convnext_has_twice_the_layers(self):
        layers = layers_of(pretrain(Model(ConvNeXt((3, 3, 27, 3))), layer_decay_rate=0.8))
        assert layers["backbone.stages.2.26.fc.weight"] == 11
        assert layers["backbone.stages.3.0.fc.weight"] == 12 and layers["head.weight"] == 13

    def test_timms_blocks_are_layers(self):
        model = VisionTransformer()
        model.blocks = model.layers
        del model.layers
        assert layers_of(pretrain(model, layer_decay_rate=0.8))["blocks.2.fc.weight"] == 3

    def test_a_backbone_by_itself(self):
        layers = layers_of(pretrain(VisionTransformer(), layer_decay_rate=0.8))
        assert layers["pos_embed"] == 0 and layers["layers.0.fc.weight"] == 1 and layers["ln1.bias"] == 4

    def test_the_family_is_told_by_the_class_or_a_base(self):
        class Mine(SwinTransformer):
            pass

        assert [family_of(cls()) for cls in (Mine, MAE, ConvNeXt, Layered)] == ["swin", "vit", "convnext", None]

    @pytest.mark.parametrize("name", ["LeViT", "TinyViT", "T2T_ViT", "DaViT", "MobileViT", "PyramidVisionTransformer"])
    def test_a_name_that_only_contains_a_known_one_is_another_family(self, name):
        kind = type(name, (nn.Module,), {})
        model = kind()
        model.patch_embed, model.stages = nn.Linear(2, 2), blocks(2)
        with pytest.raises(NotImplementedError, match=rf"for a {name};.*get_layer_depth"):
            pretrain(Model(model), layer_decay_rate=0.5)
        with pytest.raises(NotImplementedError, match=rf"for a {name};.*get_layer_depth"):
            segmentation(Model(model), decay_rate=0.5, num_layers=3)

    @pytest.mark.parametrize("name", ["TinyBEiT", "MAE2", "SparseConvNeXt"])
    def test_segmentations_dialect_takes_part_of_a_name(self, name):
        model = type(name, (nn.Module,), {})()
        model.patch_embed, model.layers = nn.Linear(2, 2), blocks(2)
        model.downsample_layers, model.stages = nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([blocks(2)])
        assert "layer_0_decay" in segmentation(Model(model), decay_rate=0.5)
        with pytest.raises(NotImplementedError, match=f"for a {name}"):
            pretrain(Model(model), layer_decay_rate=0.5)

    @pytest.mark.parametrize("num_layers", [None, 12])
    @pytest.mark.parametrize("kind", [VisionTransformer, ConvNeXt, SwinTransformer])
    def test_what_a_rule_assumes_must_be_there(self, kind, num_layers):
        class Unnumbered(kind):
            def __init__(self):
                nn.Module.__init__(self)
                self.patch_embed, self.encoder = nn.Linear(2, 2), blocks(2)

        class Stemless(kind):
            def __init__(self):
                nn.Module.__init__(self)
                self.embed, self.layers = nn.Linear(2, 2), blocks(2)
                self.stages = nn.ModuleList([nn.ModuleDict(dict(blocks=blocks(2)))])
                if kind is ConvNeXt:
                    self.stages = nn.ModuleList([blocks(2)])

        for cls, missing in ((Unnumbered, "no numbered layers"), (Stemless, "nothing before its first layer")):
            with pytest.raises(NotImplementedError, match=rf"this {cls.__name__}: it has {missing}; .*get_layer_depth"):
                layer_depth(cls(), "", num_layers)

    def test_a_depth_function_of_ones_own_serves_where_the_rule_does_not_fit(self):
        class Mine(SwinTransformer):
            def __init__(self):
                nn.Module.__init__(self)
                self.body = nn.Linear(2, 2)

            def get_layer_depth(self, name, prefix=""):
                return 0, 2

        assert set(segmentation(Model(Mine()), decay_rate=0.5)) == {"layer_0_decay", "layer_0_no_decay"}

    def test_a_name_that_does_not_fit_the_rule_is_an_error_that_names_it(self):
        with pytest.raises(ValueError, match=r"'backbone\.downsample_layers\.4\.0\.weight' is in no layer .*ConvNeXt"):
            pretrain(Model(ConvNeXt((1, 1, 1, 1, 1))), layer_decay_rate=0.5)
        model = VisionTransformer()
        model.layers = nn.ModuleDict({"0": Block(), "a": Block()})
        with pytest.raises(ValueError, match=r"'backbone\.layers\.a\.norm\.weight' is in no layer .*VisionTransformer"):
            pretrain(Model(model), layer_decay_rate=0.5)

    def test_by_stages(self):
        rule = stage_depth(ConvNeXt(), "backbone.", 12)
        assert rule("backbone.downsample_layers.3.0.weight") == (0, 14)
        assert rule("backbone.stages.2.7.fc.weight") == (3, 14)
        assert rule("backbone.norm3.weight") == rule("decode_head.conv.weight") == (13, 14)
        assert stage_depth(ConvNeXt(), "backbone.")("head.weight") == (7, 8)

    def test_given_layers_replace_counted_ones(self):
        assert layer_depth(BEiT(), "backbone.", 12)("backbone.layers.1.fc.weight") == (2, 14)


@pytest.mark.parametrize("optimizer", ["AdamW", "FusedAdamW"])
class TestPretrain:
    """``LearningRateDecayOptimWrapperConstructor``."""

    def test_a_group_for_each_parameter(self, optimizer):
        model = Layered()
        model.middle.bias.requires_grad_(False)
        groups = pretrain(model, optimizer, layer_decay_rate=0.5)
        assert list(groups) == ["stem.weight", "stem.bias", "middle.weight", "head.weight", "head.bias"]
        assert [group["lr_scale"] for group in groups.values()] == [0.25, 0.25, 0.5, 1.0, 1.0]
        assert [group["layer_id"] for group in groups.values()] == [0, 0, 1, 2, 2]
        assert {group["weight_decay"] for group in groups.values()} == {DECAY}

    def test_weight_decay_follows_norm_bias_flat(self, optimizer):
        groups = pretrain(
            Model(VisionTransformer()),
            optimizer,
            layer_decay_rate=0.9,
            norm_decay_mult=0.0,
            bias_decay_mult=0.2,
            flat_decay_mult=0.4,
            custom_keys={".cls_token": dict(decay_mult=0.6), ".pos_embed": dict(decay_mult=0.0)},
        )
        decays = {name: group["weight_decay"] / DECAY for name, group in groups.items()}
        assert decays["backbone.layers.0.norm.weight"] == decays["backbone.layers.0.norm.bias"] == 0
        assert decays["backbone.layers.0.fc.bias"] == pytest.approx(0.2)
        assert decays["backbone.cls_token"] == pytest.approx(0.6) and decays["backbone.pos_embed"] == 0
        assert decays["backbone.layers.0.fc.weight"] == 1

    def test_entries_of_custom_keys_are_copied_but_for_decay_mult_and_lr_mult_has_no_effect(self, optimizer):
        keys = {"head.bias": dict(lr_mult=7, decay_mult=0.0, note="mine")}
        group = pretrain(Layered(), optimizer, layer_decay_rate=0.5, custom_keys=keys)["head.bias"]
        assert group["lr"] == LR and group["lr_mult"] == 7 and group["note"] == "mine" and "decay_mult" not in group

    def test_names_at_the_root_have_no_dot_in_front(self, optimizer):
        model = VisionTransformer()
        with pytest.warns(UserWarning, match=r"'\.cls_token' matches no parameter name"):
            pretrain(model, optimizer, layer_decay_rate=0.5, custom_keys={".cls_token": dict(decay_mult=0.0)})
        groups = pretrain(model, optimizer, layer_decay_rate=0.5, custom_keys={"cls_token": dict(decay_mult=0.0)})
        assert groups["cls_token"]["weight_decay"] == 0

    def test_without_paramwise_cfg_one_group(self, optimizer):
        cfg = dict(constructor="LearningRateDecayOptimWrapperConstructor", optimizer=dict(type=optimizer, lr=LR))
        assert len(build_optim_wrapper(Layered(), cfg).param_groups) == 1

    def test_the_rate_is_1_by_default(self, optimizer):
        assert {group["lr"] for group in pretrain(Layered(), optimizer, norm_decay_mult=0.0).values()} == {LR}


class TestOwnDepths:
    def test_the_models_own_go_first(self):
        class Backwards(Model):
            def get_layer_depth(self, name):
                return (0, 2) if name.startswith("head") else (1, 2)

        layers = layers_of(pretrain(Backwards(VisionTransformer()), layer_decay_rate=0.5))
        assert layers["head.weight"] == 0 and layers["backbone.cls_token"] == 1

    def test_the_backbones_own_are_asked_with_the_prefix(self):
        class Net(nn.Linear):
            def get_layer_depth(self, name, prefix=""):
                return (0 if name.startswith(prefix) else 1), 2

        assert layers_of(pretrain(Model(Net(2, 2)), layer_decay_rate=0.5))["head.bias"] == 1
        assert layers_of(pretrain(Net(2, 2), layer_decay_rate=0.5)) == {"weight": 0, "bias": 0}

    def test_a_model_that_refuses_leaves_it_to_the_rules(self):
        class Classifier(Model):
            def get_layer_depth(self, name):
                raise NotImplementedError(f"{type(self.backbone)} has none")

        assert layers_of(pretrain(Classifier(MAE()), layer_decay_rate=0.5))["backbone.ln1.weight"] == 4
        with pytest.raises(NotImplementedError, match=r"known for a Linear; .*give the model a method get_layer_depth"):
            pretrain(Classifier(nn.Linear(2, 2)), layer_decay_rate=0.5)

    @pytest.mark.parametrize("decay_type", ["layer_wise", "stage_wise"])
    def test_serve_every_type_of_segmentations_dialect(self, decay_type):
        groups = segmentation(Layered(), decay_rate=0.5, decay_type=decay_type, num_layers=9)
        assert list(groups) == [f"layer_{layer}_{kind}" for layer in (0, 1, 2) for kind in ("decay", "no_decay")]
        assert [group["lr_scale"] for group in groups.values()] == [0.25, 0.25, 0.5, 0.5, 1, 1]

    @pytest.mark.parametrize("depth", [3, (2, 2), (-1, 2), None])
    def test_wrong_depths_are_named(self, depth):
        model = Layered()
        model.get_layer_depth = lambda name: depth
        with pytest.raises(ValueError, match=r"get_layer_depth\('stem\.weight'\) returned .*expected \(layer_id, numb"):
            pretrain(model, layer_decay_rate=0.5)


@pytest.mark.parametrize("optimizer", ["AdamW", "FusedAdamW"])
class TestSegmentation:
    """``LearningRateDecayOptimizerConstructor``."""

    def test_the_tutorials_config(self, optimizer):
        optim_wrapper = dict(
            _delete_=True,
            type="AmpOptimWrapper",
            optimizer=dict(type=optimizer, lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
            paramwise_cfg={"decay_rate": 0.9, "decay_type": "stage_wise", "num_layers": 12},
            constructor="LearningRateDecayOptimizerConstructor",
            loss_scale="dynamic",
        )
        wrapper = build_optim_wrapper(Model(ConvNeXt()), optim_wrapper)
        assert type(wrapper) is AmpOptimWrapper
        groups = {group["group_name"]: group for group in wrapper.optimizer.param_groups}
        assert set(groups) == {
            f"layer_{layer}_{kind}" for layer in (0, 1, 2, 3, 4, 13) for kind in ("decay", "no_decay")
        }
        assert groups["layer_13_decay"]["lr"] == 0.0001
        assert groups["layer_0_decay"]["lr_scale"] == 0.9**13
        assert groups["layer_4_decay"]["lr"] == pytest.approx(0.0001 * 0.9**9)

    def test_biases_and_flat_parameters_do_not_decay(self, optimizer):
        groups = segmentation(Model(MAE()), optimizer, decay_rate=0.5, num_layers=3)
        for name, group in groups.items():
            assert group["weight_decay"] == (0.0 if name.endswith("no_decay") else DECAY)
            for param, param_name in zip(group["params"], group["param_names"], strict=True):
                assert (param.ndim == 1 or param_name.endswith(".bias")) == name.endswith("no_decay")
        assert "backbone.pos_embed" in groups["layer_0_decay"]["param_names"]

    def test_every_trained_parameter_is_in_one_group(self, optimizer):
        model = Model(BEiT())
        model.backbone.cls_token.requires_grad_(False)
        groups = segmentation(model, optimizer, decay_rate=0.5, num_layers=3)
        names = sorted(name for group in groups.values() for name in group["param_names"])
        assert names == sorted(name for name, param in model.named_parameters() if param.requires_grad)

    def test_other_backbones_are_not_implemented(self, optimizer):
        with pytest.raises(NotImplementedError, match="no layer depths are known for a Linear"):
            segmentation(Model(nn.Linear(2, 2)), optimizer, decay_rate=0.5, num_layers=3)
        with pytest.raises(NotImplementedError, match=r"known for ConvNeXt only, not for a BEiT"):
            segmentation(Model(BEiT()), optimizer, decay_rate=0.5, decay_type="stage_wise", num_layers=3)


class TestWeightDecayOfEmbeddings:
    def test_in_segmentations_dialect_only_those_at_the_root_are_exempt(self):
        groups = segmentation(Model(MAE()), decay_rate=0.5)
        assert groups["layer_0_decay"]["param_names"][:2] == ["backbone.cls_token", "backbone.pos_embed"]
        groups = segmentation(MAE(), decay_rate=0.5)
        assert groups["layer_0_no_decay"]["param_names"][:2] == ["cls_token", "pos_embed"]


class TestAddParams:
    """What a subclass may do, as with MMPretrain's class."""

    def test_is_called_for_each_child_with_the_depth_function(self):
        calls = []

        class Mine(LearningRateDecayOptimWrapperConstructor):
            def add_params(self, params, module, prefix="", is_dcn_module=None, get_layer_depth=None):
                calls.append((prefix, get_layer_depth is not None))
                super().add_params(params, module, prefix, is_dcn_module, get_layer_depth)

        Mine(dict(optimizer=dict(type="SGD", lr=LR)), dict(layer_decay_rate=0.5))(Layered())
        assert calls == [("", False), ("stem", True), ("middle", True), ("head", True)]

    def test_rates_are_plain_numbers(self):
        for group in pretrain(Layered(), layer_decay_rate=np.float64(0.5)).values():
            assert type(group["lr"]) is type(group["lr_scale"]) is float


class TestWrongConfigs:
    @pytest.mark.parametrize("rules", [dict(num_layers=12), dict(decay_type="stage_wise")])
    def test_segmentations_dialect_needs_the_rate(self, rules):
        with pytest.raises(KeyError, match="paramwise_cfg needs the key 'decay_rate'"):
            segmentation(Model(ConvNeXt()), **rules)

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            (dict(layer_decay_rate="0.5"), TypeError, "Invalid paramwise_cfg layer_decay_rate: '0.5'"),
            (dict(layer_decay_rate=0.0), ValueError, "Invalid paramwise_cfg layer_decay_rate: 0.0"),
            (dict(layer_decay_rate=0.5, norm_decay_mult="0"), TypeError, "norm_decay_mult: '0'"),
        ],
    )
    def test_pretrain(self, rules, error, message):
        with pytest.raises(error, match=message):
            pretrain(Layered(), **rules)

    @pytest.mark.parametrize(
        ("rules", "error", "message"),
        [
            (dict(decay_rate=-1), ValueError, "Invalid paramwise_cfg decay_rate: -1"),
            (
                dict(decay_type="by_layer"),
                ValueError,
                "decay_type must be 'layer_wise' or 'stage_wise', got 'by_layer'",
            ),
            (dict(num_layers=2.0), TypeError, r"num_layers must be an int, got 2\.0"),
            (dict(num_layers=0), ValueError, "Invalid paramwise_cfg num_layers: 0"),
        ],
    )
    def test_segmentation(self, rules, error, message):
        with pytest.raises(error, match=message):
            segmentation(Layered(), **rules)

    def test_too_few_layers_name_a_parameter_beyond_them(self):
        with pytest.raises(
            ValueError, match=r"'backbone\.layers\.2\.norm\.weight' is in layer 3: num_layers 1 is too sm"
        ):
            segmentation(Model(MAE()), decay_rate=0.5, num_layers=1)

    @pytest.mark.parametrize("dialect", ["OptimWrapper", "Optimizer"])
    def test_the_learning_rate_must_be_there_to_decay(self, dialect):
        constructor = f"LearningRateDecay{dialect}Constructor"
        rate = "layer_decay_rate" if dialect == "OptimWrapper" else "decay_rate"
        cfg = dict(constructor=constructor, optimizer=dict(type="FusedAdamW"), paramwise_cfg={rate: 0.5})
        with pytest.raises(ValueError, match=f"{rate} multiplies lr, which the optimizer config must then give"):
            build_optim_wrapper(Layered(), cfg)

    def test_keys_without_effect_here_are_warnings(self):
        for key in ("bias_lr_mult", "dwconv_decay_mult", "dcn_offset_lr_mult"):
            with pytest.warns(UserWarning, match=f"{key!r} has no effect with LearningRateDecayOptimWrapperConstr"):
                pretrain(Layered(), **{key: 2.0})
        for key, value in dict(norm_decay_mult=0.0, custom_keys={}, bypass_duplicate=True).items():
            with pytest.warns(UserWarning, match=f"{key!r} has no effect with LearningRateDecayOptimizerConstructor"):
                segmentation(Layered(), decay_rate=0.5, **{key: value})
        with pytest.warns(UserWarning, match=r"unknown key 'layer_decay'.*did you mean 'layer_decay_rate'"):
            pretrain(Layered(), layer_decay=0.5)


@pytest.mark.parametrize("key", ["layer_decay_rate", "decay_rate"])
def test_mmsegmentations_older_name(key):
    rules = {key: 0.5, "num_layers": 3}
    cfg = dict(optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.05))
    older, newer = (
        build_optim_wrapper(Model(BEiT()), dict(**cfg, constructor=name, paramwise_cfg=paramwise_cfg))
        for name, paramwise_cfg in (
            ("LayerDecayOptimizerConstructor", rules),
            ("LearningRateDecayOptimizerConstructor", dict(num_layers=3, decay_rate=0.5)),
        )
    )
    assert rules == {key: 0.5, "num_layers": 3}
    kept = ("group_name", "param_names", "lr", "lr_scale", "weight_decay")
    groups = [[{name: group.get(name) for name in kept} for group in each.param_groups] for each in (older, newer)]
    assert groups[0] == groups[1] and len(groups[0]) > 2
