"""DistSamplerSeedHook: a new order of the data in each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import HOOKS
from ..data import set_epoch
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["DistSamplerSeedHook"]


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """Sets the epoch in the sampler of the training data, or in its batch sampler's sampler."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Call the sampler's ``set_epoch``, if it has one."""
        set_epoch(runner.train_dataloader, runner.epoch)
