"""Builds an object from a config: calls its ``type`` with its other items."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...messages import did_you_mean
from ...undo import parameter_groups, unchanged_on_error
from .paths import dotted_name

if TYPE_CHECKING:
    from .registry import Registry

__all__ = ["accepted_arguments", "build_from_cfg", "build_optimizer", "build_scheduler", "check_config"]

#: How Python 3.14 ends its error about an unknown argument; ours knows the arguments of base classes too.
_PYTHONS_HINT = re.compile(r"\. Did you mean '[^']*'\?$")


def check_config(name: str, cfg: Any) -> None:
    """Raise TypeError unless ``cfg`` is a dict; the message points out a trailing comma that made it a tuple."""
    if isinstance(cfg, Mapping):
        return
    if isinstance(cfg, tuple) and len(cfg) == 1 and isinstance(cfg[0], Mapping):
        raise TypeError(
            f"{name} is a tuple that holds one dict: a trailing comma, as in `{name} = dict(...),`, makes it one; "
            "remove the comma"
        )
    raise TypeError(f"{name} must be a dict, got {type(cfg).__name__}: {cfg!r}")


def accepted_arguments(target: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments that ``target`` takes, or None if it takes any.

    A constructor's ``**kwargs`` are assumed to be passed on to the base class's constructor.
    """
    if isinstance(target, type) and "__signature__" not in vars(target):
        functions = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    else:
        functions = [target]
    names: set[str] = set()
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # written in C, without a signature
            return None
        names.update(each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY))
        if all(each.kind is not each.VAR_KEYWORD for each in parameters):
            return names - {"self"} if isinstance(target, type) else names
    return None


def build_from_cfg(
    cfg: Mapping[str, Any],
    *args: Any,
    registry: Registry,
    default_args: Mapping[str, Any] | None = None,
    factory: str | None = None,
    **kwargs: Any,
) -> Any:
    """Build what ``cfg`` describes with its ``type``, or with the method of it that ``factory`` names."""
    check_config(f"{registry.name} config", cfg)
    if default_args is not None:
        check_config("default_args", default_args)
    settings = {**kwargs, **(default_args or {}), **cfg}
    if "type" not in settings:
        raise KeyError(f"{registry.name} config needs the key 'type', got {dict(cfg)!r}")
    with registry.switch_scope_and_registry(settings.pop("_scope_", None)) as scoped:
        target = scoped.resolve(settings.pop("type"))
        try:
            return getattr(target, factory)(*args, **settings) if factory else target(*args, **settings)
        except TypeError as error:
            accepted = accepted_arguments(target)
            unknown = [key for key in settings if accepted is not None and key not in accepted]
            hint = f"; {did_you_mean(unknown[0], accepted)}" if unknown and accepted else ""
            if any(clause in str(error) for clause in ("did you mean", "expected one of")):  # it has its own hint
                hint = ""
            message = _PYTHONS_HINT.sub("", str(error)) if hint else str(error)
            raise TypeError(f"{dotted_name(target)}: {message}{hint}") from error


def build_optimizer(cfg: Mapping[str, Any], *args: Any, registry: Registry, **kwargs: Any) -> Any:
    """Build an optimizer from its parameters, ``args[0]``, and its config."""
    if args and isinstance(cfg, Mapping) and "type" in cfg:
        with registry.switch_scope_and_registry(cfg.get("_scope_")) as scoped:
            _check_takes_params(scoped.resolve(cfg["type"]), cfg)
    with unchanged_on_error(*parameter_groups(args[0] if args else None)):
        return build_from_cfg(cfg, *args, registry=registry, **kwargs)


def _check_takes_params(target: Callable[..., Any], cfg: Mapping[str, Any]) -> None:
    """Raise TypeError unless the first argument, whatever its name, can take the parameters."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # written in C, without a signature
        return
    first = next(iter(signature.parameters.values()), None)
    if (
        first is None
        or first.kind is first.KEYWORD_ONLY
        or first.name in cfg
        or (first.default is not first.empty and "param" not in first.name)
        or "params" in list(signature.parameters)[1:]
    ):
        raise TypeError(
            f"{dotted_name(target)} has no place for the parameters: its signature is {signature}, and an optimizer "
            "is called with them as its first argument, as in __init__(self, params, ...)"
        )


def build_scheduler(
    cfg: Mapping[str, Any],
    *args: Any,
    registry: Registry,
    default_args: Mapping[str, Any] | None = None,
    epoch_length: int | None = None,
    **kwargs: Any,
) -> Any:
    """Build a scheduler; with ``convert_to_iter_based`` in ``cfg``, convert its epochs to iterations."""
    check_config(f"{registry.name} config", cfg)
    settings = {**(default_args or {}), **cfg}
    epoch_length = settings.pop("epoch_length", epoch_length)
    if not settings.pop("convert_to_iter_based", False):
        return build_from_cfg(settings, *args, registry=registry, **kwargs)
    if epoch_length is None:
        raise ValueError("convert_to_iter_based=True needs epoch_length, the number of iterations in an epoch")
    settings["epoch_length"] = epoch_length
    return build_from_cfg(settings, *args, registry=registry, factory="build_iter_from_epoch", **kwargs)
