"""DefaultOptimWrapperConstructor: which parameter gets which learning rate and weight decay."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fusedopt import AmpOptimWrapper, DefaultOptimWrapperConstructor, FusedSGD, OptimWrapper, build_optim_wrapper

OPTIMIZERS = ["SGD", "FusedSGD"]
LR, DECAY = 0.01, 0.1


class ModulatedDeformConv2d(nn.Module):
    """Stands in for mmcv's class of this name, which the constructor knows by its name."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, 3, 3))
        self.bias = nn.Parameter(torch.ones(2))


class ModulatedDeformConv2dPack(ModulatedDeformConv2d):
    def __init__(self):
        super().__init__()
        self.conv_offset = nn.Conv2d(2, 2, 3)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.dwconv = nn.Conv2d(4, 4, 3, groups=4)
        self.dcn = ModulatedDeformConv2dPack()


def construct(model: nn.Module, paramwise_cfg=None, optimizer="SGD", **settings):
    cfg = dict(optimizer=dict(type=optimizer, lr=LR, weight_decay=DECAY), **settings)
    return DefaultOptimWrapperConstructor(cfg, paramwise_cfg)(model)


def changed(paramwise_cfg, model: nn.Module | None = None, key: str = "weight_decay", optimizer="SGD") -> dict:
    """The parameters whose ``key`` is not the optimizer's own, with the factor."""
    groups = construct(model or Model(), paramwise_cfg, optimizer).optimizer.param_groups
    base = {"lr": LR, "weight_decay": DECAY}[key]
    return {group["param_name"]: group[key] / base for group in groups if group[key] != base}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("paramwise_cfg", [None, {}])
def test_without_paramwise_cfg_one_group_of_all_parameters(optimizer, paramwise_cfg):
    model = Model()
    model.scale.requires_grad_(False)
    wrapper = construct(model, paramwise_cfg, optimizer)
    (group,) = wrapper.param_groups
    assert all(mine is theirs for mine, theirs in zip(group["params"], model.parameters(), strict=True))
    assert "param_name" not in group


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_paramwise_cfg_a_named_group_for_each_parameter_not_frozen(optimizer):
    model = Model()
    model.conv.requires_grad_(False)
    wrapper = construct(model, dict(norm_decay_mult=0.0), optimizer)
    groups = wrapper.optimizer.param_groups
    expected = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    assert [group["param_name"] for group in groups] == [name for name, _ in expected]
    assert all(group["params"][0] is param for group, (_, param) in zip(groups, expected, strict=True))
    assert len(wrapper.param_groups) == len(groups) + 1
    assert wrapper.base_param_settings["lr"] == LR


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestWeightDecay:
    """The first rule that applies and is given wins: norm, bias, depthwise convolution, flat."""

    def test_norm(self, optimizer):
        assert changed(dict(norm_decay_mult=0.5), optimizer=optimizer) == {"bn.weight": 0.5, "bn.bias": 0.5}

    @pytest.mark.parametrize(
        "norm",
        [
            nn.BatchNorm1d(2),
            nn.SyncBatchNorm(2),
            nn.InstanceNorm2d(2, affine=True),
            nn.GroupNorm(1, 2),
            nn.LayerNorm(2),
        ],
        ids=lambda norm: type(norm).__name__,
    )
    def test_what_counts_as_norm(self, optimizer, norm):
        model = nn.Sequential(nn.Linear(2, 2), norm)
        assert changed(dict(norm_decay_mult=0), model, optimizer=optimizer) == {"1.weight": 0, "1.bias": 0}

    def test_bias_alone_reaches_norm_biases_but_not_a_deformable_offset(self, optimizer):
        assert changed(dict(bias_decay_mult=0), optimizer=optimizer) == {
            "conv.bias": 0,
            "bn.bias": 0,
            "dwconv.bias": 0,
            "dcn.bias": 0,
        }

    def test_dwconv_includes_its_bias(self, optimizer):
        assert changed(dict(dwconv_decay_mult=0), optimizer=optimizer) == {"dwconv.weight": 0, "dwconv.bias": 0}

    def test_flat_alone_reaches_norm_weights(self, optimizer):
        assert changed(dict(flat_decay_mult=0), optimizer=optimizer) == {
            "scale": 0,
            "conv.bias": 0,
            "bn.weight": 0,
            "bn.bias": 0,
            "dwconv.bias": 0,
            "dcn.bias": 0,
        }

    def test_all_at_once(self, optimizer):
        rules = dict(flat_decay_mult=4, dwconv_decay_mult=3, bias_decay_mult=2, norm_decay_mult=0.5)
        assert changed(rules, optimizer=optimizer) == pytest.approx(
            {
                "scale": 4,
                "conv.bias": 2,
                "bn.weight": 0.5,
                "bn.bias": 0.5,
                "dwconv.weight": 3,
                "dwconv.bias": 2,
                "dcn.bias": 2,
            }
        )

    def test_without_norm_and_bias_the_depthwise_rule_comes_before_the_flat_one(self, optimizer):
        assert changed(dict(flat_decay_mult=4, dwconv_decay_mult=3), optimizer=optimizer)["dwconv.bias"] == (
            pytest.approx(3)
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestLearningRate:
    def test_bias_is_not_that_of_a_norm_or_a_deformable_offset(self, optimizer):
        assert changed(dict(bias_lr_mult=2), key="lr", optimizer=optimizer) == {
            "conv.bias": 2,
            "dwconv.bias": 2,
            "dcn.bias": 2,
        }

    def test_deformable_offset(self, optimizer):
        assert changed(dict(dcn_offset_lr_mult=0.5, bias_lr_mult=1), key="lr", optimizer=optimizer) == {
            "dcn.conv_offset.weight": 0.5,
            "dcn.conv_offset.bias": 0.5,
        }

    def test_an_offset_outside_a_deformable_convolution_is_an_ordinary_one(self, optimizer):
        model = nn.ModuleDict(dict(conv_offset=nn.Conv2d(2, 2, 3)))
        assert changed(dict(dcn_offset_lr_mult=0.5, bias_lr_mult=2), model, "lr", optimizer) == {"conv_offset.bias": 2}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestCustomKeys:
    def test_the_longest_key_decides_and_ties_go_alphabetically(self, optimizer):
        keys = {"offs": dict(lr_mult=7), "dcn.": dict(lr_mult=5), "conv": dict(lr_mult=2), "conv.bias": dict(lr_mult=3)}
        assert changed(dict(custom_keys=keys), key="lr", optimizer=optimizer) == pytest.approx(
            {
                "conv.weight": 2,
                "conv.bias": 3,
                "dwconv.weight": 2,
                "dwconv.bias": 3,
                "dcn.weight": 5,
                "dcn.bias": 5,
                "dcn.conv_offset.weight": 2,
                "dcn.conv_offset.bias": 2,
            }
        )

    def test_it_switches_the_other_rules_off(self, optimizer):
        rules = dict(custom_keys={"bn": dict(lr_mult=2)}, norm_decay_mult=0, bias_decay_mult=0, bias_lr_mult=3)
        decays = changed(rules, optimizer=optimizer)
        assert "bn.weight" not in decays and "bn.bias" not in decays and decays["conv.bias"] == 0
        assert changed(rules, key="lr", optimizer=optimizer)["bn.bias"] == 2

    def test_every_entry_is_copied_into_the_group(self, optimizer):
        keys = {"bn": dict(lr_mult=0.5, decay_mult=0.0, momentum=0.3, note="norm")}
        groups = {g["param_name"]: g for g in construct(Model(), dict(custom_keys=keys), optimizer).param_groups[:-1]}
        assert groups["bn.weight"] == {
            **groups["conv.weight"],
            "params": groups["bn.weight"]["params"],
            "param_name": "bn.weight",
            "lr": LR * 0.5,
            "weight_decay": 0.0,
            "lr_mult": 0.5,
            "decay_mult": 0.0,
            "momentum": 0.3,
            "note": "norm",
        }

    def test_a_parameter_at_the_root_has_a_dot_before_its_name(self, optimizer):
        assert changed(dict(custom_keys={".scale": dict(lr_mult=2)}), key="lr", optimizer=optimizer) == {"scale": 2}

    def test_a_key_that_matches_nothing_is_a_warning(self, optimizer):
        with pytest.warns(UserWarning, match="'backbone' matches no parameter name and has no effect"):
            construct(Model(), dict(custom_keys={"backbone": dict(lr_mult=2), "bn": {}}), optimizer)

    def test_a_key_that_matches_frozen_parameters_only_is_none(self, optimizer):
        model = Model()
        model.bn.requires_grad_(False)
        construct(model, dict(custom_keys={"bn": dict(lr_mult=2)}), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
class TestSharedParameters:
    @pytest.fixture
    def model(self):
        model = nn.ModuleDict(dict(embed=nn.Linear(3, 3, bias=False), head=nn.Linear(3, 3, bias=False)))
        model.head.weight = model.embed.weight
        return model

    def test_are_an_error_that_names_both(self, optimizer, model):
        with pytest.raises(ValueError, match=r"'head\.weight' is shared: it is also 'embed\.weight'; .*bypass_dup"):
            construct(model, dict(bias_lr_mult=2), optimizer)

    def test_bypass_duplicate_keeps_the_first(self, optimizer, model):
        paramwise_cfg = dict(bypass_duplicate=True, custom_keys={"head": dict(lr_mult=2)})
        (group,) = construct(model, paramwise_cfg, optimizer).param_groups
        assert group["param_name"] == "embed.weight" and group["lr"] == LR

    def test_without_paramwise_cfg_torch_takes_them_once(self, optimizer, model):
        assert len(construct(model, None, optimizer).param_groups[0]["params"]) == 1


class TestWrongConfigs:
    @pytest.mark.parametrize("rule", ["bias_decay_mult", "norm_decay_mult", "dwconv_decay_mult"])
    def test_a_decay_multiplier_needs_weight_decay(self, rule):
        cfg = dict(optimizer=dict(type="SGD", lr=LR))
        with pytest.raises(ValueError, match=f"paramwise_cfg {rule} multiplies weight_decay.*explicitly"):
            DefaultOptimWrapperConstructor(cfg, {rule: 0.0})
        with pytest.raises(ValueError, match=r"\['custom_keys'\]\['bn'\] decay_mult multiplies weight_decay"):
            DefaultOptimWrapperConstructor(cfg, dict(custom_keys={"bn": dict(decay_mult=0.0)}))

    def test_flat_decay_mult_without_weight_decay_does_nothing(self):
        cfg = dict(optimizer=dict(type="SGD", lr=LR))
        wrapper = DefaultOptimWrapperConstructor(cfg, dict(flat_decay_mult=0.5))(Model())
        assert {group["weight_decay"] for group in wrapper.param_groups} == {0}

    @pytest.mark.parametrize("rules", [dict(bias_lr_mult=2), dict(custom_keys={"bn": dict(lr_mult=2)})])
    def test_a_learning_rate_multiplier_needs_lr(self, rules):
        cfg = dict(optimizer=dict(type="Adam", weight_decay=DECAY))
        with pytest.raises(ValueError, match=r"lr_mult multiplies lr, which the optimizer config must.*explicitly"):
            DefaultOptimWrapperConstructor(cfg, rules)
        DefaultOptimWrapperConstructor(cfg, dict(norm_decay_mult=0.0))(Model())

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([1], "paramwise_cfg must be a dict, got list"),
            ((dict(bias_lr_mult=2),), "paramwise_cfg is a tuple.*comma"),
            (dict(custom_keys=["bn"]), r"paramwise_cfg\['custom_keys'\] must be a dict, got list"),
            (dict(custom_keys={"bn": 0.1}), r"\['custom_keys'\]\['bn'\] must be a dict, got float"),
            (dict(custom_keys={1: {}}), "keys must be parts of parameter names, got 1"),
            (dict(bias_lr_mult="2"), "Invalid paramwise_cfg bias_lr_mult: '2'"),
            (dict(custom_keys={"bn": dict(lr_mult="2")}), r"\['bn'\] lr_mult: '2'"),
            (dict(bypass_duplicate=1), "bypass_duplicate must be True or False, got 1"),
        ],
    )
    def test_rules_of_the_wrong_kind(self, rules, message):
        with pytest.raises(TypeError, match=message):
            construct(Model(), rules)

    def test_a_negative_multiplier(self):
        with pytest.raises(ValueError, match="Invalid paramwise_cfg norm_decay_mult: -1"):
            construct(Model(), dict(norm_decay_mult=-1))

    def test_an_unknown_rule_is_a_warning_that_names_the_closest(self):
        with pytest.warns(
            UserWarning, match=r"unknown key 'norm_decay_mul' has no effect; did you mean 'norm_decay_mu"
        ):
            wrapper = construct(Model(), dict(norm_decay_mul=0.0))
        assert {group["weight_decay"] for group in wrapper.param_groups} == {DECAY}
        with pytest.warns(UserWarning, match="unknown key '_delete'"):
            construct(Model(), dict(_delete=True, norm_decay_mult=0.0))

    def test_an_unknown_wrapper_key_is_an_error_that_names_the_closest(self):
        with pytest.raises(ValueError, match=r"unknown key 'acumulative_counts'; did you mean 'accumulative_counts'\?"):
            construct(Model(), acumulative_counts=2)
        with pytest.raises(ValueError, match="optim_wrapper: unknown key 'loss_scale'"):
            construct(Model(), loss_scale="dynamic")
        assert isinstance(construct(Model(), type="AmpOptimWrapper", loss_scale="dynamic"), AmpOptimWrapper)

    def test_the_optimizer_is_a_dict_and_must_be_there(self):
        with pytest.raises(KeyError, match=r"needs the key 'optimizer'.*it has 'type', 'optimiser'"):
            DefaultOptimWrapperConstructor(dict(type="OptimWrapper", optimiser=dict(type="SGD")))
        with pytest.raises(TypeError, match="optimizer must be a dict, got str: 'SGD'"):
            DefaultOptimWrapperConstructor(dict(optimizer="SGD"))
        with pytest.raises(TypeError, match="optim_wrapper must be a dict, got list"):
            DefaultOptimWrapperConstructor([])
        with pytest.raises(KeyError, match=r"'OptmWrapper' is not in the optimizer wrapper registry.*'OptimWrapper'\?"):
            construct(Model(), type="OptmWrapper")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_wrapper_gets_its_own_keys(optimizer):
    wrapper = construct(Model(), optimizer=optimizer, accumulative_counts=3, clip_grad=dict(max_norm=2.0))
    assert type(wrapper) is OptimWrapper and wrapper._accumulative_counts == 3
    if isinstance(wrapper.optimizer, FusedSGD):
        assert wrapper.optimizer.clip_grad["max_norm"] == 2.0


def test_configs_are_never_changed_and_a_constructor_can_serve_again():
    cfg = dict(optimizer=dict(type="SGD", lr=LR, weight_decay=DECAY), clip_grad=dict(type="value", clip_value=1.0))
    rules = dict(custom_keys={"bn": dict(lr_mult=2)}, norm_decay_mult=0.0)
    before = copy.deepcopy((cfg, rules))
    constructor = DefaultOptimWrapperConstructor(cfg, rules)
    first, second = constructor(Model()), constructor(Model())
    assert (cfg, rules) == before
    assert first.get_lr() == second.get_lr()


def test_a_tensor_learning_rate_is_multiplied_too():
    rate = torch.tensor(LR)
    cfg = dict(optimizer=dict(type="FusedSGD", lr=rate))
    wrapper = DefaultOptimWrapperConstructor(cfg, dict(custom_keys={"bn": dict(lr_mult=2)}))(Model())
    groups = {group["param_name"]: group for group in wrapper.param_groups[:-1]}
    assert groups["conv.weight"]["lr"] is rate
    torch.testing.assert_close(groups["bn.weight"]["lr"], 2 * rate)


def test_a_data_parallel_model_is_unwrapped():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.DataParallel(Model())
    assert "module" not in construct(model, dict(norm_decay_mult=0.0)).param_groups[0]["param_name"]


def test_a_model_with_a_part_called_module_is_not():
    model = nn.ModuleDict(dict(module=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    assert len(construct(model).param_groups[0]["params"]) == 4


def test_add_params_can_be_replaced():
    class OneGroup(DefaultOptimWrapperConstructor):
        def add_params(self, params, module, prefix="", is_dcn_module=None):
            params.append(dict(params=list(module.parameters()), lr=self.base_lr * 3, weight_decay=self.base_wd))

    cfg = dict(optimizer=dict(type="SGD", lr=LR, weight_decay=DECAY))
    assert OneGroup(cfg, dict(bias_lr_mult=1))(Model()).get_lr() == {"lr": [LR * 3]}


class TestAddParams:
    """What subclasses may do, as with MMEngine's class."""

    def test_is_called_for_each_child(self):
        class Special(nn.Linear):
            pass

        class Mine(DefaultOptimWrapperConstructor):
            def add_params(self, params, module, prefix="", is_dcn_module=None):
                if isinstance(module, Special):
                    params.extend(dict(params=[param], lr=LR * 7) for param in module.parameters())
                else:
                    super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)

        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Special(2, 2)), nn.Linear(2, 2))
        wrapper = Mine(dict(optimizer=dict(type="SGD", lr=LR)), dict(bias_lr_mult=2))(model)
        assert [group["lr"] / LR for group in wrapper.optimizer.param_groups] == pytest.approx([1, 2, 7, 7, 1, 2])

    def test_duplicates_are_told_from_the_groups(self):
        class Mine(DefaultOptimWrapperConstructor):
            def add_params(self, params, module, prefix="", is_dcn_module=None):
                if not prefix:
                    params.append(dict(params=[module.conv.weight]))
                super().add_params(params, module, prefix, is_dcn_module)

        cfg = dict(optimizer=dict(type="SGD", lr=LR))
        with pytest.raises(ValueError, match=r"'conv\.weight' is shared: it is also 'in a group'"):
            Mine(cfg, dict(bias_lr_mult=2))(Model())
        groups = Mine(cfg, dict(bias_lr_mult=2, bypass_duplicate=True))(Model()).optimizer.param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(Model().parameters()))

    def test_validation_can_be_extended(self):
        class Mine(DefaultOptimWrapperConstructor):
            def _validate_cfg(self):
                super()._validate_cfg()
                raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            Mine(dict(optimizer=dict(type="SGD", lr=LR)))


@pytest.mark.parametrize("rules", [dict(bias_lr_mult=2), dict(custom_keys={"bn": dict(lr_mult=2)})])
def test_the_learning_rate_that_is_multiplied_is_a_number(rules):
    with pytest.raises(TypeError, match=r"Invalid optimizer lr: '0\.1'"):
        DefaultOptimWrapperConstructor(dict(optimizer=dict(type="SGD", lr="0.1")), rules)


@pytest.mark.parametrize("rule", ["bias_decay_mult", "flat_decay_mult"])
def test_the_weight_decay_that_is_multiplied_is_a_number(rule):
    with pytest.raises(TypeError, match=r"Invalid optimizer weight_decay: '0\.1'"):
        DefaultOptimWrapperConstructor(dict(optimizer=dict(type="SGD", lr=LR, weight_decay="0.1")), {rule: 2})


def test_a_whole_config_may_be_handed_to_the_class():
    cfg = dict(optimizer=dict(type="SGD", lr=LR), constructor="DefaultOptimWrapperConstructor")
    assert DefaultOptimWrapperConstructor(cfg)(Model()).get_lr() == {"lr": [LR]}
    with pytest.raises(ValueError, match="optim_wrapper: 'paramwise_cfg' is for build_optim_wrapper"):
        DefaultOptimWrapperConstructor({**cfg, "paramwise_cfg": None})


def test_a_numpy_multiplier_gives_a_plain_number():
    rules = dict(
        bias_lr_mult=np.float32(2), norm_decay_mult=np.float64(0.5), custom_keys={"dcn": dict(lr_mult=np.int64(3))}
    )
    for group in construct(Model(), rules).optimizer.param_groups:
        assert type(group["lr"]) is type(group["weight_decay"]) is float
        assert group["lr"] in (LR, LR * 2, LR * 3)


@pytest.mark.parametrize(
    "rules",
    [
        dict(bias_lr_mul=2),
        dict(custom_keys={"bn": dict(lr_mul=2)}),
        dict(custom_keys={"backbone": dict(lr_mult=2)}),
    ],
)
@pytest.mark.parametrize(
    "build",
    [
        lambda cfg, rules: DefaultOptimWrapperConstructor(cfg, rules)(Model()),
        lambda cfg, rules: build_optim_wrapper(Model(), dict(cfg, paramwise_cfg=rules)),
    ],
    ids=["directly", "from a config"],
)
def test_warnings_point_to_the_callers_line(rules, build):
    with pytest.warns(UserWarning, match="paramwise_cfg") as caught:
        build(dict(optimizer=dict(type="SGD", lr=LR)), rules)
    assert [warning.filename for warning in caught] == [__file__]
