"""BaseOptimWrapper: the interface of optimizer wrappers, and the parts that need only the optimizer."""

from __future__ import annotations

import abc
import contextlib
import weakref
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ...messages import plain_groups
from ...undo import unchanged_on_error

__all__ = ["DRIVEN", "BaseOptimWrapper", "check_state_dict", "taking"]

# Keys that wrappers add to their optimizer's state dict; each wrapper loads those it knows and ignores the others.
_WRAPPER_KEYS = ("base_param_settings", "loss_scaler")

#: Optimizers driven by one of our wrappers.
DRIVEN: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def taking(optimizer: Any) -> contextlib.AbstractContextManager[None]:
    """A context for building a wrapper of ``optimizer``: an error inside leaves the optimizer as it was.

    See Note [What fails changes nothing].
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        return contextlib.nullcontext()
    both = (optimizer, getattr(optimizer, "optim", None))
    fresh = [each for each in both if isinstance(each, torch.optim.Optimizer) and each not in DRIVEN]
    return unchanged_on_error(optimizer, finally_undo=lambda: DRIVEN.difference_update(fresh))


def check_state_dict(state_dict: Any, name: str = "state_dict") -> None:
    """Raise a TypeError, which names ``name``, unless ``state_dict`` is a dict."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"{name} must be a dict, as state_dict() of a wrapper or optimizer returns, got {type(state_dict).__name__}"
        )


class BaseOptimWrapper(abc.ABC):
    """Base of the optimizer wrappers, as ``mmengine.optim.BaseOptimWrapper``.

    Args:
        optimizer: the optimizer to drive.

    Attributes:
        base_param_settings: with more than one parameter group, a group with a dummy parameter and the optimizer's
            defaults. It is the last of :attr:`param_groups`, so that schedulers also change the base learning rate; the
            optimizer does not have it. None with one group.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        DRIVEN.add(optimizer)
        local = getattr(optimizer, "optim", None)  # a ZeroRedundancyOptimizer's, for its share
        if isinstance(local, torch.optim.Optimizer):
            DRIVEN.add(local)
        self.base_param_settings: dict[str, Any] | None = None
        if len(optimizer.param_groups) > 1:
            self.base_param_settings = {"params": torch.tensor([0.0]), **optimizer.defaults}
            plain_groups([self.base_param_settings])

    @abc.abstractmethod
    def update_params(self, loss: Tensor) -> None:
        """Backward, and a step if one is due."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Compute the gradients of ``loss``."""

    @abc.abstractmethod
    def zero_grad(self, **kwargs: Any) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""

    @abc.abstractmethod
    def step(self, **kwargs: Any) -> None:
        """Step the optimizer."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context in which the model's forward pass runs."""
        yield

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, and ``base_param_settings`` if there is one."""
        if self.base_param_settings is None:
            return self.optimizer.param_groups
        return [*self.optimizer.param_groups, self.base_param_settings]

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's default settings."""
        return self.optimizer.defaults

    def get_lr(self) -> dict[str, list[Any]]:
        """``{'lr': [one per group]}``, with ``'base_lr': [one]`` if there is more than one group."""
        lrs: dict[str, list[Any]] = {}
        if self.base_param_settings is not None:
            lrs["base_lr"] = [self.base_param_settings["lr"]]
        lrs["lr"] = [group["lr"] for group in self.optimizer.param_groups]
        return lrs

    def get_momentum(self) -> dict[str, list[Any]]:
        """``{'momentum': [one per group]}``: the group's ``momentum``, else ``betas[0]``, else 0."""
        momenta = []
        for group in self.optimizer.param_groups:
            if "momentum" in group:
                momenta.append(group["momentum"])
            else:
                momenta.append(group["betas"][0] if "betas" in group else 0)
        return {"momentum": momenta}

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict, with ``base_param_settings`` if there is one."""
        # For stock optimizers; a fused one does this itself: see Note [Plain numbers].
        plain_groups(self.optimizer.param_groups)
        state_dict = dict(self.optimizer.state_dict())
        if self.base_param_settings is not None:
            plain_groups([self.base_param_settings])
            state_dict["base_param_settings"] = dict(self.base_param_settings)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state dict of any wrapper of one optimizer, or of the optimizer itself.

        The dict is not changed. If the optimizer rejects its part, nothing has been loaded.

        Raises:
            TypeError: it is not a dict.
            ValueError: it is the state dict of an :class:`OptimWrapperDict`, or does not fit.
        """
        check_state_dict(state_dict)
        if "param_groups" not in state_dict and any(
            isinstance(value, Mapping) and "param_groups" in value for value in state_dict.values()
        ):
            raise ValueError(
                f"state_dict is from an OptimWrapperDict of {', '.join(map(repr, state_dict))}; "
                f"a single {type(self).__name__} loads one of these"
            )
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key not in _WRAPPER_KEYS})
        settings = state_dict.get("base_param_settings")
        if settings is not None:
            self.base_param_settings = deepcopy(settings)

    def _loaded_objects(self) -> list[Any]:
        """The objects whose attributes loading a state dict sets."""
        return [self, self.optimizer]

    @contextlib.contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """On an error, restore the objects into which a state dict was being loaded.

        This works because optimizers replace their state on loading; torch's ZeroRedundancyOptimizer does not, and is
        not restored.
        """
        # A scaler writes its tensors in place.
        before = [
            (each, {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(each).items()})
            for each in self._loaded_objects()
        ]
        try:
            yield
        except BaseException:
            for each, attributes in before:
                vars(each).update(attributes)
            raise
