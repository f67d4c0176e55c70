"""The handwritten digits of scikit-learn: 1438 images to train on, 359 to validate and to test."""

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    dataset=dict(type="examples.digits.DigitsDataset", split="train"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
)
val_dataloader = dict(
    batch_size=359,
    num_workers=0,
    dataset=dict(type="examples.digits.DigitsDataset", split="val"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
val_cfg = dict()
val_evaluator = dict(type="examples.digits.ClassificationMetrics")
test_dataloader = val_dataloader
test_cfg = val_cfg
test_evaluator = val_evaluator
