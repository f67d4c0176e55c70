"""Checks the names in a config before anything is built, so that errors name the key."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...messages import did_you_mean
from ..builder import is_wrapper_cfg
from ..config import naming
from ..registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    METRICS,
    MMENGINE_SCOPE,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    VISUALIZERS,
    Registry,
    accepted_arguments,
    scope_by_default,
)

__all__ = ["check_names"]

#: The sections of a config that have a ``type`` (a star stands for any key or index): the registry, and the keys that a
#: section may have besides the arguments of its ``type``; None for any.
_SECTIONS: dict[str, tuple[Registry, set[str] | None]] = {
    "model": (MODELS, set()),
    "optim_wrapper": (OPTIM_WRAPPERS, None),
    "optim_wrapper.constructor": (OPTIM_WRAPPER_CONSTRUCTORS, None),
    "optim_wrapper.optimizer": (OPTIMIZERS, set()),
    "optim_wrapper.*": (OPTIM_WRAPPERS, None),
    "optim_wrapper.*.optimizer": (OPTIMIZERS, set()),
    "param_scheduler": (PARAM_SCHEDULERS, {"convert_to_iter_based", "epoch_length"}),
    "param_scheduler.*": (PARAM_SCHEDULERS, {"convert_to_iter_based", "epoch_length"}),
    "param_scheduler.*.*": (PARAM_SCHEDULERS, {"convert_to_iter_based", "epoch_length"}),
    **{
        f"{mode}_dataloader.{part}": (registry, extra)
        for mode in ("train", "val", "test")
        for part, registry, extra in (
            ("dataset", DATASETS, set()),
            ("sampler", DATA_SAMPLERS, set()),
            ("batch_sampler", DATA_SAMPLERS, None),
            ("collate_fn", FUNCTIONS, None),
        )
    },
    **{f"{mode}_cfg": (LOOPS, None) for mode in ("train", "val", "test")},
    **{f"{mode}_evaluator{rest}": (METRICS, set()) for mode in ("val", "test") for rest in ("", ".*", ".metrics.*")},
    "default_hooks.*": (HOOKS, {"priority"}),
    "custom_hooks.*": (HOOKS, {"priority"}),
    "visualizer": (VISUALIZERS, None),
}


def check_names(config: Mapping[str, Any], *keys: str) -> None:
    """Check the ``type`` of each section of a config, and that it accepts the section's other keys.

    As in a Runner, names are looked up in the config's ``default_scope``.

    Args:
        config: a config for :meth:`fusedopt.training.engine.Runner.from_cfg`.
        keys: top-level keys to check; all by default.

    Raises:
        ConfigError: an unknown ``type`` or argument; the message names the file and the key.
    """
    with contextlib.ExitStack() as stack:
        with naming(config, "default_scope"):
            stack.enter_context(scope_by_default(config.get("default_scope") or MMENGINE_SCOPE))
        _check_names(config, keys)


def _check_names(config: Mapping[str, Any], keys: Sequence[str]) -> None:
    for pattern, (registry, extra) in _SECTIONS.items():
        path = pattern.split(".")
        for key, section in _sections(config, path) if not keys or path[0] in keys else ():
            if pattern == "optim_wrapper.*" and not is_wrapper_cfg(section):
                continue  # not an optimizer's entry: the optimizer itself, or a setting with a type, such as clip_grad
            if registry is OPTIM_WRAPPER_CONSTRUCTORS and isinstance(section, str):
                with naming(config, key):
                    registry.resolve(section)
            elif isinstance(section, Mapping) and "type" in section:
                is_evaluator = registry is METRICS and "metrics" in section
                _check_section(config, key, section, EVALUATOR if is_evaluator else registry, extra)


def _sections(value: Any, keys: list[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values that ``keys`` lead to, with their paths."""
    if not keys:
        yield path, value
        return
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)) and keys[0] == "*":
        items = enumerate(value)  # type: ignore[assignment]
    else:
        return
    for key, item in items:
        if keys[0] in (key, "*"):
            yield from _sections(item, keys[1:], f"{path}.{key}" if path else str(key))


def _check_section(
    config: Mapping[str, Any], path: str, section: Mapping[str, Any], registry: Registry, extra: set[str] | None
) -> None:
    with naming(config, f"{path}.type"), registry.switch_scope_and_registry(section.get("_scope_")) as scoped:
        target = scoped.resolve(section["type"])
    accepted = accepted_arguments(target)
    if extra is None or accepted is None:
        return
    for key in section:
        if key not in accepted | extra | {"type", "_scope_"}:
            name = getattr(target, "__name__", target)
            with naming(config, f"{path}.{key}"):
                raise ValueError(f"{name} takes no such argument; {did_you_mean(key, accepted)}")
