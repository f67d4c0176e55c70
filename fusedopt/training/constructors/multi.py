"""MultiOptimWrapperConstructor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from ...messages import did_you_mean, warn_caller
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, accepted_arguments, check_config
from ..unwrapping import named_children, named_modules, named_parameters, unwrap
from ..wrappers import OptimWrapper, OptimWrapperDict
from .default import DefaultOptimWrapperConstructor

__all__ = ["MultiOptimWrapperConstructor"]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(replaceable=True)
class MultiOptimWrapperConstructor:
    """Several optimizers for the parts of a model, as for the networks of a GAN; as MMagic's class of this name.

    ``optim_wrapper_cfg`` has an entry for each optimizer: a wrapper config with its ``optimizer`` and, optionally,
    ``paramwise_cfg``. The entry's key names what it trains: a first-level module of the model or, if no such module
    exists, a regular expression that must match a module's full name. ``modules`` in an entry (a name, an expression or
    a list of them) replaces the key. Common settings of the wrappers (``type``, ``clip_grad``, …) may be given beside
    the entries; an entry's own settings take precedence.

    With ``modules`` at the top level, one optimizer in a plain wrapper trains all of them. Parameters that no entry
    claims are not trained; with entries, or with nothing, a warning names some of those that are not frozen. A config
    without entries, as in MMagic's base files, trains nothing.

    Args:
        optim_wrapper_cfg: the above. Not changed.
        paramwise_cfg: must be None; it belongs in an entry for one first-level module.

    Raises:
        KeyError, TypeError, ValueError: see :class:`DefaultOptimWrapperConstructor`; and when called with a model:
            names that match nothing, or a parameter that two entries claim.
    """

    #: The class that holds the wrappers.
    wrapper_dict: ClassVar[Callable[..., Any]] = OptimWrapperDict

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None):
        check_config("optim_wrapper", optim_wrapper_cfg)
        if paramwise_cfg is not None:
            raise ValueError("paramwise_cfg is set for each optimizer separately: put it into that optimizer's entry")
        optim_wrapper_cfg = {key: value for key, value in optim_wrapper_cfg.items() if key != "constructor"}
        self.single = "modules" in optim_wrapper_cfg
        self.constructors: dict[str, DefaultOptimWrapperConstructor] = {}
        self.modules: dict[str, list[str]] = {}
        entries = {"": optim_wrapper_cfg} if self.single else self._entries(optim_wrapper_cfg)
        for key, entry in entries.items():
            settings = dict(entry)
            self.modules[key] = self._patterns(key, settings.pop("modules", key))
            rules = settings.pop("paramwise_cfg", None)
            self.constructors[key] = DefaultOptimWrapperConstructor(settings, rules)

    @staticmethod
    def _entries(cfg: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        with OPTIM_WRAPPERS.switch_scope_and_registry(cfg.get("_scope_")) as registry:
            accepted = accepted_arguments(registry.resolve(cfg.get("type", "OptimWrapper"))) or set()
        common = {key: value for key, value in cfg.items() if key in {*accepted, "type", "_scope_"} - {"optimizer"}}
        entries = {key: value for key, value in cfg.items() if key not in common}
        for key, entry in entries.items():
            check_config(f"optim_wrapper[{key!r}]", entry)
            if "optimizer" not in entry:
                has = ", ".join(map(repr, entry)) or "no keys"
                raise KeyError(f"optim_wrapper[{key!r}] needs the key 'optimizer'; it has {has}")
            if "constructor" in entry:
                raise ValueError(f"optim_wrapper[{key!r}]: 'constructor' belongs at the top level, not in an entry")
        return {key: {**common, **entry} for key, entry in entries.items()}

    @staticmethod
    def _patterns(key: str, modules: Any) -> list[str]:
        patterns = [modules] if isinstance(modules, str) else modules
        if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
            where = f"optim_wrapper[{key!r}]" if key else "optim_wrapper"
            raise TypeError(f"modules of {where} must be a name or a list of names, got {modules!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"modules: {pattern!r} is not a regular expression: {error}") from error
        return list(patterns)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizers of ``model`` and their wrappers."""
        model = unwrap(model, by_structure=True)
        owners: dict[nn.Parameter, tuple[str, str]] = {}
        wrappers = {}
        for key, constructor in self.constructors.items():
            modules = self._find(model, key)
            for name, param in _parameters_of(modules):
                other, other_name = owners.setdefault(param, (key, name))
                if other != key:
                    names = repr(name) if name == other_name else f"{other_name!r} (also {name!r})"
                    raise ValueError(
                        f"parameter {names} belongs to two optimizers: {other!r} and {key!r} of optim_wrapper both "
                        "match; each parameter needs exactly one"
                    )
            wrappers[key] = self._build(model, key, constructor, modules)
        if self.single:
            return wrappers[""]
        rest = [repr(name) for name, param in model.named_parameters() if param.requires_grad and param not in owners]
        if rest:
            names = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
            warn_caller(f"optim_wrapper: no entry claims the parameters {names}: they are not trained")
        return self.wrapper_dict(**wrappers)

    def _build(
        self, model: nn.Module, key: str, constructor: DefaultOptimWrapperConstructor, modules: dict[str, nn.Module]
    ) -> OptimWrapper:
        children = dict(named_children(model))
        if list(modules) == self.modules[key] and len(modules) == 1 and next(iter(modules)) in children:
            return constructor(next(iter(modules.values())))
        if constructor.paramwise_cfg:
            raise ValueError(
                f"paramwise_cfg of optim_wrapper{f'[{key!r}]' if key else ''} works for one first-level module only; "
                f"this entry has {', '.join(map(repr, modules))}"
            )
        # If a module and one inside it both match, each parameter is added once.
        return constructor.build_wrapper(list(dict.fromkeys(param for _, param in _parameters_of(modules))))

    def _find(self, model: nn.Module, key: str) -> dict[str, nn.Module]:
        """The modules of an entry by name."""
        children = dict(named_children(model))
        found: dict[str, nn.Module] = {}
        for pattern in self.modules[key]:
            if pattern in children:
                matches = {pattern: children[pattern]}
            else:
                matches = {name: module for name, module in named_modules(model) if re.fullmatch(pattern, name)}
            if not matches:
                raise ValueError(
                    f"optim_wrapper: {pattern!r} is neither a first-level module of the {type(model).__name__} nor an "
                    f"expression that matches the name of a module; {did_you_mean(pattern, children)}"
                )
            found.update(matches)
        return found


def _parameters_of(modules: Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{module_name}.{name}" if module_name else name, param)
        for module_name, module in modules.items()
        for name, param in named_parameters(module)
    ]
