"""build_optim_wrapper, on the configs that this project was asked for with."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedopt
from fusedopt import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper, build_optim_wrapper
from fusedopt.training.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.layer0 = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.layer1 = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer1(self.norm(self.layer0(x) + self.pos_embed + self.cls_token))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def fused(optim_wrapper: dict) -> dict:
    """The same config with the fused twin of its optimizer: one word changed."""
    optimizer = optim_wrapper["optimizer"]
    return {**optim_wrapper, "optimizer": {**optimizer, "type": f"Fused{optimizer['type']}"}}


def settings_by_name(wrapper: OptimWrapper, key: str) -> dict:
    return {group["param_name"]: group[key] for group in wrapper.optimizer.param_groups}


def build_and_train(optim_wrapper: dict, batches=None) -> tuple[Model, OptimWrapper]:
    """Build twice (the config must survive the first time) and train a few iterations."""
    before = copy.deepcopy(optim_wrapper)
    model = Model()
    build_optim_wrapper(Model(), optim_wrapper)
    wrapper = build_optim_wrapper(model, optim_wrapper)
    assert optim_wrapper == before
    generator = torch.Generator().manual_seed(0)
    for x in batches or [torch.randn(8, 4, generator=generator) for _ in range(3)]:
        with wrapper.optim_context(model):
            loss = F.mse_loss(model(x).float(), x[:, :2])
        wrapper.update_params(loss)
    return model, wrapper


CONFIGS = {
    "sgd": dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.0003, weight_decay=0.0001)),
    "adam": dict(
        type="OptimWrapper",
        optimizer=dict(type="Adam", lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False),
    ),
    "default_type": dict(
        optimizer=dict(type="Adam", lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False)
    ),
    "amp": dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.0003, weight_decay=0.0001)),
    "norm_decay_mult": dict(
        optimizer=dict(type="SGD", lr=0.8, weight_decay=1e-4), paramwise_cfg=dict(norm_decay_mult=0.0)
    ),
    "custom_keys": dict(
        optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0001),
        paramwise_cfg=dict(
            custom_keys={
                "backbone.layer0": dict(lr_mult=0, decay_mult=0),
                "backbone": dict(lr_mult=1),
                "head": dict(lr_mult=0.1),
            }
        ),
    ),
    "clip_grad": dict(
        optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0001), clip_grad=dict(max_norm=35, norm_type=2)
    ),
    "accumulative_counts": dict(optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0001), accumulative_counts=4),
    "no_clip": dict(
        type="OptimWrapper",
        optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=0.0005),
        clip_grad=None,
    ),
    "vit": dict(
        _delete_=True,
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
        paramwise_cfg=dict(
            custom_keys={
                "pos_embed": dict(decay_mult=0.0),
                "cls_token": dict(decay_mult=0.0),
                "norm": dict(decay_mult=0.0),
            }
        ),
    ),
}


@pytest.fixture
def restore_registries(monkeypatch):
    """What a test registers is gone afterwards."""
    for registry in (OPTIMIZERS, OPTIM_WRAPPER_CONSTRUCTORS):
        monkeypatch.setattr(registry, "_modules", dict(registry._modules))


class TestQuotedConfigs:
    @pytest.mark.parametrize("name", CONFIGS)
    def test_trains_alike_with_the_fused_twin(self, name):
        left, stock = build_and_train(CONFIGS[name])
        right, ours = build_and_train(fused(CONFIGS[name]))
        assert type(stock) is type(ours) is OPTIM_WRAPPERS.get(CONFIGS[name].get("type", "OptimWrapper"))
        assert type(ours.optimizer) is getattr(fusedopt, f"Fused{type(stock.optimizer).__name__}")
        # bfloat16 activations, under autocast, turn rounding differences of the weights into larger ones.
        tolerance = dict(rtol=1e-2, atol=1e-4) if name == "amp" else dict(rtol=1e-4, atol=1e-6)
        for expected, actual in zip(left.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, **tolerance)

    @pytest.mark.parametrize("change", [dict, fused])
    def test_the_optimizer_gets_its_arguments(self, change):
        optimizer = build_optim_wrapper(Model(), change(CONFIGS["adam"])).optimizer
        expected = dict(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0, amsgrad=False)
        assert {key: optimizer.defaults[key] for key in expected} == expected

    @pytest.mark.parametrize("change", [dict, fused])
    def test_norm_decay_mult(self, change):
        wrapper = build_optim_wrapper(Model(), change(CONFIGS["norm_decay_mult"]))
        for name, decay in settings_by_name(wrapper, "weight_decay").items():
            assert decay == (0.0 if ".norm." in name else 1e-4)

    @pytest.mark.parametrize("change", [dict, fused])
    def test_custom_keys(self, change):
        wrapper = build_optim_wrapper(Model(), change(CONFIGS["custom_keys"]))
        rates, decays = settings_by_name(wrapper, "lr"), settings_by_name(wrapper, "weight_decay")
        for name in rates:
            if name.startswith("backbone.layer0"):
                assert rates[name] == decays[name] == 0
            else:
                assert rates[name] == pytest.approx(0.001 if name.startswith("head") else 0.01)
                assert decays[name] == 0.0001

    @pytest.mark.parametrize("change", [dict, fused])
    def test_vit_without_weight_decay_on_tokens_and_norms(self, change):
        wrapper = build_optim_wrapper(Model(), change(CONFIGS["vit"]))
        without = {name for name, decay in settings_by_name(wrapper, "weight_decay").items() if decay == 0}
        assert without == {"backbone.cls_token", "backbone.pos_embed", "backbone.norm.weight", "backbone.norm.bias"}
        assert set(settings_by_name(wrapper, "lr").values()) == {0.00006}

    def test_a_trailing_comma_after_the_optimizer_gets_an_error_that_says_so(self):
        optimizer = dict(type="AdamW", lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),  # fmt: skip
        optim_wrapper = dict(
            type="OptimWrapper", optimizer=optimizer, paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)})
        )
        with pytest.raises(
            TypeError, match=r"optimizer is a tuple .*trailing comma, as in `optimizer = dict\(\.\.\.\),`"
        ):
            build_optim_wrapper(Model(), optim_wrapper)

    @pytest.mark.parametrize("change", [dict, fused])
    def test_four_batches_of_64_are_one_of_256(self, change):
        train_dataloader = dict(batch_size=64)
        accumulated = dict(optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0001), accumulative_counts=4)
        data = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))
        small, _ = build_and_train(change(accumulated), data.split(train_dataloader["batch_size"]))

        train_dataloader = dict(batch_size=256)
        plain = dict(optimizer=dict(type="SGD", lr=0.01, weight_decay=0.0001))
        large, _ = build_and_train(change(plain), data.split(train_dataloader["batch_size"]))
        for expected, actual in zip(large.parameters(), small.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)

    def test_an_optimizer_of_ones_own(self, restore_registries):
        Optimizer = torch.optim.Optimizer

        @OPTIMIZERS.register_module()
        class MyOptimizer(Optimizer):
            def __init__(self, params, a, b, c):
                super().__init__(params, dict(lr=a, b=b, c=c))

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param -= group["lr"] * param.grad

        a_value, b_value, c_value = 0.1, 2, 3
        optim_wrapper = dict(optimizer=dict(type="MyOptimizer", a=a_value, b=b_value, c=c_value))
        _, wrapper = build_and_train(optim_wrapper)
        assert isinstance(wrapper.optimizer, MyOptimizer)
        assert wrapper.optimizer.defaults == dict(lr=0.1, b=2, c=3)

    @pytest.mark.parametrize("written_as", ["string", "dict", "class"])
    def test_a_constructor_of_ones_own(self, restore_registries, written_as):
        seen = []

        @OPTIM_WRAPPER_CONSTRUCTORS.register_module()
        class MyOptimWrapperConstructor:
            def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
                seen.append((optim_wrapper_cfg, paramwise_cfg))
                self.build = DefaultOptimWrapperConstructor(optim_wrapper_cfg)

            def __call__(self, model):
                return self.build(model)

        constructor = {
            "string": "MyOptimWrapperConstructor",
            "dict": dict(type="MyOptimWrapperConstructor"),
            "class": MyOptimWrapperConstructor,
        }[written_as]
        optim_wrapper = dict(
            constructor=constructor,
            optimizer=dict(type="SGD", lr=0.1),
            paramwise_cfg=dict(anything="goes"),
        )
        assert isinstance(build_optim_wrapper(Model(), optim_wrapper), OptimWrapper)
        assert seen == [(dict(optimizer=dict(type="SGD", lr=0.1)), dict(anything="goes"))]


class TestTypes:
    @pytest.mark.parametrize("kind", ["AmpOptimWrapper", "fusedopt.AmpOptimWrapper", AmpOptimWrapper])
    @pytest.mark.parametrize("optimizer", ["FusedAdamW", "fusedopt.FusedAdamW", fusedopt.FusedAdamW])
    def test_a_type_is_a_name_a_path_or_a_class(self, kind, optimizer):
        wrapper = build_optim_wrapper(Model(), dict(type=kind, optimizer=dict(type=optimizer), loss_scale=512.0))
        assert type(wrapper) is AmpOptimWrapper and type(wrapper.optimizer) is fusedopt.FusedAdamW

    def test_each_part_may_name_its_scope(self):
        optimizer = dict(type="FusedSGD", lr=0.1, _scope_="fusedopt")
        wrapper = build_optim_wrapper(Model(), dict(type="OptimWrapper", _scope_="fusedopt", optimizer=optimizer))
        assert type(wrapper.optimizer) is fusedopt.FusedSGD

    def test_an_entry_of_the_constructor_is_its_argument(self, restore_registries):
        @OPTIM_WRAPPER_CONSTRUCTORS.register_module()
        class Scaled(DefaultOptimWrapperConstructor):
            def __init__(self, optim_wrapper_cfg, paramwise_cfg=None, factor=1):
                super().__init__(optim_wrapper_cfg, paramwise_cfg)
                self.optimizer_cfg = {**self.optimizer_cfg, "lr": self.base_lr * factor}

        cfg = dict(constructor=dict(type="Scaled", factor=10), optimizer=dict(type="SGD", lr=0.1))
        assert build_optim_wrapper(Model(), cfg).get_lr() == {"lr": [1.0]}
        assert cfg["constructor"] == dict(type="Scaled", factor=10)


class TestWrongConfigs:
    @pytest.mark.parametrize(
        ("cfg", "error", "message"),
        [
            (None, TypeError, "optim_wrapper must be a dict, got NoneType"),
            ((dict(optimizer=dict(type="SGD")),), TypeError, "optim_wrapper is a tuple .*trailing comma"),
            (dict(type="OptimWrapper"), KeyError, "needs the key 'optimizer'"),
            (dict(optimizer=dict(lr=0.1)), KeyError, "optimizer config needs the key 'type'"),
            (
                dict(optimizer=dict(type="AdamX")),
                KeyError,
                r"'AdamX' is not in the optimizer registry.*did you mean 'Adam",
            ),
            (dict(type="AMPOptimWraper", optimizer=dict(type="SGD")), KeyError, "did you mean 'AmpOptimWrapper'"),
            (
                dict(constructor="DefaultOptimWraperConstructor", optimizer=dict(type="SGD")),
                KeyError,
                "did you mean 'DefaultOptimWrapperConstructor'",
            ),
            (dict(constructor=3, optimizer=dict(type="SGD")), TypeError, "constructor must be a dict, got int"),
            (dict(optimizer=dict(type="SGD"), paramwise=dict()), ValueError, "did you mean 'paramwise_cfg'"),
            (dict(optimizer=dict(type="SGD"), clip_gard=None), ValueError, "did you mean 'clip_grad'"),
            (dict(optimizer=dict(type="SGD", momentun=0.9)), TypeError, r"SGD: .*'momentun'; did you mean 'momentum'"),
            (dict(optimizer=dict(type="FusedSGD", lr=-1.0)), ValueError, "Invalid lr: -1"),
            (dict(type="ApexOptimWrapper", optimizer=dict(type="SGD")), NotImplementedError, "use AmpOptimWrapper"),
        ],
    )
    def test_says_what_is_wrong(self, cfg, error, message):
        with pytest.raises(error, match=message):
            build_optim_wrapper(Model(), cfg)

    def test_clip_grad_on_both_sides(self):
        optimizer = dict(type="FusedSGD", lr=0.1, clip_grad=dict(max_norm=1.0))
        assert build_optim_wrapper(Model(), dict(optimizer=optimizer)).optimizer.clip_grad["max_norm"] == 1.0
        with pytest.raises(ValueError, match="set on both"):
            build_optim_wrapper(Model(), dict(optimizer=optimizer, clip_grad=dict(max_norm=1.0)))
