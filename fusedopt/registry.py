"""Registries: what the ``type`` of a config may name, and how such a config becomes an object."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .rules.checks import did_you_mean

__all__ = [
    "DATASETS",
    "MODELS",
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "Registry",
    "accepted_arguments",
    "check_config",
]


def check_config(name: str, cfg: Any) -> None:
    """Raise TypeError unless ``cfg`` is a dict; one that a trailing comma turned into a tuple is told apart."""
    if isinstance(cfg, Mapping):
        return
    if isinstance(cfg, tuple) and len(cfg) == 1 and isinstance(cfg[0], Mapping):
        raise TypeError(
            f"{name} is a tuple that holds one dict: a trailing comma, as in `{name} = dict(...),`, makes it one; "
            "remove the comma"
        )
    raise TypeError(f"{name} must be a dict, got {type(cfg).__name__}: {cfg!r}")


def accepted_arguments(target: Callable[..., Any]) -> set[str] | None:
    """Names of the keyword arguments ``target`` takes, or None when it takes any.

    The ``**kwargs`` of a constructor are taken to go to the constructor of the base class.
    """
    if isinstance(target, type):
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


def _import_dotted(path: str) -> Any:
    """The object at an import path such as ``torch.optim.AdamW``, or None when there is none."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return None
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
                continue
            raise  # the module is there, and imports one that is not
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


class Registry:
    """A table of classes and functions by name, from which configs are built.

    Args:
        name: what it holds, as messages call it, such as ``'optimizer'``.
    """

    def __init__(self, name: str):
        self.name = name
        self._modules: dict[str, Callable[..., Any]] = {}

    def register_module(
        self, name: str | Sequence[str] | None = None, force: bool = False, module: Callable[..., Any] | None = None
    ) -> Any:
        """Register a class or function: ``@register_module()`` above it, or ``register_module(module=cls)``.

        Args:
            name: name or names to register under; by default the object's own.
            force: replace what is registered under a name.
            module: the object, when this is not used as a decorator.

        Returns:
            ``module``, or the decorator.

        Raises:
            KeyError: a name is taken. Nothing has been registered then.
            TypeError: a name is not a string, or the object is not callable.
        """
        names = [name] if isinstance(name, str) else name
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
            raise TypeError(
                f"name must be a string, a list of strings or None, got {name!r} (the decorator is written with "
                "parentheses: @register_module())"
            )

        def register(target: Callable[..., Any]) -> Callable[..., Any]:
            if not callable(target):
                raise TypeError(f"the {self.name} registry holds classes and functions, got {target!r}")
            keys = names or [target.__name__]
            taken = [key for key in keys if key in self._modules]
            if taken and not force:
                raise KeyError(
                    f"{taken[0]!r} is already in the {self.name} registry as {_dotted_name(self._modules[taken[0]])}; "
                    "force=True replaces it"
                )
            self._modules.update(dict.fromkeys(keys, target))
            return target

        return register if module is None else register(module)

    def get(self, key: str) -> Any:
        """What is registered as ``key``, else what is found at the import path ``key``, else None."""
        return self._modules[key] if key in self._modules else _import_dotted(key)

    def resolve(self, kind: str | Callable[..., Any]) -> Callable[..., Any]:
        """The class or function that the ``type`` of a config stands for.

        Args:
            kind: a registered name, an import path, or the class or function itself.

        Raises:
            KeyError: nothing goes by that name; the message gives the closest registered one.
            TypeError: it is, or leads to, something that cannot be called.
        """
        target = self.get(kind) if isinstance(kind, str) else kind
        if target is None:
            hint = did_you_mean(str(kind), self._modules) if self._modules else "nothing is registered"
            raise KeyError(f"{kind!r} is not in the {self.name} registry and is no import path; {hint}")
        if not callable(target):
            raise TypeError(f"type of {self.name} must be a registered name, an import path or a class, got {kind!r}")
        return target

    def build(self, cfg: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Make the object a config describes; the config is not changed.

        Args:
            cfg: ``type`` (see :meth:`resolve`) and the keyword arguments.
            args: positional arguments.
            kwargs: keyword arguments for which ``cfg`` has no value of its own.

        Raises:
            KeyError: ``type`` is missing or unknown.
            TypeError: ``cfg`` is not a dict, or the arguments do not fit; the message names the class.
        """
        check_config(f"{self.name} config", cfg)
        settings = {**kwargs, **cfg}
        if "type" not in settings:
            raise KeyError(f"{self.name} config needs the key 'type', got {dict(cfg)!r}")
        target = self.resolve(settings.pop("type"))
        try:
            return target(*args, **settings)
        except TypeError as error:
            accepted = accepted_arguments(target)
            unknown = [key for key in settings if accepted is not None and key not in accepted]
            hint = f"; {did_you_mean(unknown[0], accepted)}" if unknown and accepted else ""
            raise TypeError(f"{_dotted_name(target)}: {error}{hint}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        entries = "".join(f"\n  {name}: {_dotted_name(target)}" for name, target in sorted(self._modules.items()))
        return f"{type(self).__name__}(name={self.name!r}, {len(self)} registered){entries}"


def _dotted_name(target: Callable[..., Any]) -> str:
    name = getattr(target, "__qualname__", None)
    return repr(target) if name is None else f"{target.__module__}.{name}"


#: Optimizers: torch's under their own names; ``fusedopt.optimizers`` adds ours.
OPTIMIZERS = Registry("optimizer")
OPTIM_WRAPPERS = Registry("optimizer wrapper")
OPTIM_WRAPPER_CONSTRUCTORS = Registry("optimizer wrapper constructor")
MODELS = Registry("model")
DATASETS = Registry("dataset")

for _name, _class in vars(torch.optim).items():
    if isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer) and _class is not torch.optim.Optimizer:
        OPTIMIZERS.register_module(name=_name, module=_class)
