"""A small ResNet on handwritten digits: a warm-up over two epochs, then a cosine."""

_base_ = ["_base_/datasets/digits.py", "_base_/schedules/imagenet_sgd_cosine.py", "_base_/default_runtime.py"]

model = dict(type="examples.digits.DigitsResNet", channels=(16, 32, 64), blocks_per_stage=1)
optim_wrapper = dict(optimizer=dict(lr=0.2, nesterov=True))
# Lists are replaced as a whole.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=2, eta_min=1e-4),
]
train_cfg = dict(max_epochs=10)
