"""The hooks of a Runner: default hooks, custom hooks, and calling them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...undo import unchanged_on_error
from ..registry import HOOKS, check_config, scope_by_default
from .hooks.hook import Hook, get_priority
from .loops import TrainLoop

__all__ = ["DEFAULT_HOOKS", "HasHooks"]

#: The default hooks by key, in order of registration.
DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "RuntimeInfoHook"},
    "timer": {"type": "IterTimerHook"},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
    "logger": {"type": "LoggerHook"},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "interval": 1},
}


class HasHooks:
    """The part of :class:`Runner` that holds hooks, in the order in which they act."""

    train_loop: TrainLoop | None
    default_scope: str
    _hooks: list[Hook]

    @property
    def hooks(self) -> list[Hook]:
        """The hooks in the order in which they act."""
        return self._hooks

    def register_hook(self, hook: Hook | Mapping[str, Any], priority: int | str | None = None) -> None:
        """Add a hook after those of the same priority.

        Args:
            hook: the hook, or its config, which may have a ``priority`` too.
            priority: a name such as ``'NORMAL'``, or a number from 0 to 100; by default the config's, else
                the hook's own.

        Raises:
            KeyError: an unknown ``type``.
            TypeError: it is not a hook.
            ValueError: an unknown priority.
        """
        if isinstance(hook, Mapping):
            settings = dict(hook)
            own = settings.pop("priority", None)
            priority = own if priority is None else priority
            with scope_by_default(self.default_scope):
                hook = HOOKS.build(settings)
        if not isinstance(hook, Hook):
            raise TypeError(f"hook must be a Hook or the config of one, got {hook!r}")
        number = get_priority(hook.priority if priority is None else priority)
        if priority is not None:
            hook.priority = priority
        behind = sum(get_priority(other.priority) <= number for other in self._hooks)
        self._hooks.insert(behind, hook)

    def register_default_hooks(self, hooks: Mapping[str, Hook | Mapping[str, Any] | None] | None = None) -> None:
        """Add the default hooks, with ``hooks`` merged over them by key; None removes one."""
        if hooks is not None:
            check_config("default_hooks", hooks)
        with unchanged_on_error(self._hooks):
            defaults = dict(DEFAULT_HOOKS)
            if self.train_loop is not None and not self.train_loop.by_epoch:  # its epoch stays 0
                defaults["logger"] = {**defaults["logger"], "log_metric_by_epoch": False}
            for hook in {**defaults, **(hooks or {})}.values():
                if hook is not None:
                    self.register_hook(hook)

    def register_custom_hooks(self, hooks: Sequence[Hook | Mapping[str, Any]]) -> None:
        """Add hooks: all of them, or none if one is rejected.

        Raises:
            TypeError: ``hooks`` is not a list.
        """
        if isinstance(hooks, (str, Mapping)) or not isinstance(hooks, Sequence):
            raise TypeError(f"custom_hooks must be a list of hooks and their configs, got {hooks!r}")
        with unchanged_on_error(self._hooks):
            for hook in hooks:
                self.register_hook(hook)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the method ``fn_name`` of every hook that has it, with the runner and ``kwargs``."""
        for hook in self._hooks:
            method = getattr(hook, fn_name, None)
            if method is not None:
                method(self, **kwargs)
