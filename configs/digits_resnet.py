"""ResNet on handwritten digits: SGD with Nesterov momentum in float16 with a dynamic loss scale, and clipping."""

_base_ = ["_base_/datasets/digits.py", "_base_/default_runtime.py"]

model = dict(type="examples.digits.DigitsResNet", channels=(16, 32, 64), blocks_per_stage=1)

train_cfg = dict(by_epoch=True, max_epochs=5)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    # float16 shows the dynamic loss scale, which works on a CPU too. Few CPUs have native float16 convolutions; on the
    # others 'bfloat16' or 'float32' is many times faster.
    dtype="float16",
    loss_scale="dynamic",
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=20),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=20, eta_min=1e-4),
]
