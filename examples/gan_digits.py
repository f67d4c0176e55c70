"""Train a GAN on handwritten digits and save a picture of its samples.

    python -m examples.gan_digits [CONFIG] [--epochs N] [--out FOLDER]

Generator and discriminator have an optimizer wrapper each, built from one config by ``MultiOptimWrapperConstructor``.
``examples.digits.DigitsGAN`` drives them as MMagic's GANs do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional

from examples.digits import DigitsGAN
from examples.digits.data import load_digits
from fusedopt.training.engine import Config, ConfigError, Runner

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "gan_digits.py"


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
    parser.add_argument("--epochs", type=int, help="number of epochs (default: the config's)")
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs/gan_digits"), help="output folder (default: work_dirs/gan_digits)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads only wait for each other on images of 8 x 8
    try:
        config = Config.fromfile(arguments.config)
        config.work_dir = str(arguments.out)
        if arguments.epochs is not None:
            config.merge_from_dict({"train_cfg.max_epochs": arguments.epochs})
        runner = Runner.from_cfg(config)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    if not isinstance(runner.model, DigitsGAN) or runner.train_loop is None:
        parser.exit(2, f"{parser.prog}: {arguments.config}: this config does not train a DigitsGAN\n")
    start = time.perf_counter()
    model = runner.train()
    seconds = time.perf_counter() - start
    optim_wrapper = runner.optim_wrapper
    print(optim_wrapper)
    print(
        f"{runner.iter} iterations in {seconds:.1f} s: {optim_wrapper['discriminator'].step_count} steps of the "
        f"discriminator, {optim_wrapper['generator'].step_count} of the generator"
    )
    with torch.no_grad():
        samples = model.eval().sample(1000).cpu()
    print("closest digits of 1000 samples, 0 to 9:", digits_drawn(samples))
    save_samples(samples, arguments.out / "samples.png")
    print(f"saved {arguments.out / 'samples.png'}")


if __name__ == "__main__":
    main()
