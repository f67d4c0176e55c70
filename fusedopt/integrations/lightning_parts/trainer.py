"""The callback for Lightning's Trainer, without the package's base class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from ...optimizers import FusedOptimizer
from ...optimizers.next_step import clip_now
from ...rules import parse_clip_grad
from ..replaced import replace_methods, restore_methods
from ..scalers import is_unscaled
from .clipping import (
    as_stock,
    clip_in_the_step,
    comes_from,
    fused_optimizer,
    refuse_two_clippings,
    serves_scaler,
    serves_strategy,
)

__all__ = ["Clipping"]

# Note [Who looks at the gradients]
# Lightning's precision plugin runs the closure, unscales, calls the hooks on_before_optimizer_step, clips by the hook
# configure_gradient_clipping, and steps. FusedClipping replaces two methods of the plugin: clip_gradients, which then
# only tells the step to clip, and optimizer_step, around all of that. Nobody sees the difference but these:
#
# - on_before_optimizer_step sees gradients without the scale, so Lightning unscales for it. With manual optimization
#   they may be clipped by then, so they are.
# - A module's own configure_gradient_clipping may look at or change the gradients in any way, before and after it has
#   Lightning clip. So Lightning unscales and clips there as for a stock optimizer.
#
# The same stock way is taken with a scaler or a precision plugin of which we do not know what it does.

#: What of a precision plugin decides how gradients are clipped.
_CLIPS = "clip_gradients", "clip_grad_by_norm", "clip_grad_by_value", "main_params"


class Clipping:
    """``FusedClipping`` of both packages: they add the base class and its documentation."""

    _pl: ClassVar[Any]  # the module that has Callback, LightningModule and utilities
    _packages: ClassVar[tuple[str, ...]]  # the packages that its classes come from

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called by Lightning. Replaces what clips."""
        if stage == "fit" and serves_strategy(self._packages, type(trainer.strategy)):
            self._told: set[str] = set()
            plugin = trainer.precision_plugin
            restore_methods(plugin)  # after a fit that never ended
            replace_methods(
                plugin,
                {
                    "clip_gradients": partial(self._clip_gradients, trainer, plugin.clip_gradients),
                    "optimizer_step": partial(self._optimizer_step, trainer, plugin.optimizer_step),
                },
                getattr(plugin, "scaler", None),
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Called by Lightning when it has the optimizers.

        Raises:
            ValueError: one is fused, and the strategy is not served.
        """
        if serves_strategy(self._packages, type(trainer.strategy)):
            return
        for optimizer in trainer.optimizers:
            if (fused := fused_optimizer(optimizer)) is not None:
                raise ValueError(
                    f"FusedClipping does not serve {type(fused).__name__} under {type(trainer.strategy).__name__}; "
                    "expected SingleDeviceStrategy, DDPStrategy or ModelParallelStrategy"
                )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Called by Lightning. Restores what was replaced."""
        restore_methods(trainer.precision_plugin)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Called by Lightning, which does not call ``teardown`` then."""
        restore_methods(trainer.precision_plugin)

    def _clip_gradients(
        self,
        trainer: Any,
        stock: Callable[..., None],
        optimizer: Any,
        clip_val: float = 0.0,
        gradient_clip_algorithm: str = "norm",
    ) -> None:
        """In place of the plugin's method of this name."""
        fused = fused_optimizer(optimizer)
        if fused is None or clip_val <= 0 or gradient_clip_algorithm not in ("norm", "value"):
            stock(optimizer, clip_val, gradient_clip_algorithm)
        elif self._clips_before_the_step(trainer, fused):
            refuse_two_clippings(fused)
            with as_stock(fused):
                stock(optimizer, clip_val, gradient_clip_algorithm)
        else:
            by_norm = gradient_clip_algorithm == "norm"
            clip = parse_clip_grad({"max_norm": clip_val} if by_norm else {"type": "value", "clip_value": clip_val})
            assert clip is not None
            clip_in_the_step(fused, clip, getattr(trainer.precision_plugin, "scaler", None))

    def _optimizer_step(
        self,
        trainer: Any,
        stock: Callable[..., Any],
        optimizer: Any,
        model: Any,
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        """In place of the plugin's method of this name."""
        fused = fused_optimizer(optimizer)
        if fused is None:
            return stock(optimizer, model=model, closure=closure, **kwargs)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        before = self._clips_before_the_step(trainer, fused)
        who = self._who_looks(trainer)
        if who and not before:
            closure = partial(self._run_and_clip, fused, closure)
        if (before or (who and scaler is not None)) and not is_unscaled(scaler, fused):
            if who and not before:
                self._tell(
                    f"Lightning unscales the gradients of {type(fused).__name__} before the step, in a pass of its "
                    f"own, because {who} has the hook on_before_optimizer_step"
                )
            with as_stock(fused):
                return stock(optimizer, model=model, closure=closure, **kwargs)
        return stock(optimizer, model=model, closure=closure, **kwargs)

    @staticmethod
    def _run_and_clip(optimizer: FusedOptimizer, closure: Callable[[], Any]) -> Any:
        """With manual optimization, clip what the user has had clipped by now."""
        result = closure()
        clip_now(optimizer)
        return result

    def _who_looks(self, trainer: Any) -> str:
        """The first callback that has the hook ``on_before_optimizer_step``, or the module; "" for nobody."""
        name = "on_before_optimizer_step"
        for callback in trainer.callbacks:
            if _overrides(callback, name, self._pl.Callback):
                return type(callback).__name__
        module = trainer.lightning_module
        return type(module).__name__ if _overrides(module, name, self._pl.LightningModule) else ""

    def _clips_before_the_step(self, trainer: Any, optimizer: FusedOptimizer) -> bool:
        """Whether clipping goes Lightning's own way."""
        module, plugin = trainer.lightning_module, trainer.precision_plugin
        name = "configure_gradient_clipping"
        if module.automatic_optimization and _overrides(module, name, self._pl.LightningModule):
            why = f"{type(module).__name__} has its own {name}"
        elif not serves_scaler(scaler := getattr(plugin, "scaler", None)):
            why = f"fusedopt does not know the scaler {type(scaler).__name__}"
        elif not comes_from(self._packages, plugin, *_CLIPS):
            why = f"{type(plugin).__name__} has its own way to clip"
        else:
            return False
        self._tell(f"Lightning clips the gradients of {type(optimizer).__name__} before the step, because {why}")
        return True

    def _tell(self, text: str) -> None:
        """Log it once in a fit."""
        if text not in self._told:
            self._told.add(text)
            self._pl.utilities.rank_zero_info(f"FusedClipping: {text}")


def _overrides(owner: Any, name: str, base: type) -> bool:
    own = getattr(owner, name)
    return getattr(own, "__func__", own) is not getattr(base, name)
