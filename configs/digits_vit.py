"""ViT on handwritten digits: AdamW in bfloat16, a learning rate for each layer, clipping, accumulation.

It shows what fusedopt is for: `paramwise_cfg` makes one param group per parameter. Change
`type='AdamW'` to `type='FusedAdamW'` and nothing else to train with the fused optimizer;
`python -m fusedopt compare configs/digits_vit.py` trains both and compares them.
"""

_base_ = ["_base_/datasets/digits.py", "_base_/default_runtime.py"]

_num_layers = 6
_layer_decay = 0.8

model = dict(
    type="examples.digits.DigitsViT", embed_dims=256, num_layers=_num_layers, num_heads=4, patch_size=4, dropout=0.1
)

train_cfg = dict(by_epoch=True, max_epochs=10)

# A key in custom_keys switches off the other rules for the parameters it matches, and the longest match wins: the
# norms and biases inside the layers therefore need keys of their own to stay without weight decay.
_no_decay = ("norm", "attn.qkv.bias", "attn.proj.bias", "fc1.bias", "fc2.bias")
_lr_mult = {f"layers.{i}": _layer_decay ** (_num_layers - i) for i in range(_num_layers)}
_embedding = dict(lr_mult=_layer_decay ** (_num_layers + 1), decay_mult=0.0)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    # bfloat16 runs fast on CPUs with AVX512-BF16 or AMX and on GPUs from sm_80 on; elsewhere use 'float32'.
    # loss_scale is 'dynamic' by default; bfloat16 does not need it, but it exercises the whole path.
    dtype="bfloat16",
    optimizer=dict(type="AdamW", lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=2,
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            "cls_token": _embedding,
            "pos_embed": _embedding,
            **{layer: dict(lr_mult=mult) for layer, mult in _lr_mult.items()},
            **{
                f"{layer}.{name}": dict(lr_mult=mult, decay_mult=0.0)
                for layer, mult in _lr_mult.items()
                for name in _no_decay
            },
        },
    ),
)

# Counted in iterations; an optimizer step takes two.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, end=40),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=40, eta_min=1e-5),
]
