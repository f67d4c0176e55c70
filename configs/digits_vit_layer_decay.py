"""A small ViT on handwritten digits with layer-wise learning-rate decay."""

_base_ = ["_base_/datasets/digits.py", "_base_/schedules/adamw_layer_decay.py", "_base_/default_runtime.py"]

model = dict(type="examples.digits.DigitsViT", embed_dims=64, num_layers=4, num_heads=4, patch_size=4, dropout=0.0)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=2, eta_min=1e-5, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=15, val_interval=5)
