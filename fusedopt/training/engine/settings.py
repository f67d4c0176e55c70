"""Settings that a resumed run takes from its checkpoint, and edits of them in the config since then."""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..builder import is_wrapper_cfg
from ..portable import portable
from ..registry import OPTIMIZERS, PARAM_SCHEDULERS, Registry
from ..wrappers import OptimWrapper, OptimWrapperDict

__all__ = ["config_of_text", "differing", "optimizer_settings", "scheduler_settings", "settings_of_text"]

# Note [Settings of a resumed run]
# A checkpoint holds the settings of parameter groups, schedulers and the loss scaler in their states. These override
# the config, as in MMEngine: edits of the config before resuming have no effect on them. To detect such edits, a
# checkpoint records the settings of the config by key, including defaults. For a wrapper or scheduler that was passed
# as an object, it records the settings of the object.

#: Arguments of optimizers that no state holds, so that the config's values are in effect.
_EFFECTIVE = {
    *("type", "_scope_", "params", "clip_grad", "write_back_grads", "backend", "optimizer_type", "process_group"),
    *(
        "state_dtype",
        "master",
        "stochastic_rounding",
        "ema",
        "parameters_as_bucket_view",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    ),
}
#: Stands for a setting that one side does not have.
NOT_SET = "not set"
#: Characters of the longest config text that is looked into.
_LONGEST_TEXT = 200_000


def optimizer_settings(optim_wrapper: Any) -> dict[str, Any]:
    """The settings of groups and loss scale in a config, or in a wrapper before any schedule, by key.

    Args:
        optim_wrapper: the argument of the Runner.
    """
    if isinstance(optim_wrapper, OptimWrapper):
        several = isinstance(optim_wrapper, OptimWrapperDict)
        wrappers = dict(optim_wrapper.items()) if several else {"": optim_wrapper}  # type: ignore[attr-defined]
        found: dict[str, Any] = {}
        for name, each in wrappers.items():
            groups = [{key: group[key] for key in group if key != "params"} for group in each.optimizer.param_groups]
            found.update(_flat({"param_groups": groups}, ".".join(filter(None, ("optim_wrapper", name)))))
        return found
    entries = {"optim_wrapper": optim_wrapper}
    if "optimizer" not in optim_wrapper:
        entries = {
            f"optim_wrapper.{name}": {"loss_scale": optim_wrapper.get("loss_scale"), **each}
            for name, each in optim_wrapper.items()
            if is_wrapper_cfg(each)
        }
    found = {}
    for name, entry in entries.items():
        optimizer = {**_defaults(OPTIMIZERS, entry["optimizer"]), **entry["optimizer"]}
        noted = {
            "optimizer": {key: value for key, value in optimizer.items() if key not in _EFFECTIVE},
            "paramwise_cfg": entry.get("paramwise_cfg") or {},
            # A fixed scale is set again after each step, so the config's is in effect.
            "loss_scale": entry["loss_scale"] if isinstance(entry.get("loss_scale"), Mapping) else {},
        }
        found.update(_flat(noted, name))
    return found


def scheduler_settings(param_scheduler: Any, max_epochs: int, max_iters: int) -> dict[str, Any]:
    """The settings in the configs of schedulers, or in newly built schedulers, by key.

    Args:
        param_scheduler: the argument of the Runner.
        max_epochs: default ``end`` of schedulers by epoch.
        max_iters: default ``end`` of schedulers by iteration.
    """
    if param_scheduler is None:
        return {}
    if isinstance(param_scheduler, Mapping) and "type" not in param_scheduler:
        found: dict[str, Any] = {}
        for name, part in param_scheduler.items():
            listed = scheduler_settings(part, max_epochs, max_iters)
            found.update({key.replace("param_scheduler", f"param_scheduler.{name}", 1): listed[key] for key in listed})
        return found
    entries: list[Any] = list(param_scheduler) if isinstance(param_scheduler, (list, tuple)) else [param_scheduler]
    found = {}
    for index, entry in enumerate(entries):
        name = f"param_scheduler.{index}"
        if isinstance(entry, Mapping):
            end = max_epochs if entry.get("by_epoch", True) else max_iters
            told = {**_defaults(PARAM_SCHEDULERS, entry), "end": end, **entry}
            kind = entry["type"]
            name_of_kind = kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)
            told["type"] = name_of_kind.rpartition(".")[2]
        else:
            told = {"type": type(entry).__name__, **entry.state_dict()}
        found.update(_flat(told, name))
    return found


def _defaults(registry: Registry, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The default arguments of a config's ``type``, by name."""
    if "type" not in cfg:
        return {}
    with registry.switch_scope_and_registry(cfg.get("_scope_")) as scoped:
        target = scoped.resolve(cfg["type"])
    if not isinstance(target, type) or "__signature__" in vars(target):
        functions: list[Any] = [target]
    else:
        functions = [vars(each)["__init__"] for each in reversed(target.__mro__[:-1]) if "__init__" in vars(each)]
    found = {}
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # written in C
            continue
        found.update({name: each.default for name, each in parameters.items() if each.default is not each.empty})
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    """The plain values in ``value``, by their keys."""
    if isinstance(value, Tensor):
        value = value.tolist()
    value = portable(value)
    if isinstance(value, Mapping):
        return {key: item for own in value for key, item in _flat(value[own], f"{name}.{own}").items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return {key: item for own, each in enumerate(value) for key, item in _flat(each, f"{name}.{own}").items()}
    return {name: _comparable(value)}


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple, set)):
        return [_comparable(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)  # its repr would contain an address
    return f"{named.__module__}.{named.__qualname__}"


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, by key: (old, new).

    A scheduler that only one side has is one entry, with its type.

    Args:
        before: settings from :func:`optimizer_settings` and :func:`scheduler_settings` in a checkpoint.
        now: the present ones.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key, NOT_SET), now.get(key, NOT_SET)
        if old == new:
            continue
        entry = _entry_of(key, before, now)
        if entry is None:
            found[key] = old, new
        else:
            found[entry] = before.get(f"{entry}.type", "none"), now.get(f"{entry}.type", "none")
    return {key: pair for key, pair in found.items() if not key.endswith("._scope_")}


def _entry_of(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The scheduler of a key, if only one side has it or the two differ in type."""
    parts = key.split(".")
    if parts[0] != "param_scheduler":
        return None
    entry = ".".join(parts[: 2 if parts[1].isdecimal() else 3])
    return entry if before.get(f"{entry}.type") != now.get(f"{entry}.type") else None


def settings_of_text(text: Any, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a checkpoint that did not record them, from the text of its config; None if unknown.

    Args:
        text: as :attr:`Config.pretty_text`. No code in it is run, and nothing that it names is imported.
        meta: the checkpoint's ``meta``.
    """
    config = config_of_text(text)
    try:
        if any(map(_names_a_path, config.values())):
            return None
        train_cfg = config["train_cfg"]
        by_epoch = meta["by_epoch"]
        max_epochs = train_cfg["max_epochs"] if by_epoch else 1
        max_iters = max_epochs * meta["epoch_length"] if by_epoch else train_cfg["max_iters"]
        schedulers = scheduler_settings(config.get("param_scheduler"), max_epochs, max_iters)
        return {**optimizer_settings(config["optim_wrapper"]), **schedulers}
    except Exception:  # a text in another form or with unknown names
        return None


def config_of_text(text: Any) -> dict[str, Any]:
    """The items of a config whose values are literals, from its text.

    Args:
        text: as :attr:`Config.pretty_text`, or MMEngine's. No code in it is run. Anything but such a text has no items.
    """
    try:
        body = ast.parse(text).body if isinstance(text, str) and len(text) <= _LONGEST_TEXT else []
    except Exception:  # also a RecursionError or a MemoryError, if it is nested deeply
        return {}
    config = {}
    for node in body:
        with contextlib.suppress(Exception):
            config[node.targets[0].id] = _literal(node.value)  # type: ignore[attr-defined]
    return config


def _names_a_path(value: Any) -> bool:
    """Whether a ``type`` in ``value`` is an import path: looking it up would import what a file names."""
    if isinstance(value, Mapping):
        kind = value.get("type", "")
        return "_scope_" in value or not isinstance(kind, str) or "." in kind or any(map(_names_a_path, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_names_a_path, value))


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float":
        return float(ast.literal_eval(node.args[0]))
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _literal(item) for key, item in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    return ast.literal_eval(node)
