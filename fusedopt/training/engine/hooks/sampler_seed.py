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
    """Tells the sampler of the training data, or that of its batch sampler, the number of the epoch."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Call ``set_epoch`` of the sampler, if it has that."""
        set_epoch(runner.train_dataloader, runner.epoch)
