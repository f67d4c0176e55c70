"""A small ResNet on handwritten digits with the classic ImageNet schedule, shortened to 10 epochs."""

_base_ = ["_base_/datasets/digits.py", "_base_/schedules/imagenet_sgd_step.py", "_base_/default_runtime.py"]

model = dict(type="examples.digits.DigitsResNet", channels=(16, 32, 64), blocks_per_stage=1)
param_scheduler = dict(milestones=[3, 6, 9])
train_cfg = dict(max_epochs=10)
