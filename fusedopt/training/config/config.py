"""Config: a whole config, read from a file, changed by options, written to a file."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ...messages import did_you_mean, require, warn_caller
from ..errors import ConfigError
from ..files import replace_file, utf8_name
from ..registry import check_config
from .dicts import MOST_LEVELS, ConfigDict, levels
from .files import TOO_DEEP, content_of, load_text
from .merging import merged
from .naming import config_error, naming
from .python_files import BASE
from .writing import first_difference, is_argument, python_source, writable

__all__ = ["Config"]


class Config(ConfigDict):
    """A whole config: a dict with attribute access, read from a file, changed by options, written to a file.

    It is a ``dict``, so that it and its parts work wherever a dict is expected.

    Args:
        config: the items.
        filename: the file it was read from, for error messages.

    Raises:
        TypeError: ``config`` is not a dict.
    """

    _filename: str | None = None
    _text: str = ""

    def __init__(self, config: Mapping[str, Any] | None = None, *, filename: str | Path | None = None):
        if config is not None:
            check_config("config", config)
        super().__init__(config or {})
        object.__setattr__(self, "_filename", None if filename is None else str(filename))

    @property
    def filename(self) -> str | None:
        """The file that it was read from, as given; None without one."""
        return self._filename

    @property
    def text(self) -> str:
        """The content of the file that it was read from, without what the file inherits; empty without one."""
        return self._text

    @property
    def pretty_text(self) -> str:
        """The config as readable Python source; values that :meth:`dump` rejects are shown as their ``repr``."""
        return python_source(writable(self, "", None))

    @classmethod
    def fromfile(cls, filename: str | Path, import_custom_modules: bool = True) -> Config:
        """Read a ``.py``, ``.json``, ``.yaml`` or ``.yml`` file, and the files that it inherits.

        A Python file is run and can do anything that Python can: read only files you trust. Names that begin with an
        underscore, modules, functions and classes are private to the file and not part of the config. A JSON or YAML
        file runs no code and inherits only from JSON or YAML files.

        ``_base_`` names a file, or a list of files, relative to this one, or as ``package::file`` among the configs of
        an installed OpenMMLab package; their items are inherited, nested dicts are
        merged, and a dict with ``_delete_=True`` replaces the inherited one. A Python file reads an inherited value as
        ``_base_.key``, or as ``{{_base_.key}}`` in MMEngine's notation; ``{{ fileDirname }}``, ``{{ fileBasename }}``,
        ``{{ fileBasenameNoExtension }}`` and ``{{ fileExtname }}`` stand for the parts of the file's own path.

        Args:
            filename: the file.
            import_custom_modules: whether to import the modules in ``custom_imports``.

        Raises:
            ConfigError: a file cannot be read, is invalid, fails when run, or inherits from itself; two bases set the
                same key; a dict would be merged into another type; or a module cannot be imported.
            MissingExtraError: PyYAML is not installed.
        """
        path = Path(utf8_name(os.fspath(filename)))
        text = content_of(path)
        try:
            config = cls(load_text(text, path), filename=filename)
        except RecursionError as error:
            raise config_error(filename, "", TOO_DEEP) from error
        if levels(config) > MOST_LEVELS:
            raise config_error(filename, "", TOO_DEEP)
        object.__setattr__(config, "_text", text)
        if import_custom_modules:
            config.import_custom_modules()
        return config

    @classmethod
    def fromstring(cls, cfg_str: str, file_format: str) -> Config:
        """As :meth:`fromfile`, with the content of a file; what it inherits is relative to the current folder.

        Args:
            cfg_str: the content.
            file_format: ``'.py'``, ``'.json'``, ``'.yaml'`` or ``'.yml'``.

        Raises:
            ConfigError, MissingExtraError: as for :meth:`fromfile`.
        """
        config = cls(load_text(cfg_str, Path(f"config{file_format}")))
        config.import_custom_modules()
        return config

    @staticmethod
    def diff(cfg1: str | Path | Config, cfg2: str | Path | Config) -> str:
        """The lines in which the :attr:`pretty_text` of two configs, or of the configs in two files, differ.

        Returns:
            a unified diff; empty if they are equal.
        """
        configs = [each if isinstance(each, Config) else Config.fromfile(each) for each in (cfg1, cfg2)]
        one, other = (each.pretty_text.splitlines() for each in configs)
        name, other_name = (each.filename or "" for each in configs)
        return "\n".join(difflib.unified_diff(one, other, name, other_name, lineterm=""))

    def import_custom_modules(self) -> None:
        """Import the modules in ``custom_imports``, ``dict(imports=[...], allow_failed_imports=False)``.

        Raises:
            ConfigError: a module cannot be imported, or ``custom_imports`` is invalid.
        """
        if not self.get("custom_imports"):
            return
        with naming(self, "custom_imports"):
            check_config("custom_imports", self["custom_imports"])
            settings = dict(self["custom_imports"])
            names = settings.pop("imports", [])
            may_fail = settings.pop("allow_failed_imports", False)
            for key in settings:
                raise ValueError(f"unknown key {key!r}; {did_you_mean(key, ('imports', 'allow_failed_imports'))}")
            names = [names] if isinstance(names, str) else names
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"imports must be a list of module names, got {names!r}")
            for name in names:
                if not name or name.startswith("."):
                    raise ValueError(f"imports must be a list of absolute module names; {name!r} is not one")
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                if not may_fail:
                    reason = " ".join(str(error).split())
                    message = f"cannot import {name!r}: {reason} (folders in PYTHONPATH are searched, too)"
                    raise config_error(self.filename, "custom_imports", message) from error
                warn_caller(f"{self.filename}: custom_imports: {name!r} is skipped: {error}")

    def merge_from_dict(self, options: Mapping[str, Any], allow_list_keys: bool = True) -> None:
        """Change the items in ``options``, as with ``--cfg-options``; on an error nothing changes.

        Args:
            options: values by key; dots separate nested keys, as in ``{'optim_wrapper.optimizer.lr': 0.1}``; a dict
                value is merged, or with ``_delete_=True`` replaces the old one.
            allow_list_keys: let numbers index lists and tuples, as in ``{'param_scheduler.0.end': 5}``.

        Raises:
            ConfigError: a key leads through a value that has no items, or past the end of a list, or more than 100
                levels deep.
        """
        for key, value in options.items():
            if key.count(".") + levels(value) >= MOST_LEVELS:
                message = f"expected a setting at most {MOST_LEVELS} levels deep"
                raise config_error(self.filename, key[:MOST_LEVELS], message)
        nested: dict[str, Any] = {}
        for key, value in ConfigDict(options).items():
            *parents, last = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise config_error(self.filename, key, f"{parent!r} is given as {place!r} at the same time")
            place[last] = merged(place[last], value, key, self.filename) if last in place else value
        changed = merged(self, nested, "", self.filename, allow_list_keys)
        self.clear()
        self.update(changed)

    def dump(self, filename: str | Path | None = None) -> str:
        """Write the config to a file that loads back equal; return the text.

        Classes and functions are written as import paths, which a ``type`` accepts as well, and paths as strings. JSON
        and YAML have no tuples; tuples come back as lists.

        Args:
            filename: a ``.py``, ``.json``, ``.yaml`` or ``.yml`` file; None only returns :attr:`pretty_text`.

        Raises:
            ConfigError: a value, such as a lambda, cannot be written or would not be read back equal, or the file
                cannot be written. An existing file is unchanged then.
            MissingExtraError: PyYAML is not installed.
        """
        if filename is None:
            return self.pretty_text
        suffix = Path(filename).suffix

        def refuse(where: str, message: str) -> NoReturn:
            raise config_error(self.filename, where, message)

        if levels(self) > MOST_LEVELS:
            refuse("", f"expected at most {MOST_LEVELS} levels")
        settings = writable(self, "", refuse, (str,) if suffix == ".json" else (str, int, float))
        if suffix == ".py":
            for key in settings:
                # python_source writes calls of dict and float.
                if not is_argument(key) or key.startswith("_") or key in ("dict", "float"):
                    refuse(str(key), "a Python config file cannot set this name; dump to JSON or YAML")
            text = python_source(settings)
        elif suffix == ".json":
            text = json.dumps(settings, indent=2) + "\n"
        elif suffix in (".yaml", ".yml"):
            dump = functools.partial(require("yaml", "engine").safe_dump, settings, sort_keys=False)
            text = dump(allow_unicode=True)
            if "\x85" in text:  # unescaped, it would be read as a line break
                text = dump(allow_unicode=False)
        else:
            raise ConfigError(f"{filename}: unknown suffix {suffix!r}; expected .py, .json, .yaml or .yml")
        path = Path(utf8_name(os.fspath(filename)))
        if BASE in settings:
            refuse(BASE, "this name is reserved for the files that a config inherits")
        difference = first_difference(settings, load_text(text, path))
        if difference is not None:
            refuse(difference, f"the value would not be read back equal from a {suffix} file")
        try:
            replace_file(path, lambda file: file.write(text.encode()))
        except (OSError, ValueError) as error:
            raise config_error(filename, "", f"cannot write: {getattr(error, 'strerror', None) or error}") from error
        return text
