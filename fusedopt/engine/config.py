"""Configs: Python, JSON and YAML files, what they inherit, and the options of a command line."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import keyword
import os
import re
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NoReturn

from ..extras import MissingExtraError, require
from ..registry import check_config, warn_caller
from ..rules import did_you_mean
from .checkpoint import CheckpointError

__all__ = ["Config", "ConfigDict", "ConfigError", "naming", "parse_options"]

_BASE, _DELETE = "_base_", "_delete_"
#: What a config file may import or define for its own use; such names are no part of the config.
_NO_SETTING = (ModuleType, FunctionType, BuiltinFunctionType, type)
_LINE_WIDTH = 100


class ConfigError(ValueError):
    """A config cannot be used; the message, one line, names the file, the key and what is wrong."""


class ConfigDict(dict[str, Any]):
    """A dict whose items are attributes too, as ``mmengine.ConfigDict``.

    Every dict put into it, in a list or tuple as well, becomes a ConfigDict of its own: what was put in stays as it is
    when the config is changed. :meth:`update` goes into dicts that both sides have. An item that is called like a
    method can be reached as ``config['items']`` only.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.update(*args, **kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, _converted(value))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            known = [key for key in self if isinstance(key, str)]
            hint = f"; {did_you_mean(name, known)}" if known and not name.startswith("__") else ""
            raise AttributeError(f"the config has no {name!r} here{hint}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise AttributeError(f"{name!r} belongs to {type(self).__name__}; an item is set with [{name!r}]")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            self.__getattr__(name)
        del self[name]

    def __ior__(self, other: Any) -> ConfigDict:  # type: ignore[override,misc]
        for key, value in dict(other).items():
            self[key] = value
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As ``dict.update``, but a dict over a dict updates that one."""
        for key, value in dict(*args, **kwargs).items():
            if isinstance(self.get(key), ConfigDict) and isinstance(value, Mapping):
                self[key].update(value)
            else:
                self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As ``dict.setdefault``."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> ConfigDict:
        """A copy that shares neither dicts nor lists nor tuples with this one."""
        return copy.copy(self)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain dicts, those inside lists and tuples too."""
        return _plain(self)


def _converted(value: Any) -> Any:
    if isinstance(value, ConfigDict) or type(value) in (dict, OrderedDict):
        return ConfigDict(value)
    return type(value)(map(_converted, value)) if type(value) in (list, tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


class Config(ConfigDict):
    """A whole config: a dict with attribute access, read from a file, changed by options, written to a file.

    It is a ``dict``, so that it and its parts go wherever a dict is asked for.

    Args:
        config: the items.
        filename: file that it came from, which errors name.

    Raises:
        TypeError: ``config`` is not a dict.
    """

    _filename: str | None = None

    def __init__(self, config: Mapping[str, Any] | None = None, *, filename: str | Path | None = None):
        if config is not None:
            check_config("config", config)
        super().__init__(config or {})
        object.__setattr__(self, "_filename", None if filename is None else str(filename))

    @property
    def filename(self) -> str | None:
        """The file that it was read from, as given; None when there was none."""
        return self._filename

    @property
    def pretty_text(self) -> str:
        """The config as Python text, for people: what :meth:`dump` would refuse stands there as its ``repr``."""
        return _python(_writable(self, "", None))

    @classmethod
    def fromfile(cls, filename: str | Path, import_custom_modules: bool = True) -> Config:
        """Read a ``.py``, ``.json``, ``.yaml`` or ``.yml`` file, and the files that it inherits.

        A Python file is run, with everything that Python may do: read only files you trust. Names that begin with an
        underscore, modules, functions and classes are the file's own and no part of the config. A JSON or YAML file
        runs no code and inherits only from its like.

        ``_base_`` names a file, or a list of files, relative to this one; their items are inherited, dicts within dicts
        are merged, and a dict with ``_delete_=True`` replaces the inherited one. A Python file can read what it
        inherits as ``_base_.key``, or ``{{_base_.key}}`` as MMEngine writes it; ``{{ fileDirname }}``,
        ``{{ fileBasename }}``, ``{{ fileBasenameNoExtension }}`` and ``{{ fileExtname }}`` stand for the file's own
        name.

        Args:
            filename: the file.
            import_custom_modules: import what ``custom_imports`` asks for.

        Raises:
            ConfigError: a file cannot be read, is wrong, fails when run, or inherits from itself; two bases set the
                same key; a dict meets something else; or a module cannot be imported.
            MissingExtraError: PyYAML is not installed.
        """
        try:
            config = cls(_load(Path(filename), ()), filename=filename)
        except RecursionError as error:
            raise _error(filename, "", "the file is nested too deeply") from error
        if import_custom_modules:
            config.import_custom_modules()
        return config

    def import_custom_modules(self) -> None:
        """Import what ``custom_imports`` asks for: ``dict(imports=[...], allow_failed_imports=False)``.

        Raises:
            ConfigError: a module cannot be imported, or what is asked for is of the wrong kind.
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
                    raise ValueError(f"imports must be a list of whole module names; {name!r} is none")
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                if not may_fail:
                    message = f"cannot import {name!r}: {error} (folders in PYTHONPATH are searched, too)"
                    raise _error(self.filename, "custom_imports", message) from error
                warn_caller(f"{self.filename}: custom_imports: {name!r} is left out: {error}")

    def merge_from_dict(self, options: Mapping[str, Any], allow_list_keys: bool = True) -> None:
        """Change what ``options`` names, as the ``--cfg-options`` of a command line; on an error nothing changes.

        Args:
            options: values by key; dots go into dicts, as in ``{'optim_wrapper.optimizer.lr': 0.1}``, and a dict value
                is merged, or replaces with ``_delete_=True``.
            allow_list_keys: numbers go into lists and tuples, as in ``{'param_scheduler.0.end': 5}``.

        Raises:
            ConfigError: a key leads through something that has no items, or past the end of a list.
        """
        nested: dict[str, Any] = {}
        for key, value in ConfigDict(options).items():
            *parents, last = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
                if not isinstance(place, dict):
                    raise _error(self.filename, key, f"{parent!r} is given as {place!r} at the same time")
            place[last] = _merged(place[last], value, key, self.filename) if last in place else value
        merged = _merged(self, nested, "", self.filename, allow_list_keys)
        self.clear()
        self.update(merged)

    def dump(self, filename: str | Path | None = None) -> str:
        """Write the config to a file that loads back equal; return the text.

        Classes and functions are written as their import paths, which a ``type`` may be as well, and paths as strings.
        JSON and YAML know no tuples: they come back as lists.

        Args:
            filename: a ``.py``, ``.json``, ``.yaml`` or ``.yml`` file; None only returns :attr:`pretty_text`.

        Raises:
            ConfigError: a value has no such form, such as a lambda; nothing has been written then.
            MissingExtraError: PyYAML is not installed.
        """
        if filename is None:
            return self.pretty_text
        suffix = Path(filename).suffix

        def refuse(where: str, message: str) -> NoReturn:
            raise _error(self.filename, where, message)

        settings = _writable(self, "", refuse, (str,) if suffix == ".json" else (str, int, float))
        if suffix == ".py":
            for key in settings:
                if not _is_argument(key) or key.startswith("_"):
                    refuse(str(key), "a Python config file cannot set this name; dump to JSON or YAML")
            text = _python(settings)
        elif suffix == ".json":
            text = json.dumps(settings, indent=2) + "\n"
        elif suffix in (".yaml", ".yml"):
            text = require("yaml", "engine").safe_dump(settings, sort_keys=False, allow_unicode=True)
        else:
            raise ConfigError(f"{filename}: unknown suffix {suffix!r}; expected .py, .json, .yaml or .yml")
        Path(filename).write_text(text, encoding="utf-8")
        return text


def _error(filename: str | Path | None, key: str, message: str) -> ConfigError:
    return ConfigError(": ".join(part for part in (str(filename or ""), key, " ".join(message.split())) if part))


@contextmanager
def naming(config: Mapping[str, Any], key: str = "") -> Iterator[None]:
    """Turn the errors of building what ``config`` describes into one line that names its file and ``key``."""
    try:
        yield
    except (CheckpointError, ConfigError, MissingExtraError):
        raise
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # str() of a KeyError quotes its message.
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        message = message or type(error).__name__
        raise _error(getattr(config, "filename", None), key, message.removeprefix(f"{key}: ")) from error


def _load(path: Path, children: Sequence[Path]) -> dict[str, Any]:
    """What a file sets, merged into what it inherits. ``children`` are the files that led here, the first one first."""
    resolved = path.resolve()
    if resolved in [child.resolve() for child in children]:
        chain = " -> ".join(map(str, (*children, path)))
        raise _error(children[0], _BASE, f"the file inherits from itself: {chain}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        if children:
            raise _error(children[-1], _BASE, f"cannot read {path}: {reason}") from error
        raise _error(path, "", f"cannot read the config file: {reason}") from error
    text = _with_file_names(text, path)
    if path.suffix == ".py":
        tree = _parse(text, path)
        names = _base_names(tree, path)
    elif path.suffix in (".json", ".yaml", ".yml"):
        own = _parse_data(text, path)
        names = own.pop(_BASE, [])
    else:
        raise _error(path, "", f"unknown suffix {path.suffix!r}; expected .py, .json, .yaml or .yml")
    bases = ConfigDict()
    for base in _base_paths(names, path):
        inherited = _load(base, (*children, path))
        twice = [key for key in inherited if key in bases]
        if twice:
            raise _error(path, twice[0], f"Duplicate key: {base} sets it, and so does another file of {_BASE}")
        bases |= inherited
    own = _run(tree, path, bases) if path.suffix == ".py" else _with_base_values(own, bases, path)
    return _merged(bases, own, "", path)


def _with_file_names(text: str, path: Path) -> str:
    names = {
        "fileDirname": str(path.absolute().parent),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }
    return re.sub(rf"\{{\{{\s*({'|'.join(names)})\s*\}}\}}", lambda match: names[match[1]], text)


_BASE_VALUE = re.compile(r"""(['"]?)\{\{\s*_base_\.([\w.]+)\s*\}\}\1""")
#: What it becomes. The spaces tell it from what a user would write, wherever it comes out.
_BASE_EXPRESSION = r"_base_   .\2"


def _parse(text: str, path: Path) -> ast.Module:
    try:
        tree = ast.parse(_BASE_VALUE.sub(_BASE_EXPRESSION, text), str(path))
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        raise _syntax_error(path, error) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "_base_   ." in node.value:
            raise ConfigError(
                f"{path}:{node.lineno}: {{{{_base_. ...}}}} is a value of its own, no part of a string; there write "
                "f'... {_base_. ...}'"
            )
    return tree


def _syntax_error(path: Path, error: Exception) -> ConfigError:
    line = getattr(error, "lineno", None) or 1
    return ConfigError(f"{path}:{line}: syntax error: {getattr(error, 'msg', error)}")


def _sets_base(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == _BASE for to in node.targets)


def _base_names(tree: ast.Module, path: Path) -> Any:
    """The value of ``_base_`` in a Python file, which is taken out of it."""
    found = [node for node in tree.body if _sets_base(node)]
    tree.body = [node for node in tree.body if node not in found]
    try:
        return ast.literal_eval(found[-1].value) if found else []  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        line = found[-1].lineno
        raise ConfigError(f"{path}:{line}: {_BASE} must be a string or a list of strings, spelled out") from error


def _base_paths(names: Any, path: Path) -> list[Path]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise _error(path, _BASE, f"expected a file name or a list of them, got {names!r}")
    bases = [Path(os.path.normpath(path.parent / name)) for name in names]
    for base in bases:
        if base.suffix == ".py" and path.suffix != ".py":
            raise _error(path, _BASE, f"a {path.suffix} file runs no code, so it cannot inherit from {base}")
    return bases


def _run(tree: ast.Module, path: Path, bases: ConfigDict) -> dict[str, Any]:
    """Run a Python config file; return its settings."""
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem, _BASE: bases}
    try:
        code = compile(tree, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:  # such as a `return`, which only compiling refuses
        raise _syntax_error(path, error) from error
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else 1
        raise _error(f"{path}:{line}", type(error).__name__, str(error)) from error
    if namespace[_BASE] is not bases:
        raise _error(path, _BASE, "must be set on a line of its own, outside of any block")
    return {
        key: value for key, value in namespace.items() if not key.startswith("_") and not isinstance(value, _NO_SETTING)
    }


_STRING_OR_BASE_VALUE = re.compile(r"""("(?:[^"\\]|\\.)*")|\{\{\s*_base_\.[\w.]+\s*\}\}""")
_BASE_STRING = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}|_base_   \.([\w.]+)")


def _parse_data(text: str, path: Path) -> dict[str, Any]:
    """What a JSON or YAML file holds."""
    # What stands for base values becomes strings, which are replaced when the rest is read.
    if path.suffix == ".json":
        yaml, text = None, _STRING_OR_BASE_VALUE.sub(lambda match: match[1] or f'"{match[0]}"', text)
    else:
        yaml, text = require("yaml", "engine"), _BASE_VALUE.sub(_BASE_EXPRESSION, text)
    try:
        data = json.loads(text) if yaml is None else yaml.safe_load(text)
    except Exception as error:
        if isinstance(error, json.JSONDecodeError):
            line, reason = error.lineno, error.msg
        elif yaml is not None and isinstance(error, yaml.YAMLError):
            mark = getattr(error, "problem_mark", None)
            line, reason = (mark.line + 1 if mark else 1), getattr(error, "problem", None) or str(error)
        else:
            raise
        raise ConfigError(f"{path}:{line}: syntax error: {' '.join(reason.split())}") from error
    if not isinstance(data, dict):
        raise _error(path, "", f"a config is a mapping of keys to values, got {type(data).__name__}")
    return data


def _with_base_values(value: Any, bases: ConfigDict, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _with_base_values(item, bases, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_base_values(item, bases, path) for item in value]
    named = _BASE_STRING.search(value) if isinstance(value, str) else None
    if named is None:
        return value
    name = named[1] or named[2]
    if named[0] != value:
        raise _error(path, f"{{{{_base_.{name}}}}}", "is a value of its own, no part of a string")
    found: Any = bases
    for key in name.split("."):
        if not isinstance(found, ConfigDict) or key not in found:
            raise _error(path, f"{{{{_base_.{name}}}}}", f"what it inherits has no {key!r}")
        found = found[key]
    return found


def _without_directives(value: Any) -> Any:
    """``value`` where nothing is inherited: there is nothing to delete."""
    if isinstance(value, dict):
        return {key: _without_directives(item) for key, item in value.items() if key != _DELETE}
    return type(value)(map(_without_directives, value)) if type(value) in (list, tuple) else value


def _merged(base: Any, new: Any, where: str, filename: str | Path | None, allow_list_keys: bool = False) -> Any:
    """``new`` over ``base``; neither is changed. ``where`` is the key of both."""
    if not isinstance(new, dict) or new.get(_DELETE):
        return _without_directives(new)
    changes = {key: value for key, value in new.items() if key != _DELETE}

    def over(old: Any, key: Any) -> Any:
        return _merged(old, changes[key], f"{where}.{key}".lstrip("."), filename, allow_list_keys)

    if isinstance(base, dict):
        replaced = {key: over(base[key], key) if key in base else _without_directives(changes[key]) for key in changes}
        return {**base, **replaced}
    if not (allow_list_keys and isinstance(base, (list, tuple))):
        raise _error(
            filename,
            where,
            f"a dict cannot be merged into {base!r}, which is no dict; `{_DELETE}=True` in the dict makes it replace "
            "what is there",
        )
    items = list(base)
    for key in changes:
        if not (isinstance(key, str) and key.isdecimal() and int(key) < len(items)):
            raise _error(filename, f"{where}.{key}", f"expected an index below {len(items)}, the length of the list")
        items[int(key)] = over(items[int(key)], key)
    return type(base)(items)


def _import_path(value: Any) -> str | None:
    """The import path that leads to this very class or function, or None."""
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    if found is None or not isinstance(value, _NO_SETTING):
        return None
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return f"{value.__module__}.{value.__qualname__}" if found is value else None


def _writable(
    value: Any, where: str, refuse: Callable[[str, str], NoReturn] | None, keys: tuple[type, ...] = (object,)
) -> Any:
    """``value`` in plain dicts, lists, tuples, numbers, strings, bools and None.

    Args:
        value: the value.
        where: its key.
        refuse: called with the key and the reason where there is no such form; None has a ``repr`` there instead.
        keys: types of the keys that dicts may have.
    """
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        items = [_writable(item, f"{where}.{index}", refuse, keys) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        for key in value:
            if refuse is not None and not isinstance(key, keys):
                refuse(where, f"the key {key!r} cannot be written there; expected a string")
        return {key: _writable(item, f"{where}.{key}".lstrip("."), refuse, keys) for key, item in value.items()}
    path = _import_path(value)
    if path is None and refuse is not None:
        refuse(where, f"{value!r} cannot be written to a file")
    return path or repr(value)


def _is_argument(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def _python(settings: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_source(value)}\n" for key, value in settings.items())


def _source(value: Any, indent: str = "") -> str:
    """Python source of a writable value."""
    inner = f"{indent}    "
    if isinstance(value, dict):
        if all(map(_is_argument, value)):
            opening, closing, items = "dict(", ")", [f"{key}={_source(item, inner)}" for key, item in value.items()]
        else:
            opening, closing = "{", "}"
            items = [f"{_source(key)}: {_source(item, inner)}" for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        items = [_source(item, inner) for item in value]
    elif isinstance(value, float) and not float("-inf") < value < float("inf"):
        return f"float({str(value)!r})"
    else:
        return repr(value)
    flat = opening + ", ".join(items) + ("," if isinstance(value, tuple) and len(items) == 1 else "") + closing
    if len(indent) + len(flat) <= _LINE_WIDTH and "\n" not in flat:
        return flat
    return "\n".join([opening, *(f"{inner}{item}," for item in items), indent + closing])


def parse_options(options: Iterable[str]) -> dict[str, Any]:
    """The values that ``--cfg-options`` gives, for :meth:`Config.merge_from_dict`.

    Args:
        options: ``KEY=VALUE`` each. Ints, floats, ``true`` and ``false``, and ``None`` are known; ``[a, b]`` and
            ``a,b`` are lists, ``(a, b)`` is a tuple, one in another too; all else, and what is in quotes, is a string.

    Raises:
        ConfigError: there is no ``=``, or brackets or quotes do not match.
    """
    values = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ConfigError(f"--cfg-options {option}: expected KEY=VALUE")
        try:
            values[key] = _parse_value(text)
        except ValueError as error:
            raise ConfigError(f"--cfg-options {option}: {error}") from error
    return values


def _parse_value(text: str) -> Any:
    text = text.strip()
    parts = _split(text) if "," in text or text[:1] in ("[", "(") else [text]
    if len(parts) > 1:
        return [_parse_value(part) for part in (parts if parts[-1].strip() else parts[:-1])]
    if text[:1] in ("[", "(") and text[-1:] in ("]", ")"):
        inner = _split(text[1:-1])
        items = [_parse_value(part) for part in (inner if inner[-1].strip() else inner[:-1])]
        return items if text[0] == "[" else tuple(items)
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        return text[1:-1]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"true": True, "false": False}.get(text.lower(), None if text == "None" else text)


def _split(text: str) -> list[str]:
    """The parts between the commas that are outside of brackets and quotes."""
    parts, brackets, quote = [""], "", ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (not parts[-1].strip() or parts[-1].rstrip()[-1] in "[(,"):
            quote = character
        elif character in "[(":
            brackets += {"[": "]", "(": ")"}[character]
        elif character in "])":
            if brackets[-1:] != character:
                raise ValueError(f"unexpected {character!r}")
            brackets = brackets[:-1]
        elif character == "," and not brackets:
            parts.append("")
            continue
        parts[-1] += character
    if quote or brackets:
        raise ValueError(f"expected {(quote or brackets)[-1]!r} at the end")
    return parts
