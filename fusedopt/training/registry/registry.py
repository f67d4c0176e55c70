"""Registry: classes and functions that a config's ``type`` can name."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from ...messages import did_you_mean, warn_caller
from .building import build_from_cfg
from .paths import dotted_name, import_dotted, import_registry_of

__all__ = ["MMENGINE_SCOPE", "Registry", "is_known_scope", "scope_by_default"]

#: The scope set by a config's ``_scope_``, while it and its nested configs are built, or by :func:`scope_by_default`.
_default_scope: ContextVar[str | None] = ContextVar("default_scope", default=None)
#: The scope of MMEngine's own registries, in whose place are those at the top of a tree here. A Runner's by default.
MMENGINE_SCOPE = "mmengine"
#: The scopes of all registries.
_scopes: set[str] = {MMENGINE_SCOPE}


@contextlib.contextmanager
def scope_by_default(scope: str | None) -> Iterator[None]:
    """Look unscoped names up in the registries of ``scope`` while the block runs; None changes nothing.

    The module ``scope.registry``, which adds a package's registries to the tree, is imported first, if it exists.
    """
    if scope is None:
        yield
        return
    if not isinstance(scope, str):
        raise TypeError(f"default_scope must be a string or None, got {scope!r}")
    if scope != MMENGINE_SCOPE:
        import_registry_of(scope)
    token = _default_scope.set(scope)
    try:
        yield
    finally:
        _default_scope.reset(token)


def is_known_scope(scope: str) -> bool:
    """Whether there is a registry of this scope."""
    return scope in _scopes


class Registry:
    """A table of classes and functions by name, from which configs are built; as ``mmengine.Registry``.

    Registries of one kind form a tree: a package makes its own registry a child of ours. A name is searched here, then
    in the parents; ``scope.Name`` in the registry of that scope; finally, an import path such as
    ``torch.optim.AdamW`` is imported. A registry imports its ``locations`` before the search goes on elsewhere.

    Args:
        name: what it holds, for messages, such as ``'optimizer'``.
        build_func: called as ``build_func(cfg, *args, registry=self, **kwargs)`` by :meth:`build`; by default the
            parent's, else the one that :meth:`build` describes.
        parent: the registry to search for names that are not here.
        scope: name of this registry in the tree; by default the package that creates it.
        locations: modules to import when a name is not found here, so that they can register it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``parent`` already has a child of that scope.
    """

    def __init__(
        self,
        name: str,
        build_func: Callable[..., Any] | None = None,
        parent: Registry | None = None,
        scope: str | None = None,
        locations: Sequence[str] = (),
    ):
        if scope is None:
            scope = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if not isinstance(scope, str) or "." in scope:
            raise TypeError(f"scope of a registry must be a string without dots, got {scope!r}")
        if isinstance(locations, str) or not all(isinstance(location, str) for location in locations):
            raise TypeError(f"locations must be a list of module names, got {locations!r}")
        if parent is not None and not isinstance(parent, Registry):
            raise TypeError(f"parent must be a Registry, got {type(parent).__name__}")
        self.name = name
        self.scope = scope
        self.parent = parent
        self.children: dict[str, Registry] = {}
        self.build_func: Callable[..., Any] = build_func or (
            parent.build_func if parent is not None else build_from_cfg
        )
        self._locations = list(locations)
        self._modules: dict[str, Callable[..., Any]] = {}
        self._lazy: dict[str, str] = {}
        self._replaceable: set[str] = set()
        if parent is not None:
            if scope in parent.children:
                raise ValueError(f"the {parent.name} registry has a child of scope {scope!r} already")
            parent.children[scope] = self
        _scopes.add(scope)

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """The registered objects by name, without those of :meth:`register_lazily`."""
        return self._modules

    @property
    def root(self) -> Registry:
        """The registry at the top of the tree."""
        return self if self.parent is None else self.parent.root

    def register_module(
        self,
        name: str | Sequence[str] | None = None,
        force: bool = False,
        module: Callable[..., Any] | None = None,
        replaceable: bool = False,
    ) -> Any:
        """Register a class or function: ``@register_module()`` above it, or ``register_module(module=cls)``.

        Args:
            name: name or names to register under; by default the object's own.
            force: replace an object that is registered under a name.
            module: the object, if this is not used as a decorator.
            replaceable: for classes of other packages that this one provides: whoever registers a name, before or
                after, needs no ``force`` and has it.

        Returns:
            ``module``, or the decorator.

        Raises:
            KeyError: a name is taken. Nothing has been registered then.
            TypeError: a name is not a string, ``force`` is not a bool, or the object is not callable.
        """
        if not isinstance(force, bool):
            raise TypeError(f"force must be True or False, got {force!r}")
        names = [name] if isinstance(name, str) else name
        if names is not None and not (isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)):
            raise TypeError(
                f"name must be a string, a list of strings or None, got {name!r} (the decorator is written with "
                "parentheses: @register_module())"
            )

        def register(target: Callable[..., Any]) -> Callable[..., Any]:
            if not callable(target):
                raise TypeError(f"the {self.name} registry holds classes and functions, got {target!r}")
            keys = list(names or [target.__name__])
            entries = self._entries()
            taken = [key for key in keys if key in entries and not self._is_reloaded(key, target)]
            refused = [key for key in taken if key not in self._replaceable and not force]
            if replaceable:
                keys = [key for key in keys if key not in taken]
            elif refused:
                raise KeyError(
                    f"{refused[0]!r} is already in the {self.name} registry as {entries[refused[0]]}; "
                    "force=True replaces it"
                )
            self._modules.update(dict.fromkeys(keys, target))
            (self._replaceable.update if replaceable else self._replaceable.difference_update)(keys)
            return target

        return register if module is None else register(module)

    def _is_reloaded(self, key: str, target: Callable[..., Any]) -> bool:
        """Whether a reloaded module of this package registers again what it had registered as ``key``."""
        known, own = self._modules.get(key), __name__.partition(".")[0]
        if known is target:
            return self.scope == own
        ours = str(getattr(target, "__module__", "")).partition(".")[0] == own
        return ours and known is not None and dotted_name(known) == dotted_name(target)

    def add_locations(self, *modules: str) -> None:
        """Add modules that are imported before a name is searched elsewhere; for registries that other modules fill."""
        self._locations.extend(modules)

    def register_lazily(self, name: str, path: str) -> None:
        """Register the object at an import path, which is imported when ``name`` is first looked up."""
        self._lazy[name] = path

    def get(self, key: str) -> Any:
        """The object for ``key``, or None.

        Args:
            key: a name, registered here or in a parent; ``scope.Name``; or an import path. For an unknown scope, the
                module ``scope.registry`` is imported first, if it exists.

        Raises:
            TypeError: ``key`` is not a string.
        """
        if not isinstance(key, str):
            raise TypeError(f"a {self.name} is looked up by a string, got {key!r}")
        scope, dot, _ = key.partition(".")
        if dot and key not in self._modules and self._search(scope) is None:
            import_registry_of(scope)
        found = self._find(key)
        return import_dotted(key) if found is None else found

    def _find(self, key: str) -> Any:
        """The object registered as ``key`` in this tree, or None."""
        found = self._find_here(key)
        if found is not None:
            return found
        scope, dot, rest = key.partition(".")
        if not dot:
            return None if self.parent is None else self.parent._find(key)
        if scope == self.scope:
            return self._find_here(rest)
        registry = self._search(scope)
        return None if registry is None else registry._find(rest)

    def _search(self, scope: str) -> Registry | None:
        """The registry of ``scope``: this one or below it, else anywhere in the tree."""
        found = self._search_below(scope)
        found = self.root._search_below(scope) if found is None else found
        return self.root if found is None and scope == MMENGINE_SCOPE else found

    def _search_below(self, scope: str) -> Registry | None:
        if scope == self.scope:
            return self
        found = (child._search_below(scope) for child in self.children.values())
        return next((registry for registry in found if registry is not None), None)

    def _find_here(self, key: str) -> Any:
        """The object registered as ``key`` in this registry alone, or None."""
        if key not in self._modules:
            self._import_locations()
        if key not in self._modules and key in self._lazy:
            return import_dotted(self._lazy[key])
        return self._modules.get(key)

    def _import_locations(self) -> None:
        # Emptied first: the imported modules may look up names here.
        locations, self._locations = self._locations, []
        try:
            for location in locations:
                importlib.import_module(location)
        except BaseException:
            self._locations = locations
            raise

    @contextlib.contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Make ``scope`` the default scope, also for nested builds, and yield its registry.

        Args:
            scope: None keeps the default scope. If no registry of the tree has the scope, this one is used, with a
                warning.
        """
        with scope_by_default(scope):
            current = _default_scope.get()
            registry = None if current is None else self._search(current)
            if registry is None and scope is not None:
                warn_caller(f"no {self.name} registry has the scope {scope!r}; {self.scope!r} is used")
            yield self if registry is None else registry

    def resolve(self, kind: str | Callable[..., Any]) -> Callable[..., Any]:
        """The class or function that the ``type`` of a config stands for, looked up in the default scope if set.

        Args:
            kind: a key for :meth:`get`, or the class or function itself. Where a default scope is set, as in a Runner,
                a class of MMEngine's stands for ours of the same name, if there is one.

        Raises:
            KeyError: an unknown name; the message gives the closest registered one.
            TypeError: it is not, or does not lead to, a callable.
        """
        with self.switch_scope_and_registry(None) as registry:
            target = registry.get(kind) if isinstance(kind, str) else kind
        if target is None:
            known = registry._names()
            hint = did_you_mean(str(kind), known) if known else "nothing is registered"
            raise KeyError(f"{kind!r} is not in the {self.name} registry and cannot be imported; {hint}")
        if _default_scope.get() is not None and getattr(target, "__module__", "").partition(".")[0] == MMENGINE_SCOPE:
            target = self.root.module_dict.get(getattr(target, "__name__", ""), target)
        if not callable(target):
            raise TypeError(f"type of {self.name} must be a registered name, an import path or a class, got {kind!r}")
        return target

    def _names(self) -> set[str]:
        return set(self) | (set() if self.parent is None else self.parent._names())

    def build(self, cfg: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Build the object that a config describes; the config is not changed.

        Args:
            cfg: ``type`` (see :meth:`resolve`), the keyword arguments and, optionally, ``_scope_``, the scope to build
                in.
            args: positional arguments.
            kwargs: defaults of keyword arguments; ``cfg`` takes precedence. As in MMEngine, they may also be given as
                ``default_args``, a dict, which may hold the ``type`` too.

        Raises:
            KeyError: ``type`` is missing or unknown.
            TypeError: ``cfg`` is not a dict, or the arguments do not fit; the message names the class.
        """
        return self.build_func(cfg, *args, registry=self, **kwargs)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def _entries(self) -> dict[str, str]:
        """The import path of each entry, by name."""
        return {**self._lazy, **{name: dotted_name(target) for name, target in self._modules.items()}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries())

    def __len__(self) -> int:
        return len(self._entries())

    def __repr__(self) -> str:
        entries = "".join(f"\n  {name}: {path}" for name, path in sorted(self._entries().items()))
        return f"{type(self).__name__}(name={self.name!r}, scope={self.scope!r}, {len(self)} registered){entries}"
