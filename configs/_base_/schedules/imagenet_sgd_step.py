"""The classic ImageNet schedule: SGD with momentum for 100 epochs, the learning rate divided by 10 at 30, 60 and 90."""

optim_wrapper = dict(optimizer=dict(type="fusedopt.FusedSGD", lr=0.1, momentum=0.9, weight_decay=0.0001))
param_scheduler = dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 90], gamma=0.1)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
