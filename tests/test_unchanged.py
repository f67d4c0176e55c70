"""What fails changes nothing: every constructor, failing at every one of its lines, leaves what it was given alone."""

from __future__ import annotations

import ast
import functools
import itertools
import os
import random
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_cases import HitRate, PointNet, config
from test_resume_registry import AVERAGES, SCHEDULERS, ours
from torch import nn

import fusedopt
from fusedopt.training.averaging import BaseAveragedModel
from fusedopt.training.engine import Evaluator, Hook, Runner
from fusedopt.training.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS
from fusedopt.training.schedulers import build_param_schedulers
from fusedopt.training.schedulers.watching import is_watched
from fusedopt.training.wrappers import OptimWrapper, OptimWrapperDict, SkipAwareScheduler
from fusedopt.training.wrappers.base import DRIVEN
from fusedopt.undo import unchanged_on_error

SOURCE = str(Path(fusedopt.__file__).resolve().parent)
#: Where notes are taken and put back, and what is around a constructor, are no part of what fails.
APART = tuple(
    f"{SOURCE}/{name}"
    for name in (
        "undo.py",
        "training/engine/undoing.py",
        "training/registry/registry.py",
        "training/registry/building.py",
    )
)
assert all(map(os.path.exists, APART))


class Injected(Exception):
    """The error of a line that fails."""


@functools.cache
def with_lines(file: str) -> frozenset[int]:
    tree = ast.parse(Path(file).read_text())
    return frozenset(node.lineno for node in ast.walk(tree) if isinstance(node, ast.With))


def failing_at(line: int, function: Callable[[], Any]) -> str | None:
    """Run ``function``, in which the ``line``-th line of the package that is run fails; which one, if there is one."""
    left = line

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal left
        name = frame.f_code.co_filename
        if not name.startswith(SOURCE) or name in APART:
            return None
        entered: set[int] = set()

        def trace_lines(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if event == "line" and frame.f_lineno not in entered:
                # Python comes back to the line of a `with` when it is left, where nothing can fail.
                entered.update({frame.f_lineno} & with_lines(name))
                if left == 0:
                    sys.settrace(None)
                    raise Injected(f"{name}:{frame.f_lineno}")
                left -= 1
            return trace_lines

        return trace_lines

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except Injected as error:
        return str(error)
    finally:
        sys.settrace(before)
    return None


def everything(value: Any, depth: int = 8) -> Any:
    """What can be compared of a caller's object: its contents, with the values of tensors."""
    if isinstance(value, torch.Tensor):
        return id(value), value.detach().clone().flatten().tolist()
    if value is None or isinstance(value, (bool, int, float, str, type)):
        return value
    if depth <= 0:
        return id(value)
    if isinstance(value, dict):
        return id(value), [(key, everything(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [everything(item, depth - 1) for item in value]
    if isinstance(value, torch.optim.Optimizer):
        driven = (value in DRIVEN, is_watched(value))
        own = [(key, everything(item, depth - 2)) for key, item in vars(value).items() if key != "state"]
        return id(value), driven, own
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        return id(value), value.training, [everything(each) for each in tensors], [each.data_ptr() for each in tensors]
    if hasattr(value, "__dict__"):
        return id(value), [(key, everything(item, depth - 2)) for key, item in vars(value).items()]
    return id(value)


def params(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def driven(kind: str = "FusedSGD", tensors: bool = False) -> OptimWrapper:
    rate = torch.tensor(0.1) if tensors else 0.1
    settings = dict(momentum=0.9) if "SGD" in kind else {}
    groups = [dict(params=[each], lr=rate, weight_decay=0.1) for each in params()]
    return OptimWrapper(getattr(fusedopt, kind)(groups, lr=rate, **settings))


Case = tuple[list[Any], Callable[[], Any]]


def of_scheduler(name: str, kind: str, tensors: bool) -> Case:
    wrapper = driven(kind, tensors)
    settings = {"type": name, "end": 6, **SCHEDULERS[name]}
    return [wrapper, wrapper.optimizer], lambda: PARAM_SCHEDULERS.build(settings, optimizer=wrapper)


def of_optimizer(name: str) -> Case:
    groups = [dict(params=params()), dict(params=tuple(params()), lr=0.5), dict(params=params(1)[0])]
    return [groups], lambda: OPTIMIZERS.build(dict(type=name, lr=0.1), groups)


def of_wrapper(name: str, kind: type) -> Case:
    optimizer = kind(params(), lr=0.1)
    cfg = dict(type=name, clip_grad=dict(max_norm=1.0))
    return [optimizer, cfg], lambda: OPTIM_WRAPPERS.build(cfg, optimizer=optimizer)


def of_constructor(name: str) -> Case:
    class Net(PointNet):
        def get_layer_depth(self, name):
            return (0, 2) if name.startswith("backbone") else (1, 2)

    model = Net()
    rules: dict[str, Any] = dict(bias_decay_mult=0.0)
    if "Decay" in name:
        rules = dict(layer_decay_rate=0.5) if name.endswith("WrapperConstructor") else dict(decay_rate=0.5)
    optimizer = dict(type="FusedAdamW", lr=0.1, weight_decay=0.1)
    cfg: dict[str, Any] = dict(constructor=name, optimizer=optimizer, paramwise_cfg=rules, clip_grad=dict(max_norm=1.0))
    if name.startswith("Multi"):
        cfg = dict(constructor=name, backbone=dict(optimizer=optimizer), head=dict(optimizer=optimizer))
    return [model, cfg], lambda: fusedopt.build_optim_wrapper(model, cfg)


def of_average(name: str) -> Case:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return [model], lambda: MODELS.build(dict(type=name, dtype="float64", **AVERAGES[name]), model=model)


def of_fuse() -> Case:
    groups = [dict(params=params()), dict(params=params(), lr=0.5)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return [optimizer], lambda: fusedopt.fuse(optimizer, clip_grad=dict(max_norm=1.0))


def of_list() -> Case:
    wrapper = driven()
    cfg = [dict(type="LinearLR", end=2), dict(type="OneCycleLR", eta_max=0.3), dict(type="StepMomentum", step_size=1)]
    return [wrapper, wrapper.optimizer, cfg], lambda: build_param_schedulers(cfg, wrapper, max_epochs=4)


def of_lists() -> Case:
    both = OptimWrapperDict(a=driven(), b=driven("FusedAdamW"))
    cfg = dict(a=[dict(type="LinearLR", end=2)], b=dict(type="CosineAnnealingMomentum"))
    held = [*both.values(), *(each.optimizer for each in both.values())]
    return [*held, cfg], lambda: build_param_schedulers(cfg, both, max_epochs=4)


def of_added_group() -> Case:
    optimizer = fusedopt.FusedAdamW(params(), lr=0.1)
    group = dict(params=tuple(params()))
    return [group, optimizer], lambda: optimizer.add_param_group(group)


def of_skip_aware() -> Case:
    wrapper = driven()
    scheduler = torch.optim.lr_scheduler.StepLR(wrapper.optimizer, 3)
    return [wrapper, wrapper.optimizer, scheduler], lambda: SkipAwareScheduler(scheduler, wrapper)


def of_wrapper_dict() -> Case:
    one, other = driven(), driven()
    return [one, other], lambda: OptimWrapperDict(one=one, other=other)


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{name}, {'tensors' if tensors else kind}": lambda name=name, kind=kind, tensors=tensors: of_scheduler(
            name, kind, tensors
        )
        for name in SCHEDULERS
        for kind, tensors in (("FusedSGD", False), ("FusedAdamW", True))
    },
    **{name: lambda name=name: of_optimizer(name) for name in sorted(ours(OPTIMIZERS) - {"ZeroRedundancyOptimizer"})},
    **{
        f"{name} of {kind.__name__}": lambda name=name, kind=kind: of_wrapper(name, kind)
        for name in sorted(ours(OPTIM_WRAPPERS) - {"ApexOptimWrapper"})
        for kind in (fusedopt.FusedAdamW, torch.optim.AdamW)
    },
    **{name: lambda name=name: of_constructor(name) for name in sorted(ours(OPTIM_WRAPPER_CONSTRUCTORS))},
    **{name: lambda name=name: of_average(name) for name in sorted(ours(MODELS, BaseAveragedModel))},
    "fuse": of_fuse,
    "build_param_schedulers": of_list,
    "build_param_schedulers of several": of_lists,
    "add_param_group": of_added_group,
    "SkipAwareScheduler": of_skip_aware,
    "OptimWrapperDict": of_wrapper_dict,
}


def difference(one: Any, other: Any, path: str = "") -> str:
    """Where two results of :func:`everything` first differ."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        found = (difference(*pair, f"{path}.{index}") for index, pair in enumerate(zip(one, other, strict=True)))
        return next((each for each in found if each), "")
    return "" if one == other else f"{path}: {other!r} instead of {one!r}"


def check(name: str, first: int, step: int) -> None:
    """The same arguments are used for every failure, and in the end make what they are to make."""
    held, make = CASES[name]()
    before = everything(held)
    for line in itertools.count(first, step):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failed = failing_at(line, make)
        if failed is None:
            assert line > first
            return
        assert difference(before, everything(held)) == "", failed


@pytest.mark.parametrize("name", CASES)
def test_a_failure_at_every_ninth_line_changes_nothing(name: str) -> None:
    check(name, zlib.crc32(name.encode()) % 9, 9)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_a_failure_at_any_line_changes_nothing(name: str) -> None:
    check(name, 0, 1)


def test_schedulers_of_which_the_second_is_refused() -> None:
    """The first one's factor must not be applied twice when the mistake is mended."""
    wrapper = driven()
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        build_param_schedulers([dict(type="LinearLR", start_factor=0.1), dict(type="StepLR", gama=0.5)], wrapper)
    assert wrapper.get_lr()["lr"] == [0.1, 0.1]
    assert all("initial_lr" not in group for group in wrapper.param_groups)
    build_param_schedulers([dict(type="LinearLR", start_factor=0.1), dict(type="StepLR", step_size=1)], wrapper)
    assert wrapper.get_lr()["lr"] == [pytest.approx(0.01)] * 2


def test_a_momentum_scheduler_that_is_refused_leaves_betas_alone() -> None:
    wrapper = driven("FusedAdamW", tensors=True)
    with pytest.raises(ValueError, match="eta_max"):
        build_param_schedulers([dict(type="StepMomentum", step_size=1), dict(type="OneCycleLR", eta_max=-1.0)], wrapper)
    assert all("momentum" not in group for group in wrapper.param_groups)


@pytest.mark.parametrize("bad", [dict(loss_scale="dynamik"), dict(loss_scale=dict(grow=2)), dict(loss_scale=-1.0)])
def test_an_amp_wrapper_that_is_refused_does_not_set_clipping(bad: dict[str, Any]) -> None:
    optimizer = fusedopt.FusedAdamW(params(), lr=0.1)
    with pytest.raises((TypeError, ValueError)):
        fusedopt.AmpOptimWrapper(optimizer=optimizer, clip_grad=dict(max_norm=1.0), **bad)
    assert optimizer.clip_grad is None and optimizer not in DRIVEN
    wrapper = fusedopt.AmpOptimWrapper(optimizer=optimizer, clip_grad=dict(max_norm=2.0))
    assert wrapper.clip_grad["max_norm"] == 2.0


def test_growth_of_a_scaler_that_torch_refuses() -> None:
    optimizer = fusedopt.FusedAdamW(params(), lr=0.1)
    with pytest.raises(AssertionError):
        fusedopt.AmpOptimWrapper(optimizer=optimizer, clip_grad=dict(max_norm=1.0), loss_scale=dict(growth_factor=0.5))
    assert optimizer.clip_grad is None


FUSED = sorted(ours(OPTIMIZERS) - {"ZeroRedundancyOptimizer"})


# torch's class by itself is torch's own.
@pytest.mark.parametrize(
    ("name", "build"),
    [*((name, "class") for name in FUSED), *((name, "registry") for name in (*FUSED, "SGD", "AdamW"))],
)
def test_an_optimizer_whose_second_group_is_refused(name: str, build: str) -> None:
    """A retry with other defaults must use those."""

    def make(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        if build == "class":
            return getattr(fusedopt, name)(groups, lr=lr)
        return OPTIMIZERS.build(dict(type=name, lr=lr), groups)

    shared = params(1)
    first, second = dict(params=tuple(shared)), dict(params=iter(shared))
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([first, second], 0.1)
    assert first == dict(params=tuple(shared)) and isinstance(first["params"], tuple)
    assert second == dict(params=shared), "what an iterator gave is not lost"
    optimizer = make([first, dict(params=params(1))], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.param_groups[0] is first, "as in torch, the groups are the caller's"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo backend")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_sharded_optimizer_whose_second_group_is_refused(tmp_path: Path) -> None:
    def make(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        return OPTIMIZERS.build(dict(type="ZeroRedundancyOptimizer", optimizer_type="FusedAdamW", lr=lr), groups)

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        first = dict(params=tuple(params(1)))
        before = everything(first)
        with pytest.raises(ValueError, match=r"Invalid lr: -1\.0"):
            make([first, dict(params=params(1), lr=-1.0)], 0.1)
        assert everything(first) == before
        assert [group["lr"] for group in make([first, dict(params=params(1))], 0.5).param_groups] == [0.5, 0.5]
    finally:
        dist.destroy_process_group()


def test_a_group_that_cannot_be_added_stays_as_it_was() -> None:
    optimizer = fusedopt.FusedAdamW(mine := params(), lr=0.1)
    group = dict(params=(each for each in mine))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(group)
    assert group == dict(params=mine) and len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [dict(clip_grad=dict(max_norm=-1.0)), dict(backend="fast")])
def test_an_optimizer_that_cannot_be_fused_stays_as_it_was(bad: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW([dict(params=params()), dict(params=params(), lr=0.5)], lr=0.1)
    before = everything(optimizer)
    with pytest.raises((TypeError, ValueError)):
        fusedopt.fuse(optimizer, **bad)
    assert everything(optimizer) == before
    optimizer.param_groups[1]["lr"] = -1.0  # refused when half of the twin is made
    before = everything(optimizer)
    with pytest.raises(ValueError, match="lr"):
        fusedopt.fuse(optimizer)
    assert everything(optimizer) == before


class TestRunner:
    """A Runner that cannot be made."""

    def given(self, tmp_path: Path) -> tuple[dict[str, Any], list[Any]]:
        """A config that is made of objects, and these."""
        model = PointNet()
        wrapper = OptimWrapper(fusedopt.FusedAdamW(model.parameters(), lr=0.1))
        evaluator, hook = Evaluator(HitRate()), Hook()
        cfg = config(
            tmp_path / "work", model=model, optim_wrapper=wrapper, val_evaluator=evaluator, custom_hooks=[hook]
        )
        return cfg, [model, wrapper, wrapper.optimizer, evaluator, *evaluator.metrics, hook]

    def process(self) -> Any:
        numbers = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        settings = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        return numbers, settings

    @pytest.mark.parametrize(
        "changes",
        [
            dict(custom_hooks=[dict(type="EMAHook"), dict(type="EMAHok")]),
            dict(default_hooks=dict(logger=dict(type="LoggerHook", interval=0))),
            dict(param_scheduler=[dict(type="LinearLR", start_factor=0.1), dict(type="StepLR")]),
            dict(train_cfg=dict(by_epoch=True, max_epochs=0)),
            dict(randomness=dict(seed=1, deterministic=True), env_cfg=dict(cudnn_benchmark=True), visualizer=3),
            dict(optim_wrapper=dict(optimizer=dict(type="FusedAdamW", lr=-1.0))),
        ],
    )
    def test_it_leaves_no_trace(self, changes: dict[str, Any], tmp_path: Path) -> None:
        cfg, held = self.given(tmp_path)
        before, process = everything(held), self.process()
        with pytest.raises((KeyError, TypeError, ValueError)):
            Runner.from_cfg({**cfg, **changes})
        assert difference(before, everything(held)) == ""
        assert self.process() == process
        assert not (tmp_path / "work").exists()
        runner = Runner.from_cfg(cfg)
        assert runner.optim_wrapper.get_lr()["lr"] == [pytest.approx(0.01)]

    def test_at_any_of_its_lines(self, tmp_path: Path) -> None:
        cfg, held = self.given(tmp_path)
        before, process = everything(held), self.process()
        for line in itertools.count(0, 41):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                failed = failing_at(line, lambda: Runner.from_cfg(cfg))
            if failed is None:
                assert line > 100
                return
            assert difference(before, everything(held)) == "", failed
            assert self.process() == process, failed

    def test_a_model_goes_back_to_where_it_was(self) -> None:
        """As from a GPU that there is none of here."""
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        before = everything(model)

        def move() -> None:
            with unchanged_on_error(model):
                model.to(torch.float64).to("meta")
                model.eval()
                raise Injected

        with pytest.raises(Injected):
            move()
        assert everything(model) == before

    def test_hooks_of_which_one_is_refused_are_not_registered(self, tmp_path: Path) -> None:
        runner = Runner.from_cfg(config(tmp_path))
        hooks = list(runner.hooks)
        with pytest.raises(KeyError, match="EMAHok"):
            runner.register_custom_hooks([dict(type="EMAHook"), dict(type="EMAHok")])
        with pytest.raises(KeyError, match="LogerHook"):
            runner.register_default_hooks(dict(logger=dict(type="LogerHook")))
        assert runner.hooks == hooks
