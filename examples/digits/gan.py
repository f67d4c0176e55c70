"""A GAN of 8 x 8 grey images: two networks, each with its own optimizer, trained in turns as in MMagic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from fusedopt.training.engine.model import BaseModel
from fusedopt.training.registry import MODELS
from fusedopt.training.wrappers import OptimWrapper

__all__ = ["DigitsDiscriminator", "DigitsGAN", "DigitsGenerator"]


@MODELS.register_module()
class DigitsGenerator(nn.Sequential):
    """Maps noise, N x ``noise_size``, to images, N x 1 x 8 x 8, from -1 to 1.

    Args:
        noise_size: length of the noise vector of one image.
        channels: number of channels of the larger feature maps.
    """

    def __init__(self, noise_size: int, channels: int):
        super().__init__(
            nn.Linear(noise_size, 2 * channels * 4),
            nn.Unflatten(1, (2 * channels, 2, 2)),
            nn.GroupNorm(8, 2 * channels),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )


@MODELS.register_module()
class DigitsDiscriminator(nn.Sequential):
    """Maps images, N x 1 x 8 x 8, to scores, N x 1, that are high for real images.

    Args:
        channels: number of channels of the larger feature maps.
    """

    def __init__(self, channels: int):
        super().__init__(
            spectral_norm(nn.Conv2d(1, channels, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            spectral_norm(nn.Linear(2 * channels * 4, 1)),
        )


@MODELS.register_module()
class DigitsGAN(BaseModel):
    """A generator and a discriminator, trained in turns.

    Args:
        noise_size: length of the noise vector of one image.
        generator: config of the generator.
        discriminator: config of the discriminator.
        generator_steps: steps of the generator before the discriminator's turn.
        discriminator_steps: steps of the discriminator before the generator's turn.
    """

    batches: Tensor

    def __init__(
        self,
        noise_size: int,
        generator: Mapping[str, Any],
        discriminator: Mapping[str, Any],
        generator_steps: int = 1,
        discriminator_steps: int = 1,
    ):
        super().__init__()
        self.noise_size = noise_size
        self.generator = MODELS.build(generator, noise_size=noise_size)
        self.discriminator = MODELS.build(discriminator)
        self.generator_steps = generator_steps
        self.discriminator_steps = discriminator_steps
        # A buffer, so that a resumed run knows whose turn it is.
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def sample(self, count: int) -> Tensor:
        """New images, count x 1 x 8 x 8."""
        return self.generator(torch.randn(count, self.noise_size, device=self.batches.device))

    def forward(self, inputs: Tensor, labels: Any = None, mode: str = "tensor") -> Any:  # type: ignore[override]
        """Return a new image for each input; in mode ``'predict'``, a list of dicts with one ``fake`` each."""
        fakes = self.sample(len(inputs))
        return [{"fake": fake} for fake in fakes] if mode == "predict" else fakes

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Run one iteration of the discriminator, and the generator's iterations when its turn comes.

        Args:
            data: a batch of :class:`DigitsDataset`.
            optim_wrapper: an :class:`fusedopt.OptimWrapperDict` or MMEngine's, with the keys ``generator`` and
                ``discriminator``.

        Returns:
            The losses: ``loss_discriminator`` and, in the generator's turn, ``loss_generator``.
        """
        images = self.data_preprocessor(data, True)["inputs"]
        discriminator, generator = optim_wrapper["discriminator"], optim_wrapper["generator"]
        losses = {"loss_discriminator": self._train_discriminator(images, discriminator)}
        self.batches += 1
        if int(self.batches) % (self.discriminator_steps * discriminator._accumulative_counts) == 0:
            iterations = self.generator_steps * generator._accumulative_counts
            generator.initialize_count_status(self.generator, 0, iterations)
            self.discriminator.requires_grad_(False)
            for _ in range(iterations):
                losses["loss_generator"] = self._train_generator(len(images), generator)
            self.discriminator.requires_grad_(True)
        return losses

    def _train_discriminator(self, images: Tensor, wrapper: OptimWrapper) -> Tensor:
        with wrapper.optim_context(self.discriminator):
            with torch.no_grad():
                fakes = self.sample(len(images))
            # Hinge loss: scores beyond 1 and -1 do not count.
            loss = functional.relu(1 - self.discriminator(images)).mean()
            loss = loss + functional.relu(1 + self.discriminator(fakes)).mean()
        wrapper.update_params(loss)
        return loss.detach()

    def _train_generator(self, count: int, wrapper: OptimWrapper) -> Tensor:
        with wrapper.optim_context(self.generator):
            loss = -self.discriminator(self.sample(count)).mean()
        wrapper.update_params(loss)
        return loss.detach()
