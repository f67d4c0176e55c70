"""Against MMEngine's Runner: the same hooks act in the same order, and the same training comes out."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_cases import HitRate, PointNet, Points, by_iterations, config
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and torch warn of while MMEngine is imported is not ours
    pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'fusedopt[mmengine]'")
    import mmengine.registry as theirs
    from mmengine.dataset import DefaultSampler as TheirDefaultSampler
    from mmengine.dataset import InfiniteSampler as TheirInfiniteSampler
    from mmengine.dataset import pseudo_collate as their_pseudo_collate
    from mmengine.evaluator import BaseMetric as TheirMetric
    from mmengine.hooks import Hook as TheirHook
    from mmengine.model import BaseModel as TheirModel
    from mmengine.runner import Runner as TheirRunner

from fusedopt.training.engine import DefaultSampler, Hook, InfiniteSampler, Runner, pseudo_collate

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

numbers = itertools.count()


class Point(NamedTuple):
    number: int
    name: str


@theirs.MODELS.register_module(name="PointNet", force=True)
class TheirPointNet(TheirModel):
    """PointNet for MMEngine, with the same weights from the same seed."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs, labels, mode="tensor"):
        return PointNet.forward(self, inputs, labels, mode)


@theirs.METRICS.register_module(name="HitRate", force=True)
class TheirHitRate(TheirMetric):
    process, compute_metrics = HitRate.process, HitRate.compute_metrics


theirs.DATASETS.register_module(name="Points", module=Points, force=True)


def settings(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    quiet = dict(type="Points", size=40, noise=0.0)
    cfg = config(
        folder,
        model=dict(type="PointNet", dropout=0.0),
        # What MMEngine has too.
        optim_wrapper=dict(optimizer=dict(type="AdamW", lr=1e-2), clip_grad=dict(max_norm=0.5), accumulative_counts=2),
        env_cfg=dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
    )
    cfg = {**cfg, **copy.deepcopy(changes)}
    for key in ("train_dataloader", "val_dataloader"):
        if cfg[key] is not None:
            cfg[key] = {**cfg[key], "dataset": quiet}
    return cfg


class Watch:
    """Calls of all stages of all hooks, and the learning rates."""

    def __init__(self, runner: Any, base: type):
        self.trace: list[tuple[str, str]] = []
        self.lrs: list[float] = []
        for hook in runner.hooks:
            for stage in base.stages:
                self._wrap(hook, stage)

    def _wrap(self, hook: Any, stage: str) -> None:
        original, name = getattr(hook, stage), type(hook).__name__

        def traced(runner, **kwargs):
            self.trace.append((name, stage))
            if (name, stage) == ("RuntimeInfoHook", "before_train_iter"):
                self.lrs.append(runner.optim_wrapper.get_lr()["lr"][0])
            return original(runner, **kwargs)

        setattr(hook, stage, traced)


def run(tmp_path: Path, changes: dict[str, Any]) -> tuple[Watch, Any, Watch, Any]:
    mine = Runner.from_cfg(settings(tmp_path / "ours", changes))
    watch = Watch(mine, Hook)
    mine.train()
    cfg = settings(tmp_path / "theirs", changes)
    their = TheirRunner.from_cfg({**cfg, "experiment_name": f"engine_{next(numbers)}"})
    their_watch = Watch(their, TheirHook)
    their.train()
    return watch, mine, their_watch, their


VARIANTS = {
    "by epoch": {},
    "by epoch, rarely": dict(
        train_cfg=dict(by_epoch=True, max_epochs=5, val_begin=2, val_interval=2),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=2, max_keep_ckpts=1)),
    ),
    "by iteration": by_iterations(),
    "by iteration, rarely": by_iterations(
        train_cfg=dict(by_epoch=False, max_iters=17, val_interval=6),
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=4)),
    ),
    "dropout, without a validation": dict(
        model=dict(type="PointNet", dropout=0.5), val_dataloader=None, val_cfg=None, val_evaluator=None
    ),
    "custom hooks": dict(
        custom_hooks=[
            dict(type="EmptyCacheHook", priority="VERY_LOW"),
            dict(type="SyncBuffersHook"),
            dict(type="EmptyCacheHook", priority=5),
        ]
    ),
    "fewer hooks": dict(default_hooks=dict(timer=None, logger=None, checkpoint=None)),
    "schedules": dict(
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=True, end=2, convert_to_iter_based=True),
            dict(type="CosineAnnealingLR", by_epoch=False, begin=10, T_max=10, eta_min=1e-5),
            dict(type="MultiStepLR", milestones=[1, 3], gamma=0.5),
            dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater", patience=0, factor=0.5),
        ]
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_training(tmp_path, name):
    changes = VARIANTS[name]
    if "timer" in changes.get("default_hooks", {}):
        changes = {**changes, "log_level": "ERROR"}
    ours, mine, theirs_, their = run(tmp_path, changes)
    assert ours.trace == theirs_.trace
    assert ours.lrs == pytest.approx(theirs_.lrs, rel=1e-12)
    for (key, param), expected in zip(mine.model.named_parameters(), their.model.parameters(), strict=True):
        assert torch.equal(param, expected), key
    files = [{path.name for path in (tmp_path / each).glob("*.pth")} for each in ("ours", "theirs")]
    assert files[0] == files[1]


def test_the_order_of_hooks_in_the_log_is_that_of_the_registration(tmp_path):
    changes = VARIANTS["custom hooks"]
    mine = Runner.from_cfg(settings(tmp_path / "ours", changes))
    cfg = settings(tmp_path / "theirs", changes)
    their = TheirRunner.from_cfg({**cfg, "experiment_name": f"engine_{next(numbers)}"})
    for one, other in zip(mine.hooks, their.hooks, strict=True):
        assert type(one).__name__ == type(other).__name__


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [7, 8])
def test_the_samplers_draw_the_same(shuffle, size, monkeypatch):
    for rank, world in ((0, 1), (1, 3)):
        for name, value in (("rank", rank), ("world_size", world)):
            monkeypatch.setattr(f"fusedopt.training.engine.data.{name}", lambda value=value: value)
        monkeypatch.setattr(
            sys.modules["mmengine.dataset.sampler"], "get_dist_info", lambda rank=rank, world=world: (rank, world)
        )
        for round_up in (True, False):
            ours = DefaultSampler(range(size), shuffle, 3, round_up)
            their = TheirDefaultSampler(range(size), shuffle, 3, round_up)
            for epoch in range(3):
                ours.set_epoch(epoch)
                their.set_epoch(epoch)
                assert list(ours) == list(their) and len(ours) == len(their)
        endless = zip(
            InfiniteSampler(range(size), shuffle, 3), TheirInfiniteSampler(range(size), shuffle, 3), strict=False
        )
        assert all(one == other for one, other in itertools.islice(endless, 40))


@pytest.mark.parametrize(
    "samples",
    [
        [dict(inputs=torch.ones(2), data_samples=1), dict(inputs=torch.zeros(2), data_samples=2)],
        [(torch.ones(2), dict(a=[1, 2])), (torch.zeros(2), dict(a=[3, 4]))],
        [Point(1, "a"), Point(2, "b")],
        ["one", "two"],
        [1.5, 2.5],
    ],
)
def test_a_batch_is_put_together_the_same_way(samples):
    """But for lists everywhere: MMEngine's are tuples inside of a tuple."""
    ours, their = repr(pseudo_collate(samples)), repr(their_pseudo_collate(samples))
    if isinstance(samples[0], tuple):
        ours, their = (text.translate(str.maketrans("()", "[]")) for text in (ours, their))
    assert ours == their


def test_a_checkpoint_of_ours_is_read_by_mmengine(tmp_path):
    """The names in the file are MMEngine's: it loads the weights, and torch the optimizer's state."""
    mine = Runner.from_cfg(settings(tmp_path / "ours", {}))
    mine.train()
    cfg = settings(tmp_path / "theirs", {})
    their = TheirRunner.from_cfg({**cfg, "experiment_name": f"engine_{next(numbers)}"})
    their.load_checkpoint(str(tmp_path / "ours" / "epoch_4.pth"))
    assert all(map(torch.equal, their.model.parameters(), mine.model.parameters()))


def test_weights_of_mmengine_are_loaded(tmp_path):
    cfg = settings(tmp_path / "theirs", dict(default_hooks=dict(logger=None, checkpoint=None)))
    their = TheirRunner.from_cfg({**cfg, "experiment_name": f"engine_{next(numbers)}"})
    torch.save(dict(meta=dict(epoch=1), state_dict=their.model.state_dict()), tmp_path / "theirs.pth")
    mine = Runner.from_cfg({**settings(tmp_path / "ours", {}), "randomness": dict(seed=3)})
    assert not all(map(torch.equal, their.model.parameters(), mine.model.parameters()))
    mine.load_checkpoint(tmp_path / "theirs.pth", strict=True)
    assert all(map(torch.equal, their.model.parameters(), mine.model.parameters()))
