"""Train a GAN on handwritten digits and save a picture of what it draws.

    python examples/gan_digits.py [CONFIG] [--epochs N] [--out FOLDER]

Generator and discriminator have an optimizer wrapper each, built from one config by ``MultiOptimWrapperConstructor``.
``DigitsGAN.train_step`` drives them as MMagic's GANs do.
"""

from __future__ import annotations

import argparse
import runpy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from fusedopt import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from fusedopt.demo.data import load_digits, random_batches
from fusedopt.registry import MODELS

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gan_digits.py"


@MODELS.register_module(force=True)
class DigitsGenerator(nn.Sequential):
    """Noise to images of 1 x 8 x 8, from -1 to 1."""

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


@MODELS.register_module(force=True)
class DigitsDiscriminator(nn.Sequential):
    """Images to one score each, high for real ones."""

    def __init__(self, channels: int):
        super().__init__(
            spectral_norm(nn.Conv2d(1, channels, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            spectral_norm(nn.Linear(2 * channels * 4, 1)),
        )


@MODELS.register_module(force=True)
class DigitsGAN(nn.Module):
    """A generator and a discriminator, and how they take turns.

    Args:
        noise_size: numbers that the generator draws an image from.
        generator: config of the generator.
        discriminator: config of the discriminator.
        generator_steps: steps of the generator before it is the discriminator's turn.
        discriminator_steps: steps of the discriminator before it is the generator's turn.
    """

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

    def sample(self, count: int) -> Tensor:
        """New images."""
        return self.generator(torch.randn(count, self.noise_size))

    def train_step(self, images: Tensor, optim_wrapper: OptimWrapperDict, iteration: int) -> dict[str, Tensor]:
        """One iteration of the discriminator on a batch, and those of the generator when it is its turn.

        Args:
            images: real ones.
            optim_wrapper: ``generator`` and ``discriminator``.
            iteration: number of batches before this one.

        Returns:
            The losses.
        """
        discriminator, generator = optim_wrapper["discriminator"], optim_wrapper["generator"]
        losses = {"discriminator": self._train_discriminator(images, discriminator)}
        if (iteration + 1) % (self.discriminator_steps * discriminator._accumulative_counts) == 0:
            iterations = self.generator_steps * generator._accumulative_counts
            generator.initialize_count_status(self.generator, 0, iterations)
            self.discriminator.requires_grad_(False)
            for _ in range(iterations):
                losses["generator"] = self._train_generator(len(images), generator)
            self.discriminator.requires_grad_(True)
        return losses

    def _train_discriminator(self, images: Tensor, wrapper: OptimWrapper) -> Tensor:
        with wrapper.optim_context(self.discriminator):
            with torch.no_grad():
                fakes = self.sample(len(images))
            # The hinge loss: scores beyond 1 and -1 are good enough.
            loss = functional.relu(1 - self.discriminator(images)).mean()
            loss = loss + functional.relu(1 + self.discriminator(fakes)).mean()
        wrapper.update_params(loss)
        return loss.detach()

    def _train_generator(self, count: int, wrapper: OptimWrapper) -> Tensor:
        with wrapper.optim_context(self.generator):
            loss = -self.discriminator(self.sample(count)).mean()
        wrapper.update_params(loss)
        return loss.detach()


def train(config: Mapping[str, Any], epochs: int | None = None) -> tuple[DigitsGAN, OptimWrapperDict, list[dict]]:
    """Train what a config describes; the losses of each iteration come too."""
    torch.manual_seed(config["train_cfg"]["seed"])
    images, _ = load_digits()
    model = MODELS.build(config["model"])
    optim_wrapper = build_optim_wrapper(model, config["optim_wrapper"])
    assert isinstance(optim_wrapper, OptimWrapperDict)
    batches = random_batches(images, epochs=epochs or config["train_cfg"]["max_epochs"], **config["data"])
    losses = []
    for iteration, batch in enumerate(batches):
        losses.append(model.train_step(batch.images, optim_wrapper, iteration))
    return model, optim_wrapper, losses


def digits_drawn(samples: Tensor) -> list[int]:
    """How many of the samples are closest to each digit, 0 to 9."""
    images, _ = load_digits()
    judge = KNeighborsClassifier(3).fit(images.images.flatten(1).numpy(), images.labels.numpy())
    return torch.bincount(torch.from_numpy(judge.predict(samples.flatten(1).numpy())), minlength=10).tolist()


def save_samples(samples: Tensor, path: Path) -> None:
    """A picture of 64 samples, and of 64 real images beside them."""
    images, _ = load_digits()
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    for axes, title, tiles in zip(
        figure.subplots(1, 2), ("drawn by the generator", "real"), (samples, images.images), strict=True
    ):
        framed = functional.pad(tiles[:64].squeeze(1), (1, 1, 1, 1), value=-1.0)
        axes.imshow(framed.reshape(8, 8, 10, 10).transpose(1, 2).reshape(80, 80), cmap="gray_r")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("--epochs", type=int, help="instead of the config's")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/gan_digits"), help="folder for the picture")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more only wait for each other on images of 8 x 8
    start = time.perf_counter()
    model, optim_wrapper, losses = train(runpy.run_path(str(arguments.config)), arguments.epochs)
    seconds = time.perf_counter() - start
    print(optim_wrapper)
    last = {name: float(loss) for record in losses[-10:] for name, loss in record.items()}
    print(
        f"{len(losses)} iterations in {seconds:.1f} s: {optim_wrapper['discriminator'].step_count} steps of the "
        f"discriminator, {optim_wrapper['generator'].step_count} of the generator; last losses "
        + ", ".join(f"{name} {loss:.3f}" for name, loss in last.items())
    )
    with torch.no_grad():
        samples = model.eval().sample(1000)
    print("closest digits of 1000 samples, 0 to 9:", digits_drawn(samples))
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_samples(samples, arguments.out / "samples.png")
    print(f"saved {arguments.out / 'samples.png'}")


if __name__ == "__main__":
    main()
