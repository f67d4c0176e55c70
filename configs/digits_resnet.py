"""ResNet on handwritten digits: SGD with Nesterov momentum in float16 with a dynamic loss scale, and clipping."""

model = dict(type="DigitsResNet", channels=(16, 32, 64), blocks_per_stage=1)

data = dict(batch_size=32, val_fraction=0.2, seed=0)

train_cfg = dict(max_epochs=5, seed=0)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    # float16 for its dynamic loss scale, which works on the CPU too. Few CPUs convolve float16 natively: on them
    # 'bfloat16' or 'float32' is many times faster.
    dtype="float16",
    loss_scale="dynamic",
    optimizer=dict(type="SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)

lr_schedule = dict(warmup_steps=20, start_factor=0.1, eta_min=1e-4)
