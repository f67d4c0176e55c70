"""OptimWrapperDict."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any, NoReturn

from torch import nn

from ...messages import did_you_mean
from .base import check_state_dict
from .summary import parameter_table
from .wrapper import OptimWrapper

__all__ = ["OptimWrapperDict"]


class OptimWrapperDict(OptimWrapper):
    """Several wrappers by name, as for the networks of a GAN; as ``mmengine.optim.OptimWrapperDict``.

    Each wrapper is driven separately: ``update_params``, ``backward``, ``step``, ``optim_context`` and the counters of
    iterations must be called on the wrappers, and raise NotImplementedError here. The reports (such as ``grad_norm``),
    ``clip_grad`` and ``step_count`` are dicts by name.

    Args:
        optim_wrappers: the wrappers, by keyword.

    Raises:
        TypeError: one is not a single :class:`OptimWrapper`.
    """

    def __init__(self, **optim_wrappers: OptimWrapper):
        for name, wrapper in optim_wrappers.items():
            if not isinstance(wrapper, OptimWrapper):
                raise TypeError(f"OptimWrapperDict holds OptimWrappers, got {name}={type(wrapper).__name__}")
            if isinstance(wrapper, OptimWrapperDict):
                raise TypeError(
                    f"OptimWrapperDict holds single wrappers, got {name}=OptimWrapperDict of "
                    f"{', '.join(map(repr, wrapper)) or 'none'}; give its wrappers names of their own"
                )
        self.optim_wrappers = optim_wrappers

    def _refusal(self, name: str, verb: str) -> str:
        return (
            f"OptimWrapperDict has no {name} of its own: {verb} one of its wrappers, "
            f"as in optim_wrapper[{next(iter(self.optim_wrappers), 'name')!r}].{name}"
        )

    def _refuse(self, method: str) -> NoReturn:
        raise NotImplementedError(self._refusal(method, "call it on"))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") or name == "optim_wrappers":  # asked for by protocols and by unpickling
            raise AttributeError(name)
        raise AttributeError(self._refusal(name, "read it from"), name=name, obj=self)

    def update_params(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("update_params")

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("backward")

    def step(self, **kwargs: Any) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("step")

    def optim_context(self, model: nn.Module) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("optim_context")

    def should_update(self) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("should_update")

    def should_sync(self) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("should_sync")

    def scale_loss(self, *args: Any) -> NoReturn:
        """Not here: each wrapper has its own."""
        self._refuse("scale_loss")

    @property
    def inner_count(self) -> int:
        """Not here: each wrapper has its own."""
        self._refuse("inner_count")

    def zero_grad(self, **kwargs: Any) -> None:
        """Call ``zero_grad`` of all wrappers."""
        for wrapper in self.values():
            wrapper.zero_grad(**kwargs)

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """Does nothing: the code that drives a wrapper knows its number of iterations."""

    @property
    def param_groups(self) -> dict[str, list[dict[str, Any]]]:  # type: ignore[override]
        """The parameter groups of each wrapper, by name."""
        return {name: wrapper.param_groups for name, wrapper in self.items()}

    @property
    def defaults(self) -> dict[str, dict[str, Any]]:
        """The default settings of each optimizer, by name."""
        return {name: wrapper.defaults for name, wrapper in self.items()}

    def get_lr(self) -> dict[str, list[Any]]:
        """``name.lr`` of each wrapper and, with several groups, ``name.base_lr``."""
        return {f"{name}.{key}": value for name, wrapper in self.items() for key, value in wrapper.get_lr().items()}

    def get_momentum(self) -> dict[str, list[Any]]:
        """``name.momentum`` of each wrapper."""
        return {
            f"{name}.{key}": value for name, wrapper in self.items() for key, value in wrapper.get_momentum().items()
        }

    @property
    def clip_grad(self) -> dict[str, Any]:
        """``clip_grad`` of each wrapper, by name."""
        return {name: wrapper.clip_grad for name, wrapper in self.items()}

    @property
    def step_count(self) -> dict[str, int]:  # type: ignore[override]
        """``step_count`` of each wrapper, by name."""
        return {name: wrapper.step_count for name, wrapper in self.items()}

    @property
    def grad_norm(self) -> dict[str, Any]:  # type: ignore[override]
        """``grad_norm`` of each wrapper, by name."""
        return {name: wrapper.grad_norm for name, wrapper in self.items()}

    @property
    def clip_coef(self) -> dict[str, Any]:  # type: ignore[override]
        """``clip_coef`` of each wrapper, by name."""
        return {name: wrapper.clip_coef for name, wrapper in self.items()}

    @property
    def loss_scale(self) -> dict[str, Any]:  # type: ignore[override]
        """``loss_scale`` of each wrapper, by name."""
        return {name: wrapper.loss_scale for name, wrapper in self.items()}

    @property
    def step_was_skipped(self) -> dict[str, Any]:  # type: ignore[override]
        """``step_was_skipped`` of each wrapper, by name."""
        return {name: wrapper.step_was_skipped for name, wrapper in self.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of each wrapper, by name."""
        return {name: wrapper.state_dict() for name, wrapper in self.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state dict of each wrapper that is in ``state_dict``. It is not changed.

        A wrapper that is not in it stays as it is, with a warning. On an error nothing has been loaded, except into
        ZeroRedundancyOptimizers before the failing entry.

        Raises:
            TypeError: it is not a dict of dicts.
            ValueError: it is the state dict of a single wrapper or optimizer, or one of its entries does not fit.
            KeyError: it has an unknown name, or one of its entries lacks something.
        """
        check_state_dict(state_dict)
        if "param_groups" in state_dict:
            raise ValueError(
                "state_dict is from a single wrapper or optimizer; an OptimWrapperDict loads a dict with one for "
                f"each of {', '.join(map(repr, self))}"
            )
        for name, state in state_dict.items():
            if name not in self:
                raise KeyError(f"state_dict has {name!r}, which is not a wrapper here; {did_you_mean(name, self)}")
            check_state_dict(state, f"state_dict[{name!r}]")
        missing = [name for name in self if name not in state_dict]
        if missing:
            warnings.warn(
                f"state_dict has nothing for {', '.join(map(repr, missing))}, which stays as it is", stacklevel=2
            )
        with contextlib.ExitStack() as stack:
            for name, state in state_dict.items():
                stack.enter_context(self[name]._unchanged_on_error())
                self[name].load_state_dict(state)

    def describe(self, model: nn.Module | None = None) -> str:
        """:meth:`OptimWrapper.describe` of all wrappers in one table, with wrapper names before group numbers."""
        return parameter_table({name: wrapper.optimizer for name, wrapper in self.items()}, model)

    def keys(self) -> KeysView[str]:
        """The wrappers' names."""
        return self.optim_wrappers.keys()

    def values(self) -> ValuesView[OptimWrapper]:
        """The wrappers."""
        return self.optim_wrappers.values()

    def items(self) -> ItemsView[str, OptimWrapper]:
        """Names and wrappers."""
        return self.optim_wrappers.items()

    def __getitem__(self, name: str) -> OptimWrapper:
        if name not in self.optim_wrappers:
            raise KeyError(f"no optimizer wrapper {name!r}; {did_you_mean(name, self)}")
        return self.optim_wrappers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.optim_wrappers

    def __iter__(self) -> Iterator[str]:
        return iter(self.optim_wrappers)

    def __len__(self) -> int:
        return len(self.optim_wrappers)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {wrapper!r}" for name, wrapper in self.items())
