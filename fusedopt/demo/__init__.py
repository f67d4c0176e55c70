"""Handwritten digits: data, models, a GAN, and one config trained with a stock optimizer and with its fused twin.

What a config names is here, as in ``type='fusedopt.demo.DigitsViT'``.
"""

from .data import DigitsDataset
from .gan import DigitsDiscriminator, DigitsGAN, DigitsGenerator
from .models import ClassificationMetrics, DigitsResNet, DigitsViT

__all__ = [
    "ClassificationMetrics",
    "DigitsDataset",
    "DigitsDiscriminator",
    "DigitsGAN",
    "DigitsGenerator",
    "DigitsResNet",
    "DigitsViT",
]
