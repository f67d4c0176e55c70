"""Objects, classes and functions in configs, in place of dicts and names."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from engine_cases import HitRate, Parts, PointNet, Points, Recorder, config, recorded, train
from torch.utils.data import BatchSampler, default_collate

from fusedopt import (
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    FusedSGD,
    OptimWrapper,
    OptimWrapperDict,
)
from fusedopt.training import schedulers
from fusedopt.training.averaging import ExponentialMovingAverage
from fusedopt.training.constructors import MultiOptimWrapperConstructor
from fusedopt.training.engine import (
    BaseDataPreprocessor,
    CheckpointHook,
    DefaultSampler,
    EMAHook,
    EpochBasedTrainLoop,
    Evaluator,
    LocalVisBackend,
    LoggerHook,
    Runner,
    ValLoop,
    Visualizer,
)
from fusedopt.training.engine.validation import check_names


def trained(cfg) -> Runner:
    check_names(cfg)
    return train(cfg)


@pytest.mark.parametrize("kind", [torch.optim.SGD, FusedSGD])
@pytest.mark.parametrize("wrapper", [{}, dict(type="AmpOptimWrapper", dtype="bfloat16"), dict(type=AmpOptimWrapper)])
def test_an_optimizer_in_a_wrappers_config(tmp_path, kind, wrapper):
    model = PointNet()
    optimizer = kind(model.parameters(), lr=0.1)
    wrapper = {**wrapper, "optimizer": optimizer, "clip_grad": dict(max_norm=1.0)}
    if wrapper.get("type") is AmpOptimWrapper:
        wrapper["dtype"] = "bfloat16"
    runner = trained(config(tmp_path, model=model, optim_wrapper=wrapper))
    assert runner.optim_wrapper.optimizer is optimizer
    assert runner.optim_wrapper.grad_norm is not None
    assert recorded(runner).lrs[0] == pytest.approx(0.01)


def test_such_a_run_is_resumed(tmp_path):
    def cfg(**changes):
        model = PointNet()
        return config(
            tmp_path, model=model, optim_wrapper=dict(optimizer=FusedSGD(model.parameters(), lr=0.1)), **changes
        )

    train(cfg(train_cfg=dict(by_epoch=True, max_epochs=2)))
    assert train(cfg(resume=True)).epoch == 4


def test_paramwise_cfg_is_for_an_optimizer_that_is_not_built_yet(tmp_path):
    model = PointNet()
    wrapper = dict(optimizer=FusedSGD(model.parameters(), lr=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    with pytest.raises(TypeError, match=r"OptimWrapper: .*'paramwise_cfg'"):
        Runner.from_cfg(config(tmp_path, model=model, optim_wrapper=wrapper))


def test_wrappers_in_a_dict(tmp_path):
    model = Parts()
    parts = {
        name: OptimWrapper(torch.optim.SGD(getattr(model, name).parameters(), lr=0.1)) for name in ("backbone", "head")
    }
    scheduled = dict(backbone=[dict(type="StepLR", step_size=1)], head=schedulers.StepLR(parts["head"], step_size=2))
    runner = trained(config(tmp_path, model=model, optim_wrapper=parts, param_scheduler=scheduled))
    assert type(runner.optim_wrapper) is OptimWrapperDict and runner.optim_wrapper["head"] is parts["head"]
    assert runner.optim_wrapper.get_lr() == {"backbone.lr": pytest.approx([1e-4]), "head.lr": pytest.approx([1e-3])}
    assert runner.param_schedulers["head"] == [scheduled["head"]]


def test_schedulers(tmp_path):
    model = PointNet()
    wrapper = OptimWrapper(FusedSGD(model.parameters(), lr=0.1))
    built = schedulers.StepLR(wrapper, step_size=1)
    runner = trained(config(tmp_path, model=model, optim_wrapper=wrapper, param_scheduler=built))
    assert runner.param_schedulers == [built] and built.last_step == 4
    torchs = torch.optim.lr_scheduler.StepLR(wrapper.optimizer, 1)
    with pytest.raises(TypeError, match="param_scheduler must be a dict, got StepLR"):
        Runner.from_cfg(config(tmp_path, model=model, optim_wrapper=wrapper, param_scheduler=torchs))


def test_hooks(tmp_path):
    hooks = dict(logger=LoggerHook(interval=3), checkpoint=CheckpointHook(interval=2))
    runner = trained(config(tmp_path, default_hooks=hooks, custom_hooks=[EMAHook()]))
    assert set(hooks.values()) < set(runner.hooks)


def test_loops_become_the_runners_own(tmp_path):
    first = Runner.from_cfg(config(tmp_path / "first"))
    loops = dict(train_cfg=first.train_loop, val_cfg=first.val_loop)
    runner = trained(config(tmp_path / "second", **loops))
    assert runner.train_loop is first.train_loop and runner.val_loop is first.val_loop
    assert runner.train_loop.runner is runner.val_loop.runner is runner
    assert len(recorded(runner).metrics) == 4


def function(params, lr):
    return torch.optim.SGD(params, lr=lr)


DATA = dict(
    dataset=dict(type=Points, size=40),
    sampler=dict(type=DefaultSampler, shuffle=True),
    batch_size=8,
    collate_fn=dict(type=default_collate),
)
SGD = dict(type=FusedSGD, lr=0.1)
DEFAULT = DefaultOptimWrapperConstructor


@pytest.mark.parametrize(
    "changes",
    [
        dict(model=dict(type=PointNet), train_dataloader=DATA, val_dataloader=DATA),
        dict(model=dict(type=functools.partial(PointNet, dropout=0.0))),
        dict(data_preprocessor=dict(type=BaseDataPreprocessor)),
        dict(
            train_dataloader=dict(
                dataset=Points(40), batch_sampler=BatchSampler(range(40), 8, False), collate_fn=default_collate
            )
        ),
        dict(train_dataloader={**DATA, "batch_sampler": dict(type=BatchSampler, drop_last=True)}),
        dict(train_dataloader={**DATA, "worker_init_fn": dict(type=print)}),
        dict(train_cfg=dict(type=EpochBasedTrainLoop, max_epochs=4), val_cfg=dict(type=ValLoop)),
        dict(val_evaluator=[dict(type=HitRate)]),
        dict(val_evaluator=dict(type=Evaluator, metrics=[dict(type=HitRate)])),
        dict(optim_wrapper=dict(type=OptimWrapper, constructor=DEFAULT, optimizer=SGD)),
        dict(optim_wrapper=dict(constructor=dict(type=DEFAULT), optimizer=dict(type=function, lr=0.1))),
        dict(optim_wrapper=dict(optimizer=dict(type=functools.partial(torch.optim.SGD, momentum=0.9), lr=0.1))),
        dict(
            model=dict(type=Parts),
            optim_wrapper=dict(
                constructor=MultiOptimWrapperConstructor, backbone=dict(optimizer=SGD), head=dict(optimizer=SGD)
            ),
        ),
        dict(param_scheduler=dict(type=schedulers.CosineAnnealingLR, convert_to_iter_based=True)),
        dict(param_scheduler=[dict(type=functools.partial(schedulers.StepLR, step_size=2))]),
        dict(custom_hooks=[dict(type=EMAHook, ema_type=ExponentialMovingAverage), dict(type=Recorder, priority="LOW")]),
        dict(default_hooks=dict(logger=dict(type=LoggerHook, interval=3))),
        dict(visualizer=dict(type=Visualizer, vis_backends=[dict(type=LocalVisBackend)])),
    ],
    ids=lambda changes: "+".join(changes),
)
def test_classes_and_functions_as_types(tmp_path, changes):
    assert trained(config(tmp_path, **changes)).epoch == 4


def lazy(kind: Any, **settings: Any) -> dict[str, Any]:
    return dict(type=kind, **settings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_path", [False, True], ids=["classes", "import paths"])
def test_classes_of_mmengine_stand_for_ours(tmp_path, as_path):
    """As in its lazy configs, which import what they name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("mmengine.runner", reason="mmengine is not installed")
        from mmengine import dataset, evaluator, hooks, optim, runner, visualization

    def named(kind: Any) -> Any:
        return f"{kind.__module__}.{kind.__name__}" if as_path else kind

    cfg = config(
        tmp_path,
        train_cfg=lazy(named(runner.EpochBasedTrainLoop), max_epochs=2),
        val_cfg=lazy(named(runner.ValLoop)),
        val_evaluator=lazy(named(evaluator.Evaluator), metrics=[dict(type="HitRate")]),
        optim_wrapper=lazy(
            named(optim.OptimWrapper),
            constructor=named(optim.DefaultOptimWrapperConstructor),
            optimizer=lazy(named(torch.optim.AdamW), lr=0.01),
        ),
        param_scheduler=[lazy(named(optim.CosineAnnealingLR), T_max=2)],
        default_hooks=dict(
            checkpoint=lazy(named(hooks.CheckpointHook), interval=1), logger=lazy(named(hooks.LoggerHook), interval=2)
        ),
        custom_hooks=[lazy(named(hooks.EMAHook))],
        visualizer=lazy(named(visualization.Visualizer), vis_backends=[lazy(named(visualization.LocalVisBackend))]),
    )
    cfg["train_dataloader"]["sampler"] = lazy(named(dataset.DefaultSampler), shuffle=True)
    done = Runner.from_cfg(cfg)
    done.train()
    parts = [done.train_loop, done.val_loop, done.optim_wrapper, *done.param_schedulers, *done.hooks, done.visualizer]
    assert {type(part).__module__.partition(".")[0] for part in parts} == {"fusedopt"}
    assert done.iter == 10
