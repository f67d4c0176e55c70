"""Every registered scheduler, hook and average goes on from a file as if nothing had happened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from engine_cases import assert_same, by_iterations, config, loader, recorded, state_of, train
from torch import nn

from fusedopt.training.averaging import BaseAveragedModel
from fusedopt.training.engine import BaseModel, Hook, Runner
from fusedopt.training.registry import HOOKS, MODELS, PARAM_SCHEDULERS


class Line(BaseModel):
    """The smallest model that learns something."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()

    def forward(self, inputs, labels, mode="tensor"):
        logits = self.norm(self.layer(inputs))
        if mode == "loss":
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return [dict(pred_label=pred, gt_label=gt) for pred, gt in zip(logits.argmax(1), labels, strict=True)]


def falling(step: int) -> float:
    return 1 / (1 + step)


#: Arguments of each rule, such that its value changes before and after every place where a run is killed.
RULES: dict[str, dict[str, Any]] = {
    "Constant": dict(factor=0.5, end=3),
    "CosineAnnealing": dict(),
    "CosineRestart": dict(periods=[2, 3], restart_weights=[1, 0.5]),
    "Exponential": dict(gamma=0.8),
    "Linear": dict(start_factor=0.1, end=4),
    "MultiStep": dict(milestones=[1, 3, 3], gamma=0.5),
    "Poly": dict(eta_min=1e-4, power=2.0),
    "ReduceOnPlateau": dict(monitor="count", patience=0, factor=0.5, threshold=1.0, end=100),
    "Step": dict(step_size=1, gamma=0.7),
}
#: What a scheduler is configured with; a name without an entry fails the test.
SCHEDULERS: dict[str, dict[str, Any]] = {
    **{f"{rule}LR": settings for rule, settings in RULES.items()},
    **{f"{rule}Momentum": settings for rule, settings in RULES.items()},
    **{f"{rule}ParamScheduler": dict(param_name="weight_decay", **settings) for rule, settings in RULES.items()},
    "CosineAnnealingWeightDecay": dict(eta_min=0.001),
    "OneCycleLR": dict(eta_max=0.1),
    "OneCycleParamScheduler": dict(param_name="lr", eta_max=0.1),
    "CosineAnnealingWarmRestarts": dict(T_0=1, T_mult=2, by_epoch=False),
    "CyclicLR": dict(base_lr=0.001, max_lr=0.1, step_size_up=2, by_epoch=False),
    "LambdaLR": dict(lr_lambda=falling),
    "MultiplicativeLR": dict(lr_lambda=falling),
    "ReduceLROnPlateau": dict(monitor="count", patience=0, end=100),
    "SWALR": dict(swa_lr=0.001, anneal_epochs=3),
}
#: Likewise for hooks: the entry, and what else of the config it needs.
HOOK_SETTINGS: dict[str, dict[str, Any]] = {
    "CheckpointHook": dict(by_epoch=False, interval=2, max_keep_ckpts=2, save_best="auto", filename_tmpl="mine_{}.pth"),
    "DistSamplerSeedHook": dict(),
    "EarlyStoppingHook": dict(monitor="count", rule="greater", patience=3),
    "EMAHook": dict(momentum=0.1, begin_iter=3),
    "EmptyCacheHook": dict(),
    "IterTimerHook": dict(),
    "LoggerHook": dict(interval=1),
    "ParamSchedulerHook": dict(),
    "ProfilerHook": dict(by_epoch=False, profile_times=2),
    "RuntimeInfoHook": dict(),
    "SegVisualizationHook": dict(),
    "SyncBuffersHook": dict(),
    "VisualizationHook": dict(),
}
AVERAGES: dict[str, dict[str, Any]] = {
    "ExponentialMovingAverage": dict(momentum=0.1, interval=2),
    "MomentumAnnealingEMA": dict(momentum=0.1, gamma=3, update_buffers=True),
    "StochasticWeightAverage": dict(interval=3),
}
#: Iterations after which a run is killed: in the middle of the first epoch, at the end of one, in the last.
PLACES = (2, 6, 10)


def ours(registry: Any, base: type | None = None) -> set[str]:
    """What this package has registered; tests register more."""
    found = {name: registry.get(name) for name in registry}
    return {
        name
        for name, each in found.items()
        if each.__module__.startswith("fusedopt.") and (base is None or issubclass(each, base))
    }


def test_each_has_an_entry() -> None:
    assert ours(PARAM_SCHEDULERS) == set(SCHEDULERS)
    assert ours(HOOKS) == set(HOOK_SETTINGS)
    assert ours(MODELS, BaseAveragedModel) == set(AVERAGES)


def small(folder: Any, **changes: Any) -> dict[str, Any]:
    """Four epochs of three iterations."""
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
    cfg = config(
        folder,
        model=dict(type=Line),
        train_dataloader=loader(12, 4, shuffle=True),
        optim_wrapper=dict(
            optimizer=dict(type="FusedSGD", **settings), paramwise_cfg=dict(norm_decay_mult=0.0, bias_lr_mult=2.0)
        ),
        param_scheduler=None,
        default_hooks=dict(checkpoint=None),
        visualizer=dict(vis_backends=[]),
    )
    cfg["val_dataloader"] = loader(8, 8, shuffle=False)
    return {**cfg, **changes}


class Watch(Hook):
    """Keeps every setting of every group in each iteration; saves where the run will be killed."""

    priority = "LOWEST"

    def __init__(self, *places: int) -> None:
        self.places = places
        self.seen: list[Any] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 in self.places:
            runner.save_checkpoint(runner.work_dir, f"at_{runner.iter + 1}.pth")

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        groups = runner.optim_wrapper.param_groups
        self.seen.append([{key: group[key] for key in sorted(group) if key != "params"} for group in groups])


def averages(runner: Runner) -> list[Any]:
    return [hook.ema_model.state_dict() for hook in runner.hooks if getattr(hook, "ema_model", None) is not None]


def assert_resumes(cfg: dict[str, Any], folder: Any, places: Sequence[int] = PLACES) -> list[Any]:
    """A run that is killed leaves the file of its last iteration: it goes on as the run that was not killed.

    Returns the settings of the groups in each iteration.
    """
    watch = Watch(*places)
    straight = train({**cfg, "work_dir": str(folder / "straight")}, watch)
    everything = recorded(straight)
    for place in places:
        file = folder / "straight" / f"at_{place}.pth"
        again = Watch()
        resumed = train({**cfg, "work_dir": str(folder / str(place)), "resume": True, "load_from": str(file)}, again)
        mine = recorded(resumed)
        assert_same(again.seen, watch.seen[place:])
        assert mine.losses == {step: loss for step, loss in everything.losses.items() if step >= place}
        assert mine.metrics == everything.metrics[len(everything.metrics) - len(mine.metrics) :]
        assert_same(state_of(resumed), state_of(straight))
        assert_same(averages(resumed), averages(straight))
    return watch.seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(name: str, tmp_path: Any, thorough: bool) -> None:
    turn = list(SCHEDULERS).index(name) % len(PLACES)
    cfg = small(tmp_path, param_scheduler=dict(type=name, **SCHEDULERS[name]))
    if "Momentum" in name:  # where it moves betas
        cfg["optim_wrapper"] = dict(optimizer=dict(type="FusedAdamW", lr=0.05))
    seen = assert_resumes(cfg, tmp_path, PLACES if thorough else PLACES[turn : turn + 1])
    assert len({repr(groups) for groups in seen}) > 1, "the schedule must do something"


@pytest.mark.parametrize("name", HOOK_SETTINGS)
def test_every_hook_goes_on(name: str, tmp_path: Any) -> None:
    cfg = small(tmp_path, custom_hooks=[dict(type=name, **HOOK_SETTINGS[name])])
    if name in ("IterTimerHook", "LoggerHook", "ParamSchedulerHook", "RuntimeInfoHook", "DistSamplerSeedHook"):
        key = {
            "IterTimerHook": "timer",
            "LoggerHook": "logger",
            "ParamSchedulerHook": "param_scheduler",
            "RuntimeInfoHook": "runtime_info",
            "DistSamplerSeedHook": "sampler_seed",
        }[name]
        cfg["custom_hooks"] = []
        cfg["default_hooks"] = {**cfg["default_hooks"], key: dict(type=name, **HOOK_SETTINGS[name])}
    cfg["param_scheduler"] = dict(type="ExponentialLR", gamma=0.9)
    assert_resumes(cfg, tmp_path)


@pytest.mark.parametrize("name", AVERAGES)
def test_every_average_goes_on(name: str, tmp_path: Any) -> None:
    hook = dict(type="EMAHook", ema_type=name, **AVERAGES[name])
    assert_resumes(small(tmp_path, custom_hooks=[hook]), tmp_path)


def test_the_other_loop_and_a_scaler_go_on(tmp_path: Any) -> None:
    cfg = small(
        tmp_path,
        model=dict(type=Line, norm=False),
        optim_wrapper=dict(
            type="AmpOptimWrapper",
            dtype="bfloat16",
            loss_scale=dict(init_scale=2.0**127, growth_interval=2),
            optimizer=dict(type="FusedAdamW", lr=1e-2),
            accumulative_counts=2,
        ),
    )
    changes = by_iterations(train_cfg=dict(by_epoch=False, max_iters=12, val_interval=5))
    changes["param_scheduler"] = dict(type="MultiStepLR", by_epoch=False, milestones=[1, 7, 11])
    changes["default_hooks"]["checkpoint"] = None
    assert_resumes({**cfg, **changes}, tmp_path)
