"""Numbers of other packages are numbers wherever they come in, and Python's in every checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKENDS, backend_name, each_optimizer
from optimizers import TESTED
from torch import nn

import fusedopt
from fusedopt import build_optim_wrapper
from fusedopt.messages import check_number, check_whole_number, plain, plain_groups, plain_settings
from fusedopt.training.averaging import ExponentialMovingAverage, MomentumAnnealingEMA
from fusedopt.training.engine import BaseModel, Hook, Runner
from fusedopt.training.engine.checkpoint import read_checkpoint, write_checkpoint
from fusedopt.training.registry import PARAM_SCHEDULERS
from fusedopt.training.schedulers import build_param_schedulers

#: What a number may be, as functions of one that all of them hold exactly.
KINDS: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "array": np.array,
    "float32-array": lambda value: np.array(value, dtype=np.float32),
    "Fraction": Fraction,
    "Decimal": Decimal,
}
WHOLE: dict[str, Any] = {"int64": np.int64, "int32-array": lambda value: np.array(value, dtype=np.int32)}


def through_a_file(state: Any) -> Any:
    """``state`` saved and read with weights_only=True."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_plain(value: Any) -> None:
    """No number of another package, and no subclass of Python's, is anywhere within."""
    if isinstance(value, dict):
        for item in value.values():
            assert_plain(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            assert_plain(item)
    else:
        assert isinstance(value, torch.Tensor) or type(value) in (float, int, bool, str, type(None)), repr(value)


def settings_without_params(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def assert_saves(optimizer: Any) -> None:
    """Its state dict goes through a file and back, and its groups hold Python's numbers."""
    state = optimizer.state_dict()
    assert_plain(state["param_groups"])
    optimizer.load_state_dict(through_a_file(state))
    for group in optimizer.param_groups:
        assert_plain(settings_without_params(group))


def one_step(optimizer: Any, param: torch.Tensor) -> torch.Tensor:
    param.grad = torch.full_like(param, 0.75)
    optimizer.step()
    return param.detach().clone()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
class TestOptimizers:
    def check(self, cls: Any, kind: str, backend: str, given: dict[str, Any], expected: dict[str, Any]) -> None:
        """One step with ``given`` is that with ``expected``, and the state dict can be read."""
        results = []
        for settings in (given, expected):
            param = nn.Parameter(torch.ones(5))
            optimizer = cls([param], **settings, backend=backend_name(backend))
            results.append(one_step(optimizer, param))
            results.append(one_step(optimizer, param))
            assert_plain(optimizer.defaults)
            assert_saves(optimizer)
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])

    def test_adam(self, kind, backend):
        n = KINDS[kind]
        self.check(
            fusedopt.FusedAdamW,
            kind,
            backend,
            dict(lr=n(0.25), betas=[n(0.5), n(0.75)], eps=n(0.125), weight_decay=n(0.5), amsgrad=np.bool_(True)),
            dict(lr=0.25, betas=[0.5, 0.75], eps=0.125, weight_decay=0.5, amsgrad=True),
        )

    @each_optimizer
    def test_every_setting(self, kind, backend, cls):
        expected, _ = TESTED[cls.rule.name].matters
        n = KINDS[kind]
        given = {key: tuple(map(n, value)) if isinstance(value, tuple) else n(value) for key, value in expected.items()}
        self.check(cls, kind, backend, given, expected)

    def test_clipping(self, kind, backend):
        n = KINDS[kind]
        for given, expected in (
            (dict(max_norm=n(0.25), norm_type=n(2.0)), dict(max_norm=0.25)),
            (dict(type="value", clip_value=n(0.25)), dict(type="value", clip_value=0.25)),
        ):
            self.check(
                fusedopt.FusedSGD, kind, backend, dict(lr=1.0, clip_grad=given), dict(lr=1.0, clip_grad=expected)
            )
            optimizer = fusedopt.FusedSGD([nn.Parameter(torch.ones(2))], clip_grad=given)
            assert_plain(optimizer.clip_grad)

    def test_of_a_group(self, kind, backend):
        n = KINDS[kind]
        first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        group = {"params": [first], "lr": n(0.25), "lr_scale": n(0.5)}
        optimizer = fusedopt.FusedSGD([group], backend=backend_name(backend))
        optimizer.add_param_group({"params": [second], "lr": n(0.5)})
        assert [each["lr"] for each in optimizer.param_groups] == [0.25, 0.5]
        for each in optimizer.param_groups:
            assert_plain(settings_without_params(each))
        second.grad = torch.ones(3)
        one_step(optimizer, first)
        assert second.tolist() == [0.5] * 3
        assert_saves(optimizer)

    def test_assigned_between_steps(self, kind, backend):
        param = nn.Parameter(torch.ones(3))
        optimizer = fusedopt.FusedSGD([param], lr=1.0, backend=backend_name(backend))
        optimizer.register_step_pre_hook(
            lambda optimizer, *_: optimizer.param_groups[0].update(lr=KINDS[kind](0.5), initial_lr=KINDS[kind](1.0))
        )
        assert one_step(optimizer, param).tolist() == [1 - 0.5 * 0.75] * 3
        assert_plain(settings_without_params(optimizer.param_groups[0]))  # by the step, for who looks at the groups
        assert_saves(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.5

    def test_as_arguments_of_the_step(self, kind, backend):
        param = nn.Parameter(torch.ones(3))
        optimizer = fusedopt.FusedSGD([param], lr=1.0, backend=backend_name(backend))
        param.grad = torch.full_like(param, 1.5)
        optimizer.step(grad_scale=KINDS[kind](2.0))
        assert param.tolist() == [0.25] * 3


def test_a_list_of_betas_stays_the_same_list():
    betas = [np.float32(0.5), np.float64(0.75)]
    optimizer = fusedopt.FusedAdam([nn.Parameter(torch.ones(2))])
    optimizer.param_groups[0]["betas"] = betas
    optimizer.state_dict()
    assert optimizer.param_groups[0]["betas"] is betas
    assert_plain(betas)


def test_loaded_settings_are_pythons_and_tensors_stay_tensors():
    lr = torch.tensor(0.5)
    optimizer = fusedopt.FusedAdam([nn.Parameter(torch.ones(2))], lr=lr)
    assert optimizer.param_groups[0]["lr"] is lr
    state = optimizer.state_dict()
    state["param_groups"][0].update(lr=np.float32(0.25), betas=(np.float64(0.5), np.float64(0.5)))
    optimizer.load_state_dict(state)
    assert_plain(settings_without_params(optimizer.param_groups[0]))
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("again", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_and_twins_hold_pythons_numbers(again):
    param = nn.Parameter(torch.ones(2))
    stock = torch.optim.AdamW([param], lr=np.float64(0.5), weight_decay=np.float64(0.25))
    twin = fusedopt.fuse(stock, clip_grad=dict(max_norm=np.float32(0.5)))
    assert twin.param_groups[0] is stock.param_groups[0]
    for each in (twin, again(twin)):
        assert_plain(settings_without_params(each.param_groups[0]))
        assert_plain(each.clip_grad)
        assert each.clip_grad["max_norm"] == 0.5


@pytest.mark.parametrize("kind", KINDS)
class TestScalers:
    def test_scaler(self, kind):
        n = KINDS[kind]
        scaler = fusedopt.amp.GradScaler("cpu", n(8.0), n(4.0), n(0.5), np.int64(3))
        param = nn.Parameter(torch.ones(2))
        optimizer = fusedopt.FusedSGD([param], lr=1.0)
        scaler.scale((param * 0.5).sum()).backward()
        scaler.step(optimizer)
        scaler.update(n(2.0))
        assert param.tolist() == [0.5, 0.5]
        scaler.set_growth_factor(n(2.0))
        scaler.set_backoff_factor(n(0.25))
        scaler.set_growth_interval(np.int64(5))
        state = scaler.state_dict()
        assert_plain(state)
        scaler.load_state_dict({key: n(value) if type(value) is float else value for key, value in state.items()})
        expected = {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.25, "growth_interval": 5}
        assert through_a_file(scaler.state_dict()).items() >= expected.items()
        assert_plain(scaler.state_dict())

    @pytest.mark.parametrize("optimizer", ["FusedSGD", "SGD"])
    def test_wrapper(self, kind, optimizer):
        n = KINDS[kind]
        for loss_scale in (n(8.0), dict(init_scale=n(8.0), growth_factor=n(4.0))):
            wrapper = build_optim_wrapper(
                nn.Linear(2, 1),
                dict(
                    type="AmpOptimWrapper",
                    loss_scale=loss_scale,
                    dtype="bfloat16",
                    accumulative_counts=np.int64(1),
                    optimizer=dict(type=optimizer, lr=n(0.5), weight_decay=n(0.25)),
                    clip_grad=dict(max_norm=n(0.5)),
                    paramwise_cfg=dict(bias_lr_mult=n(0.5), custom_keys={"weight": dict(lr_mult=n(0.25), note=n(1.0))}),
                ),
            )
            wrapper.initialize_count_status(nn.Linear(2, 1), np.int64(0), np.int64(10))
            wrapper.update_params((wrapper.optimizer.param_groups[0]["params"][0] * 2).sum())
            assert [group["lr"] for group in wrapper.param_groups] == [0.125, 0.25, 0.5]
            wrapper.optimizer.param_groups[0]["lr"] = n(0.75)
            wrapper.base_param_settings["lr"] = n(1.5)
            state = wrapper.state_dict()
            assert_plain({**state, "state": {}})
            wrapper.load_state_dict(through_a_file(state))
            assert wrapper.get_lr() == {"base_lr": [1.5], "lr": [0.75, 0.25]}
            assert float(wrapper.loss_scale) == 8.0


#: The arguments of each scheduler but those that count steps; ``n`` makes the number.
ARGUMENTS: dict[str, Any] = {
    "ConstantLR": lambda n: dict(factor=n(0.5)),
    "ConstantMomentum": lambda n: dict(factor=n(0.5)),
    "ConstantParamScheduler": lambda n: dict(param_name="lr", factor=n(0.5)),
    "CosineAnnealingLR": lambda n: dict(T_max=n(4), eta_min=n(0.125)),
    "CosineAnnealingMomentum": lambda n: dict(T_max=n(4), eta_min_ratio=n(0.125)),
    "CosineAnnealingParamScheduler": lambda n: dict(param_name="lr", T_max=n(4), eta_min=n(0.125)),
    "CosineAnnealingWeightDecay": lambda n: dict(T_max=n(4), eta_min=n(0.125)),
    "CosineRestartLR": lambda n: dict(periods=[n(2), n(4)], restart_weights=[n(1), n(0.5)], eta_min=n(0.125)),
    "CosineRestartMomentum": lambda n: dict(periods=[n(2), n(4)], restart_weights=[n(1), n(0.5)]),
    "CosineRestartParamScheduler": lambda n: dict(param_name="lr", periods=[n(2)], restart_weights=[n(0.5)]),
    "ExponentialLR": lambda n: dict(gamma=n(0.5)),
    "ExponentialMomentum": lambda n: dict(gamma=n(0.5)),
    "ExponentialParamScheduler": lambda n: dict(param_name="lr", gamma=n(0.5)),
    "LinearLR": lambda n: dict(start_factor=n(0.5), end_factor=n(0.75), end=n(4)),
    "LinearMomentum": lambda n: dict(start_factor=n(0.5), end_factor=n(0.75), end=n(4)),
    "LinearParamScheduler": lambda n: dict(param_name="lr", start_factor=n(0.5), end=n(4)),
    "MultiStepLR": lambda n: dict(milestones=[n(1), n(2)], gamma=n(0.5)),
    "MultiStepMomentum": lambda n: dict(milestones=[n(1), n(2)], gamma=n(0.5)),
    "MultiStepParamScheduler": lambda n: dict(param_name="lr", milestones=[n(1)], gamma=n(0.5)),
    "OneCycleLR": lambda n: dict(eta_max=n(0.5), total_steps=n(8), pct_start=n(0.25), div_factor=n(4)),
    "OneCycleParamScheduler": lambda n: dict(param_name="lr", eta_max=[n(0.5)] * 2, total_steps=n(8)),
    "PolyLR": lambda n: dict(eta_min=n(0.125), power=n(2), end=n(6)),
    "PolyMomentum": lambda n: dict(eta_min=n(0.125), power=n(2), end=n(6)),
    "PolyParamScheduler": lambda n: dict(param_name="lr", eta_min=n(0.125), power=n(2), end=n(6)),
    "ReduceOnPlateauLR": lambda n: dict(factor=n(0.5), patience=n(0), threshold=n(0.25), min_value=n(0), eps=n(0)),
    "ReduceOnPlateauMomentum": lambda n: dict(factor=n(0.5), patience=n(0)),
    "ReduceOnPlateauParamScheduler": lambda n: dict(param_name="lr", factor=n(0.5), patience=n(0), cooldown=n(1)),
    "ReduceLROnPlateau": lambda n: dict(factor=n(0.5), patience=n(0), min_lr=[n(0), n(0)]),
    "StepLR": lambda n: dict(step_size=n(2), gamma=n(0.5)),
    "StepMomentum": lambda n: dict(step_size=n(2), gamma=n(0.5)),
    "StepParamScheduler": lambda n: dict(param_name="lr", step_size=n(2), gamma=n(0.5)),
    "CosineAnnealingWarmRestarts": lambda n: dict(T_0=4, eta_min=n(0.125)),
    "CyclicLR": lambda n: dict(base_lr=n(0.125), max_lr=n(0.5), step_size_up=n(2), cycle_momentum=False),
    "LambdaLR": lambda n: dict(lr_lambda=lambda step: n(0.5) if step else n(1)),
    "MultiplicativeLR": lambda n: dict(lr_lambda=lambda step: n(0.5)),
    "SWALR": lambda n: dict(swa_lr=n(0.125), anneal_epochs=2),
}


#: Every scheduler; one that has no arguments above fails.
OURS = sorted(name for name, cls in PARAM_SCHEDULERS.module_dict.items() if cls.__module__.startswith("fusedopt."))

#: A product of these with a float is no number of theirs, which only torch's rules with a function would meet.
NOT_FLOATS = ("Decimal",)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("optimizer", ["FusedSGD", "SGD"])
def test_schedulers(name, kind, optimizer):
    if kind in NOT_FLOATS and name in ("LambdaLR", "MultiplicativeLR"):
        pytest.skip("a Decimal cannot be multiplied with a float")
    histories = []
    for number in (KINDS[kind], lambda value: value):
        params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
        own = number if optimizer == "FusedSGD" else float  # torch's SGD does not take them all
        settings = dict(type=optimizer, lr=own(0.5), momentum=own(0.5), weight_decay=own(0.25))
        made = fusedopt.OPTIMIZERS.build(settings, [{"params": [param]} for param in params])
        made.param_groups[0]["lr"] = own(0.25)
        [scheduler] = build_param_schedulers(dict(type=name, **ARGUMENTS[name](number)), made)
        history = []
        for epoch in range(6):
            for param in params:
                param.grad = torch.ones(2)
            made.step()
            scheduler.step(*([{"loss": number(1.0)}] if getattr(scheduler, "need_val_args", False) else []))
            history.append(
                [[float(group[key]) for key in ("lr", "momentum", "weight_decay")] for group in made.param_groups]
            )
            assert_plain([group[scheduler.param_name] for group in made.param_groups])
            assert_plain(scheduler.get_last_value())
            if epoch == 3:
                state = scheduler.state_dict()
                assert_plain(state)
                read = through_a_file(state)
                scheduler.load_state_dict({**state, **{key: read[key] for key in read if key != "milestones"}})
        histories.append(history)
        if optimizer == "FusedSGD":
            assert_saves(made)
    assert histories[0] == histories[1]


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_schedulers(kind):
    if kind in NOT_FLOATS:
        pytest.skip("a Decimal cannot be multiplied with a float")
    param = nn.Parameter(torch.ones(2))
    optimizer = fusedopt.FusedSGD([param], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: KINDS[kind](0.5))
    assert one_step(optimizer, param).tolist() == [1 - 0.25 * 0.75] * 2
    scheduler.step()
    assert_saves(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_layer_decay(kind):
    n = KINDS[kind]

    class Layered(nn.Sequential):
        def get_layer_depth(self, name):
            return int(name[0]), 2

    model = Layered(nn.Linear(2, 2), nn.Linear(2, 1))
    for constructor, rules in (
        ("LearningRateDecayOptimWrapperConstructor", dict(layer_decay_rate=n(0.5))),
        ("LearningRateDecayOptimizerConstructor", dict(decay_rate=n(0.5), num_layers=np.int64(2))),
    ):
        wrapper = build_optim_wrapper(
            model,
            dict(
                optimizer=dict(type="AdamW", lr=n(1.0), weight_decay=n(0.5)),
                constructor=constructor,
                paramwise_cfg=rules,
            ),
        )
        assert {group["lr"] for group in wrapper.optimizer.param_groups} == {0.5, 1.0}
        for group in wrapper.optimizer.param_groups:
            assert_plain(settings_without_params(group))
        through_a_file(wrapper.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_averages(kind):
    model = nn.Linear(2, 1)
    average = ExponentialMovingAverage(model, KINDS[kind](0.25), interval=np.int64(1))
    annealed = MomentumAnnealingEMA(model, KINDS[kind](0.25), gamma=np.int64(1))
    before = model.weight.detach().clone()
    for each in (average, annealed):
        each.update_parameters(model)
    with torch.no_grad():
        model.weight.add_(1.0)
    for each, weight in ((average, 0.25), (annealed, 0.5)):
        each.update_parameters(model)
        assert_plain([each.momentum, each.interval])
        torch.testing.assert_close(each.module.weight, before + weight)


def test_checkpoints_of_the_engine(tmp_path):
    given = {"meta": {"best": np.float32(0.5), "epochs": [np.int64(3)]}, "counts": Counter({3: np.int64(2)})}
    write_checkpoint(given, tmp_path / "file.pth")
    read = read_checkpoint(tmp_path / "file.pth")
    assert read == {"meta": {"best": 0.5, "epochs": [3]}, "counts": {3: 2}}
    assert_plain(read)
    assert type(given["meta"]["best"]) is np.float32


class TestPlain:
    @pytest.mark.parametrize("kind", KINDS)
    def test_numbers(self, kind):
        value = plain(KINDS[kind](0.25))
        assert (type(value), value) == (float, 0.25)
        assert check_number("x", KINDS[kind](0.25)) == 0.25
        assert type(check_number("x", KINDS[kind](0.25))) is float

    @pytest.mark.parametrize("kind", WHOLE)
    def test_whole_numbers(self, kind):
        assert type(plain(WHOLE[kind](3))) is int
        assert type(check_whole_number("x", WHOLE[kind](3))) is int

    def test_float32_keeps_the_value_it_has(self):
        assert plain(np.float32(0.1)) == 0.10000000149011612

    @pytest.mark.parametrize(
        "value",
        [np.array([1.0]), np.array("a"), np.complex64(1), 1j, "1", None, [1.0]],
        ids=lambda each: repr(each)[:20],
    )
    def test_what_is_no_number_stays_what_it_is(self, value):
        assert plain(value) is value
        with pytest.raises((TypeError, ValueError), match=r"Invalid lr: .*expected a number"):
            fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], lr=value)

    def test_a_flag_is_no_number(self):
        assert plain(np.bool_(True)) is True
        with pytest.raises(TypeError, match="Invalid lr: True"):
            fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], lr=np.bool_(True))

    def test_not_a_number_is_refused(self):
        with pytest.raises(ValueError, match="Invalid lr: nan"):
            fusedopt.FusedSGD([nn.Parameter(torch.ones(1))], lr=np.float64("nan"))

    def test_settings_are_copied_where_something_changes(self):
        class Config(dict[str, Any]):
            pass

        plain_one, other = {"a": [1.0, {"b": 2}]}, Config(a=[np.float32(1)], b=({"c": np.int64(2)},))
        assert plain_settings(plain_one) is plain_one
        made = plain_settings(other)
        assert type(made) is Config
        assert made == {"a": [1.0], "b": ({"c": 2},)}
        assert type(other["a"][0]) is np.float32

    def test_groups_are_changed_in_place(self):
        group = {"params": [np.float32(1)], "lr": np.float32(1), "name": "x"}
        plain_groups([group])
        assert type(group["lr"]) is float
        assert type(group["params"][0]) is np.float32


class Scheduling(Hook):
    """A hook of a user's who schedules with NumPy, and leaves numbers in the message hub."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = np.float32(0.5) / (runner.iter + 1)
        runner.message_hub.update_info("rate", np.float64(0.5) / (runner.iter + 1))
        runner.message_hub.update_scalar("train/rate", np.float32(0.5))


@pytest.mark.parametrize("optimizer", ["FusedSGD", "SGD"])
def test_a_hook_that_schedules_in_a_run(tmp_path, optimizer):
    class Model(BaseModel):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, mode="tensor"):
            return {"loss": (self.weight * x).mean()}

    def runner(**settings: Any) -> Runner:
        return Runner(
            model=Model(),
            work_dir=str(tmp_path),
            train_dataloader=dict(
                dataset=[{"x": torch.ones(())}] * 4, batch_size=2, collate_fn=dict(type="default_collate")
            ),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type=optimizer, lr=np.float64(0.5), momentum=np.float32(0.0))),
            custom_hooks=[Scheduling()],
            randomness=dict(seed=np.int64(3)),
            **settings,
        )

    first = runner()
    first.train()
    expected = -(0.5 + 0.5 / 2 + 0.5 / 3 + 0.5 / 4)
    assert first.model.weight.item() == pytest.approx(expected, rel=1e-6)
    checkpoint = torch.load(tmp_path / "epoch_1.pth", weights_only=True)
    assert checkpoint["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert checkpoint["message_hub"]["runtime_info"]["rate"] == 0.25
    resumed = runner(load_from=str(tmp_path / "epoch_1.pth"), resume=True)
    resumed.train()
    assert resumed.model.weight.item() == first.model.weight.item()
