"""Handwritten digits: data, models and a GAN, for the configs, the demonstration and the tests.

Configs name these classes by import path, as in ``type='examples.digits.DigitsViT'``.
"""

from examples.digits.data import DigitsDataset
from examples.digits.gan import DigitsDiscriminator, DigitsGAN, DigitsGenerator
from examples.digits.models import ClassificationMetrics, DigitsResNet, DigitsViT

__all__ = [
    "ClassificationMetrics",
    "DigitsDataset",
    "DigitsDiscriminator",
    "DigitsGAN",
    "DigitsGenerator",
    "DigitsResNet",
    "DigitsViT",
]
