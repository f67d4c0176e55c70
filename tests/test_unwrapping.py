"""A model is the same model whatever torch puts around it or its parts: for learning rates, averages, checkpoints."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusedopt import build_optim_wrapper
from fusedopt.training.averaging import AveragedModel, ExponentialMovingAverage
from fusedopt.training.engine import BaseModel, Runner
from fusedopt.training.unwrapping import (
    bare_copy,
    bare_state_dict,
    fitted_state_dict,
    holders,
    named_children,
    named_modules,
    named_parameters,
    unwrap,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.linear(x)).relu()


class ViT(nn.Module):
    """A backbone whose rule is known by the name of its class."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Linear(3, 3)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ViT()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def data_parallel(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.DataParallel(model)


@pytest.fixture(scope="module", autouse=True)
def _process_group(tmp_path_factory):
    """One process, so that DistributedDataParallel and FSDP can be made."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "DDP": nn.parallel.DistributedDataParallel,
    "DataParallel": data_parallel,
}
#: What is put around, from the inside out.
NESTED = [(), *((name,) for name in AROUND), *itertools.permutations(AROUND, 2), *itertools.permutations(AROUND)]
nested = pytest.mark.parametrize("nest", NESTED, ids="-".join)


def around(model: nn.Module, nest: tuple[str, ...]) -> nn.Module:
    for name in nest:
        model = AROUND[name](model)
    return model


def with_parts_wrapped(model: Model) -> Model:
    """The same model; two of its parts, one within the other, are compiled."""
    model.backbone.layers[1] = compiled(model.backbone.layers[1])
    model.backbone = compiled(model.backbone)
    return model


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1.0)


NAMES = [name for name, _ in Model().named_parameters()]


class TestTheFunctions:
    @nested
    def test_unwrap(self, nest):
        model = Model()
        wrapped = around(model, nest)
        assert unwrap(wrapped) is model
        assert len(list(holders(wrapped))) == len(nest) + 1

    @nested
    def test_names_are_those_of_the_model(self, nest):
        model = Model()
        expected = dict(model.named_parameters())
        modules = [name for name, _ in model.named_modules()]
        wrapped = around(with_parts_wrapped(model), nest)
        assert [name for name, _ in named_parameters(wrapped)] == NAMES
        assert all(param is expected[name] for name, param in named_parameters(wrapped))
        assert [name for name, _ in named_modules(wrapped)] == modules
        assert [name for name, _ in named_children(unwrap(wrapped))] == ["backbone", "head"]
        assert list(bare_state_dict(wrapped)) == list(Model().state_dict())
        assert type(dict(named_children(model))["backbone"]) is ViT

    def test_a_tied_parameter_has_one_name_or_all(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model["b"].weight = model["a"].weight
        model["c"] = model["a"]
        for duplicates in (True, False):
            expected = [name for name, _ in model.named_parameters(remove_duplicate=duplicates)]
            assert [name for name, _ in named_parameters(model, remove_duplicate=duplicates)] == expected

    def test_a_class_of_the_users_with_a_child_called_module_is_no_wrapper(self):
        class Doubled(nn.Module):
            def __init__(self):
                super().__init__()
                self.module = nn.Linear(2, 2)

            def forward(self, x):
                return 2 * self.module(x)

        model = Doubled()
        assert unwrap(model) is model
        assert unwrap(model, by_structure=True) is model.module
        x = torch.ones(1, 2)
        assert torch.equal(ExponentialMovingAverage(model)(x), model(x))

    def test_names_of_which_it_cannot_be_told_stay(self):
        own = ["a.weight", "a.module.weight", "b.module.weight"]
        state = {"a.module.weight": 1, "a.weight": 2, "_orig_mod.module.b.weight": 3, "module.module.a.weight": 4}
        fitted = fitted_state_dict(state, own)
        assert fitted == {"a.module.weight": 1, "a.weight": 2, "b.module.weight": 3, "module.module.a.weight": 4}

    def test_versions_of_modules_come_along(self):
        state = compiled(Model()).state_dict()
        assert "_orig_mod.head.weight" in state
        fitted = fitted_state_dict(state, Model().state_dict())
        assert fitted._metadata["backbone.layers.0.norm"] == {"version": 2}

    def test_activation_checkpointing(self):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model = Model()
        model.head = checkpoint_wrapper(model.head)
        assert [name for name, _ in named_parameters(model)] == NAMES

    def test_a_copy_has_nothing_around_its_parts(self):
        model = around(with_parts_wrapped(Model()), ("compile",))
        copied = bare_copy(model)
        assert [name for name, _ in copied.named_parameters()] == NAMES
        assert type(copied.backbone) is ViT and type(copied.backbone.layers[1]) is Block
        x = torch.randn(4, 3)
        torch.testing.assert_close(copied(x), unwrap(model)(x))


@nested
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
class TestConstructors:
    def groups(self, model: nn.Module, **cfg: Any) -> dict[str, tuple[float, float]]:
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="FusedAdamW", lr=1.0, weight_decay=0.5), **cfg))
        found = {}
        for group in wrapper.optimizer.param_groups:
            for name in group.get("param_names") or [group["param_name"]]:
                found[name] = group["lr"], group["weight_decay"]
        return found

    def check(self, nest: tuple[str, ...], parts: bool, **cfg: Any) -> dict[str, tuple[float, float]]:
        expected = self.groups(Model(), **cfg)
        model = with_parts_wrapped(Model()) if parts else Model()
        assert self.groups(around(model, nest), **cfg) == expected
        return expected

    def test_paramwise(self, nest, parts):
        rules = dict(
            norm_decay_mult=0.0, bias_lr_mult=2.0, custom_keys={"backbone.layers.1.linear": dict(lr_mult=0.25)}
        )
        rates = self.check(nest, parts, paramwise_cfg=rules)
        assert rates["backbone.layers.1.linear.weight"] == (0.25, 0.5)

    @pytest.mark.parametrize(
        ("constructor", "key"),
        [
            ("LearningRateDecayOptimWrapperConstructor", "layer_decay_rate"),
            ("LearningRateDecayOptimizerConstructor", "decay_rate"),
        ],
    )
    def test_layer_decay(self, nest, parts, constructor, key):
        rates = self.check(nest, parts, constructor=constructor, paramwise_cfg={key: 0.5})
        expected = {"backbone.patch_embed": 0.125, "backbone.layers.0.linear": 0.25, "backbone.layers.1.linear": 0.5}
        for name, rate in {**expected, "head": 1.0}.items():
            assert rates[f"{name}.weight"][0] == rate

    def test_depths_of_the_models_own(self, nest, parts):
        class Own(Model):
            def get_layer_depth(self, name):
                assert name in NAMES
                return int(name.startswith("head")), 2

        model = Own()
        model = with_parts_wrapped(model) if parts else model
        rules = dict(layer_decay_rate=0.5)
        rates = self.groups(
            around(model, nest), constructor="LearningRateDecayOptimWrapperConstructor", paramwise_cfg=rules
        )
        assert rates["backbone.layers.1.linear.weight"][0] == 0.5
        assert rates["head.weight"][0] == 1.0

    def test_several_optimizers(self, nest, parts):
        model = with_parts_wrapped(Model()) if parts else Model()
        backbone, head = set(unwrap(model.backbone).parameters()), set(model.head.parameters())
        adam = dict(optimizer=dict(type="FusedAdamW"))
        for key in ("backbone", r"backbone\.(layers|patch_embed)"):
            cfg = {key: adam, "head": adam}
            made = build_optim_wrapper(around(model, nest), dict(constructor="MultiOptimWrapperConstructor", **cfg))
            assert set(made[key].optimizer.param_groups[0]["params"]) == backbone
            assert set(made["head"].optimizer.param_groups[0]["params"]) == head

    def test_the_table_of_parameters(self, nest, parts):
        model = around(with_parts_wrapped(Model()) if parts else Model(), nest)
        wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="FusedAdamW")))
        lines = wrapper.describe(model).splitlines()[1:-1]
        assert [line.split()[0] for line in lines] == NAMES


@nested
class TestAverages:
    def test_made_from_one_and_updated_with_the_other(self, nest):
        for made_from, updated_with in (((), nest), (nest, ())):
            model = Model()
            before = model.head.weight.detach().clone()
            average = ExponentialMovingAverage(around(model, made_from), 0.25)
            average.update_parameters(around(model, updated_with))
            change(model)
            average.update_parameters(around(model, updated_with))
            torch.testing.assert_close(average.module.head.weight, before + 0.25)
            assert list(average.state_dict())[1] == f"module.{NAMES[0]}"

    def test_parts(self, nest):
        model = Model()
        before = model.backbone.layers[1].linear.weight.detach().clone()
        average = ExponentialMovingAverage(model, 0.25)
        average.update_parameters(model)
        wrapped = around(with_parts_wrapped(model), nest)
        change(wrapped)
        average.update_parameters(wrapped)
        torch.testing.assert_close(average.module.backbone.layers[1].linear.weight, before + 0.25)
        own = unwrap(wrapped).head.weight.detach().clone()
        with average.applied_to(wrapped):
            assert torch.equal(unwrap(wrapped).head.weight, average.module.head.weight)
        assert torch.equal(unwrap(wrapped).head.weight, own)

    def test_a_state_from_before(self, nest):
        """Averages used to be copies of the model with all that was around it; and torch's are."""
        model = around(with_parts_wrapped(Model()), nest)
        state = {f"module.{name}": value + 1 for name, value in model.state_dict().items()}
        average = ExponentialMovingAverage(Model())
        average.load_state_dict({"steps": torch.tensor(3), **state})
        assert average.steps == 3
        torch.testing.assert_close(average.module.head.weight, unwrap(model).head.weight + 1)
        other = ExponentialMovingAverage(model)
        other.load_state_dict(average.state_dict())
        torch.testing.assert_close(other.module.head.weight, average.module.head.weight)


def test_torchs_average_of_a_compiled_model():
    model = Model()
    theirs = AveragedModel(compiled(model))
    theirs.update_parameters(compiled(model))
    ours = ExponentialMovingAverage(model)
    ours.load_state_dict(theirs.state_dict())
    assert ours.steps == 1
    assert torch.equal(ours.module.head.weight, model.head.weight)


class Trained(BaseModel):
    def __init__(self):
        super().__init__()
        self.inner = Model()

    def forward(self, x, mode="tensor"):
        y = self.inner(x)
        return {"loss": y.square().mean()} if mode == "loss" else [y]


def runner_of(model: nn.Module, work_dir: Any, **settings: Any) -> Runner:
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[{"x": torch.full((3,), float(each))} for each in range(8)],
            batch_size=4,
            collate_fn=dict(type="default_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type="FusedSGD", lr=0.1, momentum=0.9)),
        custom_hooks=[dict(type="EMAHook", momentum=0.5)],
        randomness=dict(seed=1),
        **settings,
    )


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in named_parameters(model)}


@pytest.mark.parametrize("writer", ["plain", "compiled", "parts", "DDP"])
@pytest.mark.parametrize("reader", ["plain", "compiled", "parts", "DDP"])
def test_checkpoints_of_the_engine(tmp_path, writer, reader):
    def make(kind: str) -> nn.Module:
        torch.manual_seed(0)
        model = Trained()
        if kind == "parts":
            model.inner.backbone = compiled(model.inner.backbone)
        if kind == "DDP":
            from fusedopt.training.engine import MMDistributedDataParallel

            return MMDistributedDataParallel(model)
        return compiled(model) if kind == "compiled" else model

    first = runner_of(make(writer), tmp_path / "first")
    first.train()
    expected = trained_weights(first.model)
    path = tmp_path / "first" / "epoch_1.pth"
    checkpoint = torch.load(path, weights_only=True)
    plain_names = list(Trained().state_dict())
    assert list(checkpoint["state_dict"]) == plain_names
    assert [name for name in checkpoint["ema_state_dict"] if name != "steps"] == [f"module.{n}" for n in plain_names]

    resumed = runner_of(make(reader), tmp_path / "second", load_from=str(path), resume=True)
    resumed.train()
    for name, value in trained_weights(resumed.model).items():
        assert torch.equal(value, expected[name]), name

    loaded = runner_of(make(reader), tmp_path / "third")
    loaded.load_checkpoint(str(path), strict=True)
    for name, value in trained_weights(loaded.model).items():
        assert torch.equal(value, checkpoint["state_dict"][name]), name


def test_a_file_of_a_compiled_model_that_torch_wrote(tmp_path):
    written = compiled(Trained())
    change(written)
    torch.save(written.state_dict(), tmp_path / "weights.pth")
    runner = runner_of(Trained(), tmp_path / "run")
    runner.load_checkpoint(str(tmp_path / "weights.pth"), strict=True)
    for name, value in trained_weights(runner.model).items():
        assert torch.equal(value, dict(named_parameters(written))[name])


class TestFullyShardedDataParallel:
    @staticmethod
    def sharded(model: nn.Module, **settings: Any) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)

    @pytest.mark.parametrize("outside", [(), ("compile",)], ids=["bare", "compile"])
    def test_names(self, outside):
        model = Model()
        wrapped = around(self.sharded(model, use_orig_params=True), outside)
        assert unwrap(wrapped) is model
        assert [name for name, _ in named_parameters(wrapped)] == NAMES
        rates = build_optim_wrapper(
            wrapped,
            dict(
                optimizer=dict(type="FusedAdamW", lr=1.0),
                constructor="LearningRateDecayOptimWrapperConstructor",
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        ).optimizer.param_groups
        assert [group["lr"] for group in rates if group["param_name"] == "backbone.layers.0.linear.weight"] == [0.25]

    def test_the_state_is_the_one_that_fsdp_gathers(self):
        model = Model()
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = bare_state_dict(self.sharded(model))
        assert list(state) == list(expected)
        for name, value in expected.items():
            assert torch.equal(state[name], value)

    @pytest.mark.parametrize("use_orig_params", [False, True])
    def test_shards_are_not_averaged(self, use_orig_params):
        with pytest.raises(ValueError, match=r"parameter '.*' is a shard of a FullyShardedDataParallel model.*summon"):
            ExponentialMovingAverage(self.sharded(Model(), use_orig_params=use_orig_params))
