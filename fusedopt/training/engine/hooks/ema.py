"""EMAHook: evaluates and saves an average of the weights of the model in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ....messages import did_you_mean, plain_settings
from ...averaging import BaseAveragedModel, ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage
from ...portable import as_before
from ...registry import HOOKS, MODELS, accepted_arguments
from ...sharding import sharded_as
from ...unwrapping import bare_state_dict, fitted_state_dict
from ..checkpoint import CheckpointError
from ..data import moved
from ..weights import check_fit
from .fused_average import PREFIX, FusedAverage
from .hook import Hook

if TYPE_CHECKING:
    from ..runner import Runner

__all__ = ["EMAHook"]


@HOOKS.register_module()
class EMAHook(Hook):
    """Keeps an average of the model's weights, as ``mmengine.hooks.EMAHook``.

    Every iteration from the first one set below updates the average; before that, the average equals the model. In a
    validation or test the model has the average's weights. A checkpoint has them as ``state_dict`` and the model's own
    in ``ema_state_dict``, so that a resumed run restores both.

    Args:
        ema_type: the averaged model: a registered name, an import path or a class.
        strict_load: whether a checkpoint that does not fit the average exactly is an error rather than a warning.
        begin_iter: number of the first iteration, counted from 1, that updates the average.
        begin_epoch: number of the first epoch, counted from 1, whose iterations do. Only one of the two may be set.
        start_iters: another name of ``begin_iter``.
        fused: use the average that a fused optimizer keeps in the pass of its steps (its ``ema``) instead of a model
            of its own. The hook gives the optimizer the setting. The average is in float32; it, ``interval`` and
            ``begin_iter`` go by steps: iterations that only accumulate gradients, and skipped steps, leave it alone.
            Buffers are the model's. ``ema_type`` is ExponentialMovingAverage or MomentumAnnealingEMA then, and
            ``device``, ``update_buffers`` and another ``dtype`` are refused.
        kwargs: arguments of the averaged model: ``momentum``, ``interval``, ``update_buffers``, ``device``, ``dtype``,
            and others that it has.

    Attributes:
        ema_model: the average; None before it is first needed, and with ``fused``.
        src_model: the averaged model; None before it is first needed, and with ``fused``.

    Raises:
        KeyError: an unknown ``ema_type``.
        TypeError, ValueError: an argument is unknown, has the wrong type or is out of range.
    """

    priority = "NORMAL"

    def __init__(
        self,
        ema_type: str | Callable[..., BaseAveragedModel] = "ExponentialMovingAverage",
        strict_load: bool = False,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        start_iters: int | None = None,
        fused: bool = False,
        **kwargs: Any,
    ):
        begins = {"begin_iter": begin_iter, "begin_epoch": begin_epoch, "start_iters": start_iters or 0}
        begins = plain_settings(begins)
        for name, number in begins.items():
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name} must be an int, got {number!r}")
            if number < 0:
                raise ValueError(f"Invalid {name}: {number}; expected an int of at least 0")
        given = [f"{name}={number}" for name, number in begins.items() if number]
        if len(given) > 1:
            raise ValueError(f"the average begins only once, but {' and '.join(given)} are given")
        if not isinstance(strict_load, bool):
            raise TypeError(f"strict_load must be True or False, got {strict_load!r}")
        self.strict_load = strict_load
        self.begin_iter = begins["begin_iter"] or begins["start_iters"]
        self.begin_epoch = begins["begin_epoch"]
        self.ema_cfg: dict[str, Any] = {"type": ema_type, **kwargs}
        if not isinstance(fused, bool):
            raise TypeError(f"fused must be True or False, got {fused!r}")
        self._check_config()
        self._fused = FusedAverage(self.ema_cfg, self.begin_iter, self.begin_epoch) if fused else None
        self.ema_model: BaseAveragedModel | None = None
        self.src_model: nn.Module | None = None
        self._applied: AbstractContextManager[Any] | None = None

    def _check_config(self) -> None:
        """Raise the errors of building the average that can be found without the model."""
        kind = MODELS.resolve(self.ema_cfg["type"])
        if isinstance(kind, type) and not issubclass(kind, BaseAveragedModel):
            raise TypeError(f"ema_type must be a BaseAveragedModel, got {kind.__name__}")
        accepted = accepted_arguments(kind)
        for key in self.ema_cfg:
            if accepted is not None and key not in {*accepted, "type"} - {"model"}:
                known = {*accepted, "ema_type", "strict_load", "begin_iter", "begin_epoch", "start_iters", "fused"}
                known -= {"model"}
                raise TypeError(f"EMAHook has no argument {key!r}; {did_you_mean(key, known)}")
        # Other classes may need more than an empty model.
        if kind in (ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # shown when the model is averaged
                MODELS.build(self.ema_cfg, model=nn.Module())

    def before_run(self, runner: Runner) -> None:
        """Create the average, unless an earlier run with this model has; or have the optimizer keep it."""
        if self._fused is not None:
            self._fused.settle(runner)
        else:
            self._models(runner)

    def before_train(self, runner: Runner) -> None:
        """Warn if the run ends before the average begins."""
        for name, begin, end in (
            ("begin_iter", self.begin_iter, runner.max_iters),
            ("begin_epoch", self.begin_epoch, runner.max_epochs),
        ):
            if begin > end:
                runner.logger.warning(
                    f"EMAHook: {name}={begin} is past the end of the training, which is {end}: nothing is averaged"
                )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Give the model its own weights back if an evaluation has failed."""
        self._restore()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Update the average."""
        if self._fused is not None:
            return  # the step has
        if runner.iter + 1 >= self.begin_iter and runner.epoch + 1 >= self.begin_epoch:
            average, model = self._models(runner)
            average.update_parameters(model)

    def before_val_epoch(self, runner: Runner) -> None:
        """Put the average's weights into the model."""
        self._apply(runner)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Give the model its own weights back."""
        self._restore()

    def before_test_epoch(self, runner: Runner) -> None:
        """Put the average's weights into the model."""
        self._apply(runner)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        """Give the model its own weights back."""
        self._restore()

    def close(self) -> None:
        """Give the model its own weights back, in case an evaluation has failed."""
        self._restore()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Save the average's weights as the model's, and the model's own beside them.

        Raises:
            RuntimeError: in an evaluation, while the model has the average's weights.
        """
        if self._applied is not None:
            raise RuntimeError(
                "EMAHook: the model has the average's weights while it is evaluated, so no checkpoint can be saved; "
                f"save in a hook that acts after this one, whose priority is {self.priority}"
            )
        if self._fused is not None:
            self._fused.save(runner, checkpoint)
            return
        average = self._refreshed(runner)
        own = checkpoint["state_dict"]
        # Copies and updates, because state dicts carry the modules' versions as an attribute.
        state = copy(average.state_dict())
        state.update(moved(dict(state), "cpu"))
        names = [name for name in own if PREFIX + name in state]
        checkpoint["state_dict"] = averaged = copy(own)
        averaged.update({name: state[PREFIX + name] for name in names})
        state.update({PREFIX + name: own[name] for name in names})
        checkpoint["ema_state_dict"] = state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """If a run is resumed, restore both sets of weights. Weights that are only loaded begin a new average.

        Raises:
            CheckpointError: ``ema_state_dict`` lacks weights of the model or, with ``strict_load``, the checkpoint does
                not fit the average exactly.
        """
        if self._fused is not None:
            self._load_fused(runner, self._fused, checkpoint)
            return
        average, model = self._models(runner)
        weights = checkpoint["state_dict"]
        if not runner.resumes or "ema_state_dict" not in checkpoint:
            if runner.resumes:
                runner.logger.warning("EMAHook: the checkpoint has no ema_state_dict; a new average begins")
            if self.strict_load:
                self._check_fit(runner, "state_dict", weights, model, True)
            average.steps.zero_()
            return
        state: Any = fitted_state_dict(checkpoint.pop("ema_state_dict"), average.state_dict())
        own = copy(weights)
        own.clear()
        own.update({name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)})
        self._check_fit(runner, "ema_state_dict", own, model, True)
        state = copy(state)
        state.update({PREFIX + name: value for name, value in weights.items()})
        self._check_fit(runner, "ema_state_dict", state, average, self.strict_load)
        known = average.state_dict()
        state.update({name: as_before(value, known.get(name)) for name, value in state.items()})
        average.load_state_dict(sharded_as(state, known), strict=False)
        checkpoint["state_dict"] = own

    def _load_fused(self, runner: Runner, fused: FusedAverage, checkpoint: dict[str, Any]) -> None:
        model, weights = runner.bare_model, checkpoint["state_dict"]
        if not runner.resumes or "ema_state_dict" not in checkpoint:
            if runner.resumes:
                runner.logger.warning("EMAHook: the checkpoint has no ema_state_dict; its weights are taken for both")
            else:
                fused.begin_again(runner)
            if self.strict_load:
                self._check_fit(runner, "state_dict", weights, model, True)
            return
        state: Any = checkpoint.pop("ema_state_dict")
        own = copy(weights)
        own.clear()
        own.update({name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)})
        own = fitted_state_dict(own, bare_state_dict(model))
        self._check_fit(runner, "ema_state_dict", own, model, True)
        fused.take(runner, fitted_state_dict(weights, bare_state_dict(model)), state.get("steps"))
        checkpoint["state_dict"] = own

    def _models(self, runner: Runner) -> tuple[BaseAveragedModel, nn.Module]:
        """The average, created if there is none of this model yet, and the model."""
        model = runner.bare_model
        if self.ema_model is None or self.src_model is not model:
            self.ema_model, self.src_model = MODELS.build(self.ema_cfg, model=model), model
        return self.ema_model, model

    def _check_fit(self, runner: Runner, name: str, state: Mapping[str, Any], model: nn.Module, strict: bool) -> None:
        differences = check_fit(state, bare_state_dict(model))
        if differences:
            message = f"EMAHook: the checkpoint's {name} does not fit the average: {'; '.join(differences)}"
            if strict:
                raise CheckpointError(message)
            runner.logger.warning(message)

    def _refreshed(self, runner: Runner) -> BaseAveragedModel:
        """The average with current values from the model: all of them before its first update, then only buffers."""
        average, model = self._models(runner)
        if average.steps == 0:
            average.copy_parameters(model)
        else:
            average.copy_buffers(model)
        return average

    def _apply(self, runner: Runner) -> None:
        self._restore()
        if self._fused is not None:
            self._applied = self._fused.applied_to(runner)
        else:
            self._applied = self._refreshed(runner).applied_to(runner.bare_model)
        self._applied.__enter__()

    def _restore(self) -> None:
        applied, self._applied = self._applied, None
        if applied is not None:
            applied.__exit__(None, None, None)
