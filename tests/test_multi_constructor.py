"""MultiOptimWrapperConstructor: an optimizer for each part of a model."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import fusedopt
from fusedopt import (
    AmpOptimWrapper,
    FusedAdam,
    MultiOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
    enable_amp,
)


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.discriminator = nn.Linear(3, 1)


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.gan = GAN()
        self.unet = nn.Linear(2, 2)
        self.text_encoder = nn.ModuleDict(dict(embedding=nn.Embedding(4, 2), encoder=nn.Linear(2, 2)))


def adam(lr: float = 1e-3, **settings) -> dict:
    return dict(optimizer=dict(type="FusedAdam", lr=lr), **settings)


def build(model: nn.Module, **cfg) -> OptimWrapper:
    before = copy.deepcopy(cfg)
    wrapper = build_optim_wrapper(model, dict(constructor="MultiOptimWrapperConstructor", **cfg))
    assert cfg == before
    return wrapper


def trained(wrapper: OptimWrapper, model: nn.Module) -> set[str]:
    params = {id(param) for group in wrapper.optimizer.param_groups for param in group["params"]}
    return {name for name, param in model.named_parameters() if id(param) in params}


@pytest.mark.parametrize("prefix", ["", "Fused"])
class TestQuotedConfigs:
    """The GAN configs that this API was asked for with; data, models and the rest of the pages left out."""

    def test_two_optimizers(self, prefix):
        optim_wrapper = dict(
            constructor="MultiOptimWrapperConstructor",
            generator=dict(optimizer=dict(type=prefix + "Adam", lr=0.0002, betas=(0.0, 0.999), eps=1e-6)),
            discriminator=dict(optimizer=dict(type=prefix + "Adam", lr=0.0004, betas=(0.0, 0.999), eps=1e-6)),
        )
        wrapper = build_optim_wrapper(GAN(), optim_wrapper)
        assert type(wrapper) is OptimWrapperDict
        assert wrapper.get_lr() == {"generator.lr": [0.0002], "discriminator.lr": [0.0004]}
        assert wrapper.get_momentum() == {"generator.momentum": [0.0], "discriminator.momentum": [0.0]}

    def test_biggan(self, prefix):
        optim_wrapper = dict(
            constructor="MultiOptimWrapperConstructor",
            generator=dict(
                accumulative_counts=8,
                optimizer=dict(type=prefix + "Adam", lr=0.0001, betas=(0.0, 0.999), eps=1e-6),
            ),
            discriminator=dict(
                accumulative_counts=8,
                optimizer=dict(type=prefix + "Adam", lr=0.0004, betas=(0.0, 0.999), eps=1e-6),
            ),
        )
        wrapper = build_optim_wrapper(GAN(), optim_wrapper)
        assert [single._accumulative_counts for single in wrapper.values()] == [8, 8]


class TestWhatAKeyNames:
    def test_a_module_of_the_first_level(self):
        model = GAN()
        wrapper = build(model, generator=adam(), discriminator=adam(2e-3, clip_grad=dict(max_norm=1.0)))
        assert trained(wrapper["discriminator"], model) == {"discriminator.weight", "discriminator.bias"}
        assert len(trained(wrapper["generator"], model)) == 4
        assert wrapper["generator"].clip_grad is None and wrapper["discriminator"].clip_grad["max_norm"] == 1.0

    def test_or_an_expression_for_full_names_of_modules(self):
        model = Diffusion()
        with pytest.warns(UserWarning, match="no entry claims"):
            wrapper = build(model, **{".*embedding": adam(), r"gan\.generator": adam(), "unet": adam()})
        assert trained(wrapper[".*embedding"], model) == {"text_encoder.embedding.weight"}
        assert trained(wrapper[r"gan\.generator"], model) == {
            f"gan.generator.{i}.{n}" for i in "01" for n in ("weight", "bias")
        }

    def test_an_expression_must_match_the_whole_name(self):
        with pytest.raises(
            ValueError, match="'embedding' is neither a first-level module of the Diffusion nor an expr"
        ):
            build(Diffusion(), embedding=adam())

    def test_modules_put_several_under_one_optimizer(self):
        model = Diffusion()
        wrapper = build(model, texts=adam(modules=["unet", ".*encoder"]), gan=adam())
        assert list(wrapper) == ["texts", "gan"]
        names = {"unet.weight", "unet.bias"} | {name for name, _ in model.named_parameters() if "text_encoder" in name}
        assert trained(wrapper["texts"], model) == names
        assert len(wrapper["texts"].optimizer.param_groups) == 1

    def test_a_module_within_another_that_matches_too_comes_once(self):
        model = Diffusion()
        model.gan.requires_grad_(False)
        model.unet.requires_grad_(False)
        (group,) = build(model, texts=adam(modules=r"text_encoder.*"))["texts"].optimizer.param_groups
        assert len(group["params"]) == len({id(param) for param in group["params"]}) == 3

    def test_modules_at_the_top_give_a_plain_wrapper(self):
        model = Diffusion()
        wrapper = build(model, modules=["unet", "text_encoder"], accumulative_counts=2, **adam())
        assert type(wrapper) is OptimWrapper and type(wrapper.optimizer) is FusedAdam
        assert wrapper._accumulative_counts == 2
        assert len(trained(wrapper, model)) == 5

    def test_inside_distributed_data_parallel(self):
        model = GAN()
        wrapper = build(nn.ModuleDict(dict(module=model)), generator=adam(), discriminator=adam())
        assert len(trained(wrapper["generator"], model)) == 4


class TestUnclaimedParameters:
    def test_are_a_warning_that_names_some(self):
        message = r"claims the parameters 'gan\.gen.*weight', .*, .* and 3 more: they are not trained"
        with pytest.warns(UserWarning, match=message) as caught:
            build_optim_wrapper(
                Diffusion(), dict(constructor="MultiOptimWrapperConstructor", unet=adam(), text_encoder=adam())
            )
        assert [warning.filename for warning in caught] == [__file__]

    def test_unless_they_are_frozen(self):
        model = Diffusion()
        model.gan.requires_grad_(False)
        build(model, unet=adam(), text_encoder=adam())

    def test_or_left_out_by_modules_at_the_top(self):
        build(Diffusion(), modules="unet", **adam())


class TestParamwiseCfg:
    def test_belongs_to_one_module_of_the_first_level(self):
        wrapper = build(
            GAN(),
            generator=dict(
                optimizer=dict(type="FusedAdam", lr=1e-3, weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0)
            ),
            discriminator=adam(),
        )
        decays = {group["param_name"]: group["weight_decay"] for group in wrapper["generator"].optimizer.param_groups}
        assert decays == {"0.weight": 0.1, "0.bias": 0.1, "1.weight": 0.0, "1.bias": 0.0}
        assert "generator.base_lr" in wrapper.get_lr() and "discriminator.base_lr" not in wrapper.get_lr()

    def test_is_refused_elsewhere(self):
        rules = dict(bias_lr_mult=2.0)
        with pytest.raises(ValueError, match="paramwise_cfg is set for each optimizer separately"):
            build(GAN(), generator=adam(), paramwise_cfg=rules)
        with pytest.raises(
            ValueError, match=r"optim_wrapper\['all'\] works for one first-level module only.*'generator',"
        ):
            build(GAN(), all=adam(modules=["generator", "discriminator"], paramwise_cfg=rules))
        with pytest.raises(ValueError, match=r"works for one first-level module only; this entry has 'gan\.generator'"):
            build(Diffusion(), **{"gan.generator": adam(paramwise_cfg=rules)})


class TestWrongConfigs:
    def test_overlapping_expressions_name_the_parameter_and_both_keys(self):
        with pytest.raises(
            ValueError, match=r"'gan\.generator\.0\.weight' belongs to two optimizers: 'gan' and '\.\*gen"
        ):
            build(Diffusion(), gan=adam(), **{".*generator": adam()})

    def test_a_shared_parameter_names_both_places(self):
        model = Diffusion()
        model.unet.weight = model.text_encoder.encoder.weight
        with pytest.raises(ValueError, match=r"'unet\.weight' \(also 'text_encoder\.encoder\.weight'\) belongs to two"):
            build(model, unet=adam(), text_encoder=adam())

    @pytest.mark.parametrize(
        ("cfg", "error", "message"),
        [
            (dict(generatr=adam()), ValueError, r"'generatr' is neither .*did you mean 'generator'\?"),
            ({"gen(": adam()}, ValueError, r"'gen\(' is not a regular expression"),
            (
                dict(generator=adam(modules=3)),
                TypeError,
                r"modules of optim_wrapper\['generator'\] must be a name or a",
            ),
            (dict(generator=adam(modules=[])), TypeError, r"list of names, got \[\]"),
            (dict(modules=[1], **adam()), TypeError, "modules of optim_wrapper must be a name"),
            (dict(generator=[adam()]), TypeError, r"optim_wrapper\['generator'\] must be a dict, got list"),
            (
                dict(generator=dict(optimiser={})),
                KeyError,
                r"\['generator'\] needs the key 'optimizer'; it has 'optimiser",
            ),
            (
                dict(generator=adam(constructor="DefaultOptimWrapperConstructor")),
                ValueError,
                r"optim_wrapper\['generator'\]: 'constructor' belongs at the top level",
            ),
            (dict(generator=adam(clip_gard=None)), ValueError, "unknown key 'clip_gard'; did you mean 'clip_grad'"),
        ],
    )
    def test_say_what_is_wrong(self, cfg, error, message):
        with pytest.raises(error, match=message):
            build(GAN(), **cfg)

    def test_no_entries_train_nothing(self):
        with pytest.warns(UserWarning, match="no entry claims the parameters"):
            wrapper = build(GAN())
        assert type(wrapper) is OptimWrapperDict and len(wrapper) == 0 and wrapper.get_lr() == {}

    def test_a_whole_config_may_be_handed_to_the_class(self):
        cfg = dict(constructor="MultiOptimWrapperConstructor", generator=adam(), discriminator=adam())
        assert set(MultiOptimWrapperConstructor(cfg)(GAN())) == {"generator", "discriminator"}
        assert "constructor" in cfg

    def test_the_config_is_a_dict(self):
        with pytest.raises(TypeError, match="optim_wrapper must be a dict, got list"):
            MultiOptimWrapperConstructor([])


class TestCommonSettings:
    def test_stand_beside_the_entries_which_win(self):
        wrapper = build(
            GAN(), type="AmpOptimWrapper", loss_scale=8.0, generator=adam(loss_scale=2.0), discriminator=adam()
        )
        assert {type(single) for single in wrapper.values()} == {AmpOptimWrapper}
        assert {name: float(scale) for name, scale in wrapper.loss_scale.items()} == dict(
            generator=2.0, discriminator=8.0
        )

    def test_the_scope_is_common(self, monkeypatch):
        monkeypatch.setattr(fusedopt.OPTIM_WRAPPERS, "children", {})
        mine = fusedopt.Registry("optimizer wrapper", parent=fusedopt.OPTIM_WRAPPERS, scope="mine")

        @mine.register_module()
        class MyWrapper(OptimWrapper):
            def __init__(self, optimizer, note=None):
                super().__init__(optimizer)
                self.note = note

        wrapper = build(GAN(), _scope_="mine", type="MyWrapper", note=1, generator=adam(), discriminator=adam())
        assert [type(single) for single in wrapper.values()] == [MyWrapper] * 2 and wrapper["generator"].note == 1

    def test_amp_sets_every_entry(self):
        cfg = dict(
            constructor="MultiOptimWrapperConstructor",
            generator=adam(type="OptimWrapper"),
            discriminator=adam(loss_scale=4.0, type="AmpOptimWrapper"),
        )
        before = copy.deepcopy(cfg)
        amp = enable_amp(cfg)
        assert cfg == before
        wrapper = build_optim_wrapper(GAN(), amp)
        assert {type(single) for single in wrapper.values()} == {AmpOptimWrapper}
        assert {name: float(scale) for name, scale in wrapper.loss_scale.items()} == {
            "generator": 65536.0,
            "discriminator": 4.0,
        }


class TestEnableAmp:
    """What the ``--amp`` of a training script does to a config of one optimizer."""

    @pytest.mark.parametrize("kind", [{}, dict(type="OptimWrapper"), dict(type=fusedopt.OptimWrapper)])
    def test_the_default_wrapper_becomes_the_mixed_precision_one(self, kind):
        assert enable_amp({**kind, **adam()}) == dict(type="AmpOptimWrapper", loss_scale="dynamic", **adam())

    def test_what_is_on_stays_as_it_is(self):
        cfg = dict(type="AmpOptimWrapper", loss_scale=512.0, dtype="bfloat16", **adam())
        assert enable_amp(cfg) == cfg

    def test_another_wrapper_is_refused(self):
        class Mine(OptimWrapper):
            pass

        with pytest.raises(ValueError, match="can be switched on for an OptimWrapper, not for type"):
            enable_amp(dict(type=Mine, **adam()))
        with pytest.raises(ValueError, match="not for type"):
            enable_amp(dict(type=Mine, generator=adam(), discriminator=adam(type="OptimWrapper")))
        with pytest.raises(TypeError, match="optim_wrapper must be a dict"):
            enable_amp(None)

    def test_a_config_without_an_optimizer_is_refused(self):
        with pytest.raises(KeyError, match=r"needs the key 'optimizer', at the top or in its entries; it has 'optimi"):
            enable_amp(dict(optimiser=dict(type="SGD")))
