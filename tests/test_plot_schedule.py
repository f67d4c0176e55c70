"""simulate_schedule and plot_schedule: the values of a training without it, and their picture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusedopt import build_optim_wrapper
from fusedopt.training.registry import MODELS
from fusedopt.training.schedulers import ExponentialLR, build_param_schedulers, plot_schedule, simulate_schedule


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))


CONFIG = dict(
    optim_wrapper=dict(
        optimizer=dict(type="FusedAdamW", lr=0.1, weight_decay=0.05),
        paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys={"0.": dict(lr_mult=0.5)}),
    ),
    train_cfg=dict(by_epoch=True, max_epochs=6),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, end=2, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", begin=2, eta_min_ratio=0.1, convert_to_iter_based=True),
        dict(type="MultiStepParamScheduler", param_name="weight_decay", milestones=[3, 5], gamma=0.5),
        dict(type="CosineAnnealingMomentum", eta_min=0.8),
    ],
)


def curve_of(schedule, param_name, group, optimizer=""):
    [found] = [
        curve
        for curve in schedule.curves
        if (curve.optimizer, curve.param_name) == (optimizer, param_name) and group in curve.groups
    ]
    return found


def test_the_values_are_those_of_the_training() -> None:
    before = copy.deepcopy(CONFIG)
    schedule = simulate_schedule(CONFIG, model=Net(), epoch_length=5)
    assert before == CONFIG
    wrapper = build_optim_wrapper(Net(), CONFIG["optim_wrapper"])
    schedulers = build_param_schedulers(CONFIG["param_scheduler"], wrapper, 5, 6, 30)
    assert (schedule.unit, schedule.ticks, schedule.epoch_length) == ("iteration", 30, 5)
    for iteration in range(30):
        for number, group in enumerate(wrapper.optimizer.param_groups):
            for key in ("lr", "weight_decay", "momentum"):
                assert curve_of(schedule, key, number).values[iteration].item() == group[key]
        wrapper.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % 5 == 0:
                scheduler.step()


def test_groups_with_the_same_values_share_a_curve() -> None:
    schedule = simulate_schedule(CONFIG, model=Net(), epoch_length=5)
    by_key = {
        key: sorted(curve.groups for curve in schedule.curves if curve.param_name == key)
        for key in ("lr", "weight_decay", "momentum")
    }
    assert by_key == {
        "lr": [(0, 1), (2, 3, 4, 5)],
        "weight_decay": [(0, 1, 4, 5), (2, 3)],
        "momentum": [(0, 1, 2, 3, 4, 5)],
    }
    assert curve_of(schedule, "weight_decay", 2).names == ("1.weight", "1.bias")


def test_spans_are_in_ticks() -> None:
    warmup, cosine, steps, momentum = simulate_schedule(CONFIG, model=Net(), epoch_length=5).spans
    assert (warmup.begin, warmup.end, warmup.is_warmup) == (0, 10, True)
    assert (cosine.begin, cosine.end, cosine.is_warmup) == (10, 30, False)
    assert (steps.begin, steps.end, steps.marks) == (0, 30, (15, 25))
    assert (momentum.scheduler, momentum.param_name) == ("CosineAnnealingMomentum", "momentum")


def test_where_nothing_changes_within_an_epoch_a_tick_is_one() -> None:
    cfg = {**CONFIG, "param_scheduler": dict(type="StepLR", step_size=2, gamma=0.5)}
    schedule = simulate_schedule(cfg, model=Net())
    assert (schedule.unit, schedule.ticks) == ("epoch", 6)
    assert curve_of(schedule, "lr", 5).values.tolist() == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_several_optimizers_have_curves_of_their_own() -> None:
    cfg = dict(
        optim_wrapper=dict(
            constructor="MultiOptimWrapperConstructor",
            gen=dict(optimizer=dict(type="SGD", lr=0.1)),
            disc=dict(optimizer=dict(type="Adam", lr=0.2)),
        ),
        train_cfg=dict(max_iters=4),
        param_scheduler=dict(
            gen=dict(type="ExponentialLR", gamma=0.5, by_epoch=False),
            disc=dict(type="ReduceOnPlateauLR"),
        ),
    )
    with pytest.warns(UserWarning, match="a scheduler by epoch never advances in training by iterations"):
        schedule = simulate_schedule(cfg)
    assert curve_of(schedule, "lr", 0, "gen").values.tolist() == [0.1, 0.05, 0.025, 0.0125]
    assert curve_of(schedule, "lr", 0, "disc").values.tolist() == [0.2] * 4
    assert [(span.optimizer, span.needs_metrics) for span in schedule.spans] == [("gen", False), ("disc", True)]


def test_lists_with_a_value_for_each_group_keep_the_groups_apart() -> None:
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=dict(bias_lr_mult=1.0)),
        train_cfg=dict(max_epochs=3),
        param_scheduler=dict(type="OneCycleLR", eta_max=[1.0, 2.0]),
    )
    model = nn.Sequential(nn.Linear(1, 1))
    schedule = simulate_schedule(cfg, model=model)
    assert [curve.groups for curve in schedule.curves if curve.param_name == "lr"] == [(0,), (1,)]
    torch.testing.assert_close(schedule.curves[1].values, 2 * schedule.curves[0].values)


def test_what_it_is_given_stays_as_it_is(capsys) -> None:
    lr = torch.tensor(0.1)
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=lr, betas=(torch.tensor(0.9), torch.tensor(0.99)))),
        train_cfg=dict(max_epochs=3),
        param_scheduler=[
            dict(type="ExponentialLR", gamma=0.5, verbose=True),
            dict(type="ExponentialMomentum", gamma=0.5),
        ],
    )
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    for _ in range(2):
        schedule = simulate_schedule(cfg)
        assert [curve.values[0].item() for curve in schedule.curves] == pytest.approx([0.1, 0.9])
    assert torch.equal(torch.rand(1), expected)
    assert float(lr) == pytest.approx(0.1)
    assert float(cfg["optim_wrapper"]["optimizer"]["betas"][0]) == pytest.approx(0.9)
    assert capsys.readouterr().out == ""


def test_groups_that_differ_in_a_tensor_differ() -> None:
    cfg = dict(
        optim_wrapper=dict(
            optimizer=dict(type="SGD", lr=torch.tensor(1e-3)),
            paramwise_cfg=dict(bias_lr_mult=0.96),
        ),
        train_cfg=dict(max_epochs=2),
    )
    schedule = simulate_schedule(cfg, model=nn.Sequential(nn.Linear(1, 1)))
    assert [curve.groups for curve in schedule.curves] == [(0,), (1,)]


def test_a_momentum_that_moves_besides_has_a_curve() -> None:
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="Adam", lr=0.1)),
        train_cfg=dict(max_epochs=4),
        param_scheduler=dict(type="CyclicLR", base_lr=0.1, max_lr=0.5, step_size_up=2),
    )
    schedule = simulate_schedule(cfg)
    torch.testing.assert_close(curve_of(schedule, "lr", 0).values, torch.tensor([0.1, 0.3, 0.5, 0.3]).double())
    torch.testing.assert_close(curve_of(schedule, "momentum", 0).values, torch.tensor([0.9, 0.85, 0.8, 0.85]).double())


def test_marks_and_spans_stay_within_the_training() -> None:
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(max_epochs=6),
        param_scheduler=[
            dict(type="MultiStepLR", milestones=[1, 3, 9], begin=1, end=12),
            dict(type="CosineRestartLR", periods=[2, 3], restart_weights=[1, 0.5]),
            dict(type="LinearLR", start_factor=0.5, begin=2, end=4),
            dict(type="LinearLR", start_factor=0.5),
            dict(type="MultiStepLR", milestones=[1, 3], end=3),
        ],
    )
    spans = simulate_schedule(cfg).spans
    assert [(span.begin, span.end, span.marks) for span in spans] == [
        (1, 6, (2, 4)),
        (0, 6, (2, 5)),
        (2, 4, ()),
        (0, 6, ()),
        (0, 3, (1,)),
    ]
    assert not any(span.is_warmup for span in spans), "neither later on nor to the end"


def test_a_training_by_iterations_is_one_epoch() -> None:
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(max_iters=5),
        param_scheduler=dict(type="CosineAnnealingLR"),
    )
    with pytest.warns(UserWarning, match="never advances"):
        schedule = simulate_schedule(cfg)
    assert curve_of(schedule, "lr", 0).values.tolist() == [0.1] * 5


def test_configs_of_several_optimizers_without_their_model() -> None:
    cfg = dict(
        model=dict(type="SomeGAN"),
        optim_wrapper=dict(
            constructor="MultiOptimWrapperConstructor",
            gen=dict(optimizer=dict(type="SGD", lr=0.1), modules=["a", "b"], paramwise_cfg=dict(bias_lr_mult=2.0)),
            disc=dict(optimizer=dict(type="Adam", lr=0.2)),
        ),
        train_cfg=dict(max_epochs=2),
    )
    with pytest.warns(UserWarning, match="'SomeGAN' is not registered"):
        schedule = simulate_schedule(cfg)
    assert [(curve.optimizer, curve.values.tolist()) for curve in schedule.curves] == [
        ("gen", [0.1, 0.1]),
        ("disc", [0.2, 0.2]),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(param_scheduler=dict(gen=[])), KeyError, "nothing for 'disc'"),
        (
            dict(param_scheduler=dict(gen=[], disc=[], other=[])),
            ValueError,
            "'other', which is not an optimizer wrapper",
        ),
        (dict(optim_wrapper=dict(type="AmpOptimWrapper", clip_grad=dict(max_norm=1.0))), KeyError, "'optimizer'"),
    ],
)
def test_names_and_parts_that_are_missing_are_named(changes, error, message) -> None:
    cfg = dict(
        optim_wrapper=dict(
            constructor="MultiOptimWrapperConstructor",
            gen=dict(optimizer=dict(type="SGD", lr=0.1)),
            disc=dict(optimizer=dict(type="Adam", lr=0.2)),
        ),
        train_cfg=dict(max_epochs=2),
    )
    with pytest.raises(error, match=message):
        simulate_schedule({**cfg, **changes})


def test_schedulers_that_exist_are_not_run() -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(TypeError, match="simulated from configs of schedulers, got ExponentialLR"):
        simulate_schedule({**CONFIG, "param_scheduler": [ExponentialLR(optimizer, gamma=0.5)]}, model=Net())


def test_a_model_that_is_not_known_here_is_stood_in_for() -> None:
    cfg = {**CONFIG, "model": dict(type="ImageClassifier", backbone=dict(type="ResNet"))}
    with pytest.warns(UserWarning, match="'ImageClassifier' is not registered here: one parameter stands in"):
        schedule = simulate_schedule(cfg, epoch_length=5)
    assert [curve.groups for curve in schedule.curves if curve.param_name == "lr"] == [(0,)]


def test_the_model_of_the_config_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS, "_modules", {**MODELS._modules, "Net": Net})
    schedule = simulate_schedule({**CONFIG, "model": dict(type="Net")}, epoch_length=5)
    assert {number for curve in schedule.curves for number in curve.groups} == set(range(6))


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "message"),
    [
        (dict(optim_wrapper=None), {}, TypeError, "optim_wrapper must be a dict"),
        (dict(train_cfg=dict(by_epoch=True)), {}, KeyError, "neither 'max_epochs' nor 'max_iters'"),
        (dict(train_cfg=dict(max_epochs=0)), {}, ValueError, r"Invalid train_cfg\.max_epochs: 0"),
        ({}, {}, ValueError, "convert_to_iter_based=True needs epoch_length"),
        (
            dict(param_scheduler=dict(type="StepLR", step_size=1, by_epoch=False)),
            {},
            ValueError,
            "expected epoch_length, iterations in an epoch",
        ),
        ({}, dict(epoch_length=0), ValueError, "Invalid epoch_length: 0"),
    ],
)
def test_bad_configs_are_named(changes, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        simulate_schedule({**CONFIG, **changes}, model=Net(), **arguments)


@pytest.mark.parametrize("key", ["optim_wrapper", "train_cfg"])
def test_what_the_schedule_depends_on_must_be_there(key) -> None:
    with pytest.raises(KeyError, match=f"no '{key}'"):
        simulate_schedule({name: value for name, value in CONFIG.items() if name != key})


def test_the_picture_has_the_values_the_warm_up_and_the_milestones(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    schedule = simulate_schedule(CONFIG, model=Net(), epoch_length=5)
    figure = plot_schedule(schedule, tmp_path / "curve.png", title="a training")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    *panels, strip = figure.axes
    assert [panel.get_title(loc="left") for panel in panels] == ["lr", "momentum", "weight_decay"]
    lr, momentum, decay = panels
    drawn = {tuple(line.get_ydata()[:-1]) for line in lr.get_lines() if len(line.get_ydata()) == 31}
    assert drawn == {tuple(curve.values.tolist()) for curve in schedule.curves if curve.param_name == "lr"}
    assert [text.get_text().strip() for text in lr.texts] == ["warm-up"] and len(lr.patches) == 1
    assert [line.get_xdata()[0] for line in decay.get_lines() if len(line.get_ydata()) == 2] == [15, 25]
    assert not momentum.patches
    assert [text.get_text() for text in strip.texts] == [
        "LinearLR [0, 10)",
        "CosineAnnealingLR [10, 30)",
        "MultiStepParamScheduler [0, 30)",
        "CosineAnnealingMomentum [0, 30)",
    ]


def test_labels_are_in_their_bars_or_beside_bars_that_are_too_short() -> None:
    pytest.importorskip("matplotlib")
    spans = {"LinearLR": dict(end=2), "PolyLR": dict(begin=2, end=90), "ExponentialLR": dict(gamma=1, begin=90)}
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(max_epochs=100),
        param_scheduler=[dict(type=name, **span) for name, span in spans.items()],
    )
    strip = plot_schedule(cfg, model=nn.Linear(1, 1)).axes[-1]
    assert [text.get_text() for text in strip.texts] == ["LinearLR [0, 2)", "PolyLR [2, 90)", "ExponentialLR [90, 100)"]
    strip.figure.draw_without_rendering()
    right_of, inside, left_of = (text.get_window_extent() for text in strip.texts)
    first, second, third = (bar.get_window_extent() for bar in strip.patches)
    assert first.x1 < right_of.x0
    assert second.x0 < inside.x0 and inside.x1 < second.x1
    assert left_of.x1 < third.x0


def test_many_curves_are_told_apart_by_their_height() -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(12)))
    keys = {f"{index}.": dict(lr_mult=0.9**index) for index in range(12)}
    cfg = dict(
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=dict(custom_keys=keys)),
        train_cfg=dict(max_epochs=4),
        param_scheduler=dict(type="PolyLR"),
    )
    figure = plot_schedule(cfg, model=model, log=True)
    [text] = figure.axes[0].texts
    assert text.get_text().startswith("12 curves; the darkest is group 11: 11.weight")
    assert figure.axes[0].get_yscale() == "log"
