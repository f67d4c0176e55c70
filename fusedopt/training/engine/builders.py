"""The methods of a Runner that build its parts; a subclass may override them, as with MMEngine's Runner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import schedulers
from ..config import Config, naming
from ..registry import check_config, scope_by_default
from ..unwrapping import stateful
from ..wrappers import OptimWrapper
from . import data, parts
from .checkpointing import HasCheckpoints
from .loops import TrainLoop
from .message_hub import MessageHub

__all__ = ["HasBuilders"]


class HasBuilders(HasCheckpoints):
    """The part of :class:`Runner` that builds its parts."""

    cfg: Mapping[str, Any]
    message_hub: MessageHub
    device: torch.device
    launcher: str
    seed: int
    model: Any
    optim_wrapper: OptimWrapper | None
    #: The arguments of the Runner from which parts are built, by name.
    _given: dict[str, Any]
    _start_method: str | None

    @property
    def bare_model(self) -> nn.Module:
        """The model without wrappers such as torch.compile's or DistributedDataParallel; see :func:`stateful`."""
        return stateful(self.model)

    @contextlib.contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Sets the scope and the message hub for building a part; errors name the config's file and ``key``."""
        named = naming(self.cfg, key) if isinstance(self.cfg, Config) else contextlib.nullcontext()
        with named, scope_by_default(self.default_scope), self.message_hub.as_current():
            yield

    def build_model(self, model: nn.Module | Mapping[str, Any]) -> nn.Module:
        """Build the model, or return the given one."""
        with self._naming("model"):
            return parts.build_model(model, self._given["data_preprocessor"])

    def wrap_model(self, model_wrapper_cfg: Mapping[str, Any] | None, model: nn.Module) -> nn.Module:
        """Move the model to its device and, if there are several processes, wrap it."""
        with self._naming("model_wrapper_cfg"):
            return parts.wrap_model(
                model,
                model_wrapper_cfg,
                self.device,
                self.launcher != "none",
                self._given["find_unused_parameters"],
                self._given["sync_bn"],
            )

    def build_dataloader(self, dataloader: Any, shuffle: bool = False) -> DataLoader:
        """Build a data loader from its config, see :func:`build_dataloader`.

        Args:
            dataloader: the config.
            shuffle: whether it shuffles, unless the config says so.
        """
        if isinstance(dataloader, Mapping):
            for part in ("dataset", "sampler", "batch_sampler"):
                if isinstance(dataloader.get(part), bool | float | int | str):
                    check_config(part, dataloader[part])
        with scope_by_default(self.default_scope):
            return data.build_dataloader(dataloader, self.seed, shuffle, self._start_method)

    def build_evaluator(self, evaluator: Any, name: str = "evaluator") -> Any:
        """Build an evaluator from metrics or a config with ``metrics``, or return the given one.

        Args:
            evaluator: the metrics or the config.
            name: its name in errors.
        """
        with self._naming(name):
            return parts.build_evaluator(name, evaluator)

    def build_train_loop(self, loop: Any) -> TrainLoop:
        """Build the loop that ``train_cfg`` describes with its data, or return the given one, now of this runner."""
        with self._naming("train_dataloader"):
            loader = self.build_dataloader(self._given["train_dataloader"], shuffle=True)
        with self._naming("train_cfg"):
            return parts.build_train_loop(self._runner, loop, loader)

    def build_val_loop(self, loop: Any) -> Any:
        """Build the loop that ``val_cfg`` describes, with its data and metrics, or return the given one.

        A loop that ``type`` names may have a list of data loaders. Each of its evaluators is then built, too.
        """
        return self._build_evaluation_loop("val", loop)

    def build_test_loop(self, loop: Any) -> Any:
        """Build the loop that ``test_cfg`` describes, with its data and metrics, or return the given one."""
        return self._build_evaluation_loop("test", loop)

    def _build_evaluation_loop(self, mode: str, loop: Any) -> Any:
        given = self._given[f"{mode}_dataloader"]
        several = isinstance(given, list | tuple) and isinstance(loop, Mapping) and "type" in loop
        loader: Any
        with self._naming(f"{mode}_dataloader"):
            loader = [self.build_dataloader(each) for each in given] if several else self.build_dataloader(given)
        metrics, name = self._given[f"{mode}_evaluator"], f"{mode}_evaluator"
        if several and isinstance(metrics, list | tuple):
            evaluator: Any = [self.build_evaluator(each, name) for each in metrics]
        else:
            evaluator = self.build_evaluator(metrics, name)
        with self._naming(f"{mode}_cfg"):
            return parts.build_evaluation_loop(self._runner, loop, mode, loader, evaluator)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer and its wrapper, or return the given one."""
        with self._naming("optim_wrapper"):
            return parts.build_runner_wrapper(self.bare_model, optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Build the schedulers of the optimizer; None for none."""
        if scheduler is None:
            return None
        loop = self.train_loop
        assert loop is not None
        assert self.optim_wrapper is not None
        with self._naming("param_scheduler"):
            return schedulers.build_param_schedulers(
                scheduler,
                self.optim_wrapper,
                epoch_length=len(loop.dataloader),
                max_epochs=loop.max_epochs,
                max_iters=loop.max_iters,
            )
