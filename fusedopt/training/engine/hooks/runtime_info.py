"""RuntimeInfoHook: the progress and results of a run, for other hooks to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ....messages import as_float
from ....version import __version__
from ...registry import HOOKS
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["RuntimeInfoHook"]


@HOOKS.register_module()
class RuntimeInfoHook(Hook):
    """Keeps epoch, iteration, learning rates, losses, gradient norm and metrics in the message hub."""

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._steps: Any = None
        self._stage_before: Any = None

    def before_run(self, runner: Runner) -> None:
        """Record constants of the run."""
        hub = runner.message_hub
        hub.update_info("seed", runner.seed)
        hub.update_info("experiment_name", runner.experiment_name)
        hub.update_info("fusedopt_version", __version__)

    def before_train(self, runner: Runner) -> None:
        """Record where the run starts."""
        hub = runner.message_hub
        hub.update_info("loop_stage", "train")
        for name in ("epoch", "iter", "max_epochs", "max_iters"):
            hub.update_info(name, getattr(runner, name))

    def after_train(self, runner: Runner) -> None:
        """Forget the stage."""
        runner.message_hub.pop_info("loop_stage")

    def before_train_epoch(self, runner: Runner) -> None:
        """Record the epoch."""
        runner.message_hub.update_info("epoch", runner.epoch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Record the iteration and the learning rates."""
        hub = runner.message_hub
        hub.update_info("iter", runner.iter)
        assert runner.optim_wrapper is not None
        self._steps = runner.optim_wrapper.step_count
        for name, (lr, *_) in runner.optim_wrapper.get_lr().items():
            hub.update_scalar(f"train/{name}", lr.clone() if isinstance(lr, Tensor) else lr)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Record the losses and, after an optimizer step, the gradient norm; all stay on the device.

        The norm of a skipped step, which is not finite, is left out when it is read.
        """
        hub, wrapper = runner.message_hub, runner.optim_wrapper
        assert wrapper is not None
        for name, value in (outputs or {}).items():
            hub.update_scalar(f"train/{name}", value)
        steps, norms, skipped = wrapper.step_count, wrapper.grad_norm, wrapper.step_was_skipped
        if isinstance(norms, Mapping):
            assert isinstance(skipped, Mapping)
            for name, norm in norms.items():
                if norm is not None and steps[name] != self._steps[name]:
                    hub.update_scalar(f"train/{name}.grad_norm", norm, unless=skipped[name])
        elif norms is not None and steps != self._steps:
            hub.update_scalar("train/grad_norm", norms, unless=skipped)

    def before_val(self, runner: Runner) -> None:
        """Record the stage."""
        hub = runner.message_hub
        self._stage_before = hub.get_info("loop_stage")
        hub.update_info("loop_stage", "val")

    def after_val(self, runner: Runner) -> None:
        """Record the stage before the validation again."""
        if self._stage_before is None:
            runner.message_hub.pop_info("loop_stage")
        else:
            runner.message_hub.update_info("loop_stage", self._stage_before)

    def before_test(self, runner: Runner) -> None:
        """Record the stage."""
        runner.message_hub.update_info("loop_stage", "test")

    def after_test(self, runner: Runner) -> None:
        """Forget the stage."""
        runner.message_hub.pop_info("loop_stage")

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Record the metrics."""
        _note_metrics(runner, "val", metrics)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Record the metrics."""
        _note_metrics(runner, "test", metrics)


def _note_metrics(runner: Runner, mode: str, metrics: Mapping[str, Any] | None) -> None:
    """Record the metrics that are numbers; hooks get the others as an argument."""
    for name, value in (metrics or {}).items():
        number = as_float(value)
        if number is not None:
            runner.message_hub.update_scalar(f"{mode}/{name}", number)
