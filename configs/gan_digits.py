"""GAN on handwritten digits: two networks, each with a fused optimizer and gradient accumulation of its own.

`python -m examples.gan_digits` trains it and draws what it has learned.
"""

_base_ = ["_base_/datasets/digits.py", "_base_/default_runtime.py"]

# Where MMEngine's Runner reads this, it learns of the constructor here.
custom_imports = dict(imports=["fusedopt.integrations.current"])

model = dict(
    type="examples.digits.DigitsGAN",
    noise_size=32,
    generator=dict(type="DigitsGenerator", channels=32),
    discriminator=dict(type="DigitsDiscriminator", channels=32),
    # Steps of a network before it is the other's turn: two of the discriminator, then one of the generator.
    discriminator_steps=2,
    generator_steps=1,
)

train_dataloader = dict(batch_size=16)
# Nothing to validate: whether images are good is for the eye to judge.
val_dataloader = None
val_cfg = None
val_evaluator = None

train_cfg = dict(by_epoch=True, max_epochs=80)

optim_wrapper = dict(
    constructor="MultiOptimWrapperConstructor",
    # A step of either takes two iterations. So the generator's turn comes after every fourth batch.
    generator=dict(
        accumulative_counts=2,
        optimizer=dict(type="fusedopt.FusedAdam", lr=1e-3, betas=(0.5, 0.99)),
        clip_grad=dict(max_norm=10.0),
    ),
    discriminator=dict(
        accumulative_counts=2,
        optimizer=dict(type="fusedopt.FusedAdam", lr=5e-4, betas=(0.5, 0.99)),
        clip_grad=dict(max_norm=10.0),
        paramwise_cfg=dict(bias_lr_mult=2.0),
    ),
)
default_hooks = dict(checkpoint=dict(interval=20), logger=dict(interval=89))
