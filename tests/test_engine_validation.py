"""Names in a config are checked before anything is built, and an error says under which key they stand."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn

from fusedopt.training.engine import BaseMetric, Config, ConfigError
from fusedopt.training.engine.validation import check_names
from fusedopt.training.registry import DATASETS, METRICS, MODELS


class Net(nn.Linear):
    def __init__(self, depth: int = 1, **kwargs: Any):
        super().__init__(3, depth, **kwargs)


class Data(torch.utils.data.Dataset):
    def __init__(self, size: int):
        self.size = size


class Metric(BaseMetric):
    pass


VALID = dict(
    model=dict(type="ValidationNet", depth=3, bias=False),
    optim_wrapper=dict(
        type="AmpOptimWrapper",
        optimizer=dict(type=torch.optim.SGD, lr=1),
        constructor="DefaultOptimWrapperConstructor",
        clip_grad=dict(type="value", clip_value=1),
        paramwise_cfg=dict(norm_decay_mult=0),
    ),
    param_scheduler=[dict(type="LinearLR", end=2, convert_to_iter_based=True), dict(type="StepMomentum", step_size=1)],
    train_dataloader=dict(
        batch_size=2,
        dataset=dict(type="ValidationData", size=3),
        sampler=dict(type="DefaultSampler", round_up=False),
        collate_fn=dict(type="default_collate"),
    ),
    val_evaluator=[dict(type="ValidationMetric", prefix="a"), dict(type="ValidationMetric")],
    default_hooks=dict(logger=dict(type="LoggerHook", interval=5, priority="LOW"), timer=None),
    custom_hooks=[dict(type="EMAHook", momentum=0.1), dict(type="fusedopt.training.engine.EmptyCacheHook")],
    visualizer=dict(type="Visualizer"),
    anything=dict(type="else"),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, entry in ((MODELS, Net), (DATASETS, Data), (METRICS, Metric)):
        monkeypatch.setitem(registry._modules, f"Validation{entry.__name__}", entry)


def test_a_config_without_mistakes():
    check_names(VALID)
    check_names({})
    multi = dict(gen=dict(optimizer=dict(type="Adam", lr=1)), disc=dict(optimizer=dict(type="Adam", lr=1)))
    schedulers = dict(gen=dict(type="LinearLR"), disc=[dict(type="StepLR", step_size=1)])
    check_names(dict(optim_wrapper=multi, param_scheduler=schedulers))


def test_some_sections_alone():
    config = dict(model=dict(type="No"), param_scheduler=dict(type="LinearLR"))
    check_names(config, "optim_wrapper", "param_scheduler")
    with pytest.raises(ConfigError, match=r"^model\.type: "):
        check_names(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model.type",
            "ValidationNett",
            "'ValidationNett' is not in the model registry .* mean 'ValidationNet'",
        ),
        ("model.type", 3, "type of model must be a registered name, an import path or a class, got 3"),
        ("model.type", "torch.nn.Linea", "'torch.nn.Linea' is not in the model registry"),
        ("model.depht", 3, "Net takes no such argument; did you mean 'depth'"),
        ("optim_wrapper.type", "AmpOptimWraper", "did you mean 'AmpOptimWrapper'"),
        (
            "optim_wrapper.constructor",
            "DefaultConstructor",
            "'DefaultConstructor' is not in the .* registry",
        ),
        ("optim_wrapper.optimizer.type", "FusedAdamV", "did you mean 'FusedAdam"),
        ("optim_wrapper.optimizer.momentun", 3, "SGD takes no such argument; did you mean 'momentum'"),
        ("param_scheduler.0.type", "LinearR", "did you mean 'LinearLR'"),
        ("param_scheduler.1.gama", 3, "StepMomentum takes no such argument; did you mean 'gamma'"),
        ("train_dataloader.dataset.type", "Data", "is not in the dataset registry"),
        ("train_dataloader.dataset.sizes", 3, "Data takes no such argument; did you mean 'size'"),
        ("train_dataloader.sampler.type", "Sampler", "is not in the data sampler registry"),
        ("train_dataloader.collate_fn.type", "collate", "is not in the function registry"),
        ("val_evaluator.1.type", "Accuracy", "is not in the metric registry"),
        ("val_evaluator.0.prefx", 3, "Metric takes no such argument; did you mean 'prefix'"),
        ("default_hooks.logger.type", "LogerHook", "did you mean 'LoggerHook'"),
        ("default_hooks.logger.intervall", 3, "LoggerHook takes no such argument; did you mean 'interval'"),
        ("custom_hooks.1.type", "fusedopt.training.engine.EmptyHook", "is not in the hook registry"),
        ("visualizer.type", "Visualiser", "did you mean 'Visualizer'"),
        ("train_cfg.type", "EpochBasedLoop", "did you mean 'EpochBasedTrainLoop'"),
        ("val_cfg.type", "ValLop", "did you mean 'ValLoop'"),
    ],
)
def test_an_error_names_the_file_and_the_key(key, value, message):
    config = Config(VALID, filename="c.py")
    config.merge_from_dict({key: value})
    before = copy.deepcopy(config)
    with pytest.raises(ConfigError, match=rf"^c\.py: {re.escape(key)}: .*{message}"):
        check_names(config)
    assert config == before


def test_the_optimizers_and_schedulers_of_several():
    config = dict(
        optim_wrapper=dict(gen=dict(optimizer=dict(type="Adam")), disc=dict(optimizer=dict(type="Adan"))),
        param_scheduler=dict(gen=[], disc=[dict(type="StepLR", step=1)]),
    )
    with pytest.raises(ConfigError, match=r"^optim_wrapper\.disc\.optimizer\.type: 'Adan' .* did you mean 'Adam'"):
        check_names(config)
    config["optim_wrapper"]["disc"]["optimizer"]["type"] = "Adam"
    config["optim_wrapper"]["gen"]["type"] = "AmpOptimWraper"
    with pytest.raises(ConfigError, match=r"^optim_wrapper\.gen\.type: .* did you mean 'AmpOptimWrapper'"):
        check_names(config)
    del config["optim_wrapper"]["gen"]["type"]
    with pytest.raises(ConfigError, match=r"^param_scheduler\.disc\.0\.step: StepLR takes no such argument"):
        check_names(config)
