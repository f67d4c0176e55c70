"""Fine-tuning a transformer: AdamW, a learning rate that decays from the head to the stem, and clipping."""

# Registers the constructor in MMEngine when MMEngine's Runner reads this config.
custom_imports = dict(imports=["fusedopt.integrations.current"])

optim_wrapper = dict(
    optimizer=dict(type="fusedopt.FusedAdamW", lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LearningRateDecayOptimWrapperConstructor",
    paramwise_cfg=dict(
        layer_decay_rate=0.65,
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={"cls_token": dict(decay_mult=0.0), "pos_embed": dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-4, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=20, eta_min=1e-6, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
