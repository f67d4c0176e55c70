"""SGD with momentum for 100 epochs: a linear warm-up by iteration, then a cosine by epoch; norms do not decay."""

optim_wrapper = dict(
    optimizer=dict(type="fusedopt.FusedSGD", lr=0.8, momentum=0.9, weight_decay=5e-5),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    # Given in epochs, stepped after each iteration.
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=5, eta_min=1e-6),
]
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
