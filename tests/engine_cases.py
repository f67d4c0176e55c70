"""A small model, data and metric for the engine's tests, and a config that trains them within a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

from fusedopt.training.engine import BaseMetric, BaseModel, CheckpointError, Hook, Runner
from fusedopt.training.registry import DATASETS, HOOKS, METRICS, MODELS


@DATASETS.register_module(force=True)
class Points(torch.utils.data.Dataset):
    """Random points with classes, disturbed anew each time they are loaded."""

    metainfo: ClassVar = dict(classes=("first", "second", "third"))

    def __init__(self, size: int, noise: float = 0.1, seed: int = 0):
        self.points = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
        self.labels = self.points[:, :3].argmax(1)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(inputs=self.points[index] + self.noise * torch.randn(4), labels=self.labels[index])


@MODELS.register_module(force=True)
class PointNet(BaseModel):
    """Two layers with dropout between, and maybe BatchNorm."""

    def __init__(self, dropout: float = 0.2, batch_norm: bool = False, **kwargs: Any):
        super().__init__(**kwargs)
        norm = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.backbone = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> Any:
        logits = self.head(self.backbone(inputs))
        if mode == "loss":
            return dict(loss=functional.cross_entropy(logits, labels))
        if mode == "tensor":
            return logits
        return [dict(pred_label=pred, gt_label=gt) for pred, gt in zip(logits.argmax(1), labels, strict=True)]


class Parts(PointNet):
    """Trains two parts with an optimizer each."""

    def train_step(self, data, optim_wrapper):
        loss, log_vars = self.parse_losses(self(**self.data_preprocessor(data, True), mode="loss"))
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return log_vars


@METRICS.register_module(force=True)
class HitRate(BaseMetric):
    """Share of right answers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(float(sample["pred_label"] == sample["gt_label"]) for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(accuracy=sum(results) / len(results), count=len(results))


@HOOKS.register_module(force=True)
class Recorder(Hook):
    """Keeps what it saw: losses by iteration, learning rates, and the iterations it was called in."""

    priority = "LOWEST"

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.lrs: list[float] = []
        self.metrics: list[dict[str, Any]] = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.lrs.append(float(next(iter(runner.optim_wrapper.get_lr().values()))[0]))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = float(outputs["loss"])

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))


def loader(size: int, batch_size: int, shuffle: bool, sampler: str = "DefaultSampler", **settings) -> dict[str, Any]:
    return dict(
        dataset=dict(type="Points", size=size),
        batch_size=batch_size,
        num_workers=0,
        collate_fn=dict(type="default_collate"),
        sampler=dict(type=sampler, shuffle=shuffle),
        **settings,
    )


def config(work_dir: Path | str, *, validates: bool = True, **changes: Any) -> dict[str, Any]:
    """Four epochs of five iterations; ``changes`` replace top-level keys."""
    cfg: dict[str, Any] = dict(
        model=dict(type="PointNet"),
        work_dir=str(work_dir),
        train_dataloader=loader(40, 8, shuffle=True),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        optim_wrapper=dict(optimizer=dict(type="FusedAdamW", lr=1e-2), clip_grad=dict(max_norm=1.0)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=6),
            dict(type="CosineAnnealingLR", begin=1),
        ],
        default_hooks=dict(logger=dict(type="LoggerHook", interval=2)),
        randomness=dict(seed=0),
        log_level="WARNING",
    )
    if validates:
        cfg.update(
            val_dataloader=loader(20, 8, shuffle=False),
            val_cfg=dict(),
            val_evaluator=dict(type="HitRate"),
        )
    return {**cfg, **changes}


def by_iterations(**changes: Any) -> dict[str, Any]:
    """Changes of :func:`config` for training by iterations."""
    return {
        **dict(
            train_cfg=dict(by_epoch=False, max_iters=20, val_interval=5),
            train_dataloader=loader(40, 8, shuffle=True, sampler="InfiniteSampler"),
            param_scheduler=[
                dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=6),
                dict(type="PolyLR", by_epoch=False, begin=6, eta_min=1e-4),
            ],
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=2, log_metric_by_epoch=False),
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=5),
            ),
        ),
        **changes,
    }


def train(cfg: dict[str, Any], *hooks: Hook) -> Runner:
    """A runner that has trained, with a :class:`Recorder` as its last hook."""
    before = repr(cfg)
    runner = Runner.from_cfg({**cfg, "custom_hooks": [*cfg.get("custom_hooks", ()), *hooks, Recorder()]})
    runner.train()
    assert isinstance(cfg["model"], torch.nn.Module) or repr(cfg) == before, "the Runner changed the user's config"
    return runner


def recorded(runner: Runner) -> Recorder:
    return next(hook for hook in runner.hooks if isinstance(hook, Recorder))


def scalars(work_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of the file, which must be JSON: Python's own would take NaN too."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = (Path(work_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def state_of(runner: Runner) -> dict[str, Any]:
    """Everything that must be equal where two trainings are."""
    schedulers = runner.param_schedulers or []
    listed = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    return dict(
        weights=runner.bare_model.state_dict(),
        optimizer=runner.optim_wrapper.state_dict(),
        schedulers=[[scheduler.state_dict() for scheduler in part] for part in listed],
        gradients=[param.grad for param in runner.bare_model.parameters()],
        random=torch.get_rng_state(),
        place=(runner.epoch, runner.iter, runner.train_loop.progress()),
    )


def assert_same(one: Any, other: Any, path: str = "state") -> None:
    """Equal bit for bit, in structure and in every tensor."""
    assert type(one) is type(other), path
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{path}[{index}]")
    else:
        assert one == other, path


def foreign(tmp_path: Path, **changes: Any) -> Path:
    """A checkpoint of ours, changed; None removes an entry."""
    train(config(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=2)))
    path = tmp_path / "epoch_2.pth"
    checkpoint = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in checkpoint.items() if value is not None}, path)
    return path


def assert_refused(folder: Path, message: str) -> None:
    """Resuming raises, and neither the files nor the model, optimizer and schedulers have changed."""
    files = {path: path.read_bytes() for path in folder.glob("*") if path.suffix == ".pth"}
    files[folder / "last_checkpoint"] = (folder / "last_checkpoint").read_bytes()
    runner = Runner.from_cfg(config(folder, resume=True))
    before, fresh = state_of(runner), Runner.from_cfg(config(folder))
    hub = runner.message_hub.state_dict()
    with pytest.raises(CheckpointError, match=message):
        runner.load_or_resume()
    assert_same({**state_of(runner), "random": 0}, {**before, "random": 0})
    assert_same({**state_of(runner), "random": 0}, {**state_of(fresh), "random": 0})
    assert runner.message_hub.state_dict() == hub
    assert {path: path.read_bytes() for path in files} == files
