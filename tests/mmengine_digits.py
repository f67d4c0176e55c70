"""A model and a config that MMEngine's own Runner trains on handwritten digits. Imported by a config file."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from examples.digits.data import load_digits


@DATASETS.register_module(force=True)
class DigitsDataset(Dataset):
    """The first images of a split."""

    def __init__(self, train: bool, size: int):
        self.split = load_digits()[0 if train else 1]
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(inputs=self.split.images[index], labels=self.split.labels[index])


@MODELS.register_module(force=True)
class DigitsNet(BaseModel):
    """Two convolutions, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(72, 10)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor, mode: str = "tensor") -> Any:
        logits = self.head(self.backbone(inputs)).float()
        if mode == "loss":
            return dict(loss=functional.cross_entropy(logits, labels))
        return [dict(hit=hit) for hit in logits.argmax(1) == labels]


@METRICS.register_module(force=True)
class Accuracy(BaseMetric):
    """Share of right answers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(float(sample["hit"]) for sample in data_samples)

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(accuracy=sum(results) / len(results))


CONFIG = """
custom_imports = dict(imports=['mmengine_digits', {imports}])
model = dict(type='DigitsNet')
train_dataloader = dict(
    batch_size=32, num_workers=0, dataset=dict(type='DigitsDataset', train=True, size=320),
    sampler=dict(type='DefaultSampler', shuffle=True), collate_fn=dict(type='default_collate'))
val_dataloader = dict(
    batch_size=64, num_workers=0, dataset=dict(type='DigitsDataset', train=False, size=128),
    sampler=dict(type='DefaultSampler', shuffle=False), collate_fn=dict(type='default_collate'))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_cfg = dict()
val_evaluator = dict(type='Accuracy')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.05),
    clip_grad=dict(max_norm=0.5),
    accumulative_counts=3,
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={{'head': dict(lr_mult=2.0)}}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=6),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, T_max=4)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=5),
    checkpoint=dict(type='CheckpointHook', interval=1))
randomness = dict(seed=0, deterministic=False)
env_cfg = dict(mp_cfg=dict(mp_start_method='fork', opencv_num_threads=1))
default_scope = 'mmengine'
"""
