"""A ViT-L's worth of parameters on handwritten digits, for GPUs: a rate of its own for each layer.

No digit needs 300 million parameters. The optimizer's step is that of a real training, though: AdamW with AMP,
clipping, and one param group per parameter.
"""

_base_ = ["../../configs/_base_/datasets/digits.py", "../../configs/_base_/default_runtime.py"]

_num_layers = 24
_layer_decay = 0.75
_no_decay = ("norm", "attn.qkv.bias", "attn.proj.bias", "fc1.bias", "fc2.bias")
_lr_mult = {f"layers.{i}": _layer_decay ** (_num_layers - i) for i in range(_num_layers)}

model = dict(
    type="examples.digits.DigitsViT", embed_dims=1024, num_layers=_num_layers, num_heads=16, patch_size=2, dropout=0.0
)

train_dataloader = dict(batch_size=128)

train_cfg = dict(by_epoch=True, max_epochs=4)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.98), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            **{layer: dict(lr_mult=mult) for layer, mult in _lr_mult.items()},
            **{
                f"{layer}.{name}": dict(lr_mult=mult, decay_mult=0.0)
                for layer, mult in _lr_mult.items()
                for name in _no_decay
            },
        },
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=5),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=5, eta_min=1e-6),
]
