"""DistSamplerSeedHook: a new order of the data in each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["DistSamplerSeedHook"]


@HOOKS.register_module()
class DistSamplerSeedHook(Hook):
    """Tells the sampler of the training data, or that of its batch sampler, the number of the epoch."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Call ``set_epoch`` of the sampler that has it."""
        loader = runner.train_dataloader
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            set_epoch = getattr(sampler, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(runner.epoch)
                return
