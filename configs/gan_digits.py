"""GAN on handwritten digits: two networks, each with its own fused optimizer and gradient accumulation.

`python -m examples.gan_digits` trains it and saves a picture of its samples.
"""

_base_ = ["_base_/datasets/digits.py", "_base_/default_runtime.py"]

# Registers the constructor in MMEngine when MMEngine's Runner reads this config.
custom_imports = dict(imports=["fusedopt.integrations.current"])

model = dict(
    type="examples.digits.DigitsGAN",
    noise_size=32,
    generator=dict(type="DigitsGenerator", channels=32),
    discriminator=dict(type="DigitsDiscriminator", channels=32),
    # Steps of one network before the other's turn: two of the discriminator, then one of the generator.
    discriminator_steps=2,
    generator_steps=1,
)

train_dataloader = dict(batch_size=16)
# No validation: the quality of the images is judged by eye.
val_dataloader = None
val_cfg = None
val_evaluator = None

train_cfg = dict(by_epoch=True, max_epochs=80)

optim_wrapper = dict(
    constructor="MultiOptimWrapperConstructor",
    # A step of either network takes two iterations, so the generator's turn comes after every fourth batch.
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
