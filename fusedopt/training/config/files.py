"""Config files: Python, JSON and YAML, and the files that they inherit."""

from __future__ import annotations

import ast
import json
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ...messages import require
from ..errors import ConfigError
from .dicts import ConfigDict
from .merging import merged
from .naming import config_error

__all__ = ["NO_SETTING", "load"]

_BASE = "_base_"
#: Types that a config file may import or define for its own use; such names are not part of the config.
NO_SETTING = (ModuleType, FunctionType, BuiltinFunctionType, type)
#: MMEngine's notation for an inherited value.
_BASE_VALUE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")


def load(path: Path, children: Sequence[Path]) -> dict[str, Any]:
    """A file's settings merged into what it inherits. ``children`` are the files that led here, first one first."""
    resolved = path.resolve()
    if resolved in [child.resolve() for child in children]:
        chain = " -> ".join(map(str, (*children, path)))
        raise config_error(children[0], _BASE, f"the file inherits from itself: {chain}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        if children:
            raise config_error(children[-1], _BASE, f"cannot read {path}: {reason}") from error
        raise config_error(path, "", f"cannot read the config file: {reason}") from error
    text = _with_file_names(text, path)
    if path.suffix == ".py":
        tree = _parse(text, path)
        names = _base_names(tree, path)
    elif path.suffix in (".json", ".yaml", ".yml"):
        own = _parse_data(text, path)
        names = own.pop(_BASE, [])
    else:
        raise config_error(path, "", f"unknown suffix {path.suffix!r}; expected .py, .json, .yaml or .yml")
    bases = ConfigDict()
    for base in _base_paths(names, path):
        inherited = load(base, (*children, path))
        twice = [key for key in inherited if key in bases]
        if twice:
            raise config_error(path, twice[0], f"Duplicate key: {base} sets it, and so does another file of {_BASE}")
        bases |= inherited
    own = _run(tree, path, bases) if path.suffix == ".py" else _with_base_values(own, bases, path)
    return merged(bases, own, "", path)


def _with_file_names(text: str, path: Path) -> str:
    names = {
        "fileDirname": str(path.absolute().parent),
        "fileBasename": path.name,
        "fileBasenameNoExtension": path.stem,
        "fileExtname": path.suffix,
    }
    return re.sub(rf"\{{\{{\s*({'|'.join(names)})\s*\}}\}}", lambda match: names[match[1]], text)


class _BaseValues(ast.NodeTransformer):
    """Turns ``{{_base_.key}}``, to Python a set in a set, or the same in quotes, into ``_base_.key``."""

    def __init__(self, path: Path):
        self.path = path

    def visit_Set(self, node: ast.Set) -> ast.AST:
        inner = node.elts[0]
        if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
            named = root = inner.elts[0]
            while isinstance(root, ast.Attribute):
                root = root.value
            if named is not root and isinstance(root, ast.Name) and root.id == _BASE:
                return named
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        named = _BASE_VALUE.search(node.value) if isinstance(node.value, str) else None
        if named is None:
            return node
        if named[0] != node.value:
            raise ConfigError(
                f"{self.path}:{node.lineno}: {{{{_base_. ...}}}} must be a whole value, not part of a string; in a "
                "string write f'... {_base_. ...}'"
            )
        expression = ast.parse(f"_base_.{named[1]}", str(self.path), "eval").body
        return ast.fix_missing_locations(ast.copy_location(expression, node))


def _parse(text: str, path: Path) -> ast.Module:
    try:
        return _BaseValues(path).visit(ast.parse(text, str(path)))
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        if isinstance(error, ConfigError):
            raise
        raise _syntax_error(path, error) from error


def _syntax_error(path: Path, error: Exception) -> ConfigError:
    line = getattr(error, "lineno", None) or 1
    return ConfigError(f"{path}:{line}: syntax error: {getattr(error, 'msg', error)}")


def _sets_base(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == _BASE for to in node.targets)


def _base_names(tree: ast.Module, path: Path) -> Any:
    """The value of ``_base_`` in a Python file; its assignment is removed from ``tree``."""
    found = [node for node in tree.body if _sets_base(node)]
    tree.body = [node for node in tree.body if node not in found]
    try:
        return ast.literal_eval(found[-1].value) if found else []  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        line = found[-1].lineno
        raise ConfigError(f"{path}:{line}: {_BASE} must be a literal string or list of strings") from error


def _base_paths(names: Any, path: Path) -> list[Path]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise config_error(path, _BASE, f"expected a file name or a list of them, got {names!r}")
    bases = [Path(os.path.normpath(path.parent / name)) for name in names]
    for base in bases:
        if base.suffix == ".py" and path.suffix != ".py":
            raise config_error(path, _BASE, f"a {path.suffix} file runs no code, so it cannot inherit from {base}")
    return bases


def _run(tree: ast.Module, path: Path, bases: ConfigDict) -> dict[str, Any]:
    """Run a Python config file; return its settings."""
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem, _BASE: bases}
    try:
        code = compile(tree, str(path), "exec", dont_inherit=True)
    except SyntaxError as error:  # such as a `return`, which only compile() rejects
        raise _syntax_error(path, error) from error
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else 1
        raise config_error(f"{path}:{line}", type(error).__name__, str(error)) from error
    if namespace[_BASE] is not bases:
        raise config_error(path, _BASE, "must be set on its own line, outside any block")
    return {
        key: value for key, value in namespace.items() if not key.startswith("_") and not isinstance(value, NO_SETTING)
    }


#: A string in double quotes, or a base value, in single quotes or none.
_STRING_OR_BASE_VALUE = re.compile(r"""("(?:[^"\\\n]|\\.)*")|('?)(\{\{\s*_base_\.[\w.]+\s*\}\})\2""")


def _parse_data(text: str, path: Path) -> dict[str, Any]:
    """The content of a JSON or YAML file."""
    yaml = None if path.suffix == ".json" else require("yaml", "engine")
    # Placeholders for base values become strings, which are replaced after parsing.
    text = _STRING_OR_BASE_VALUE.sub(lambda match: match[1] or f'"{match[3]}"', text)
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
        raise config_error(path, "", f"a config is a mapping of keys to values, got {type(data).__name__}")
    return data


def _with_base_values(value: Any, bases: ConfigDict, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _with_base_values(item, bases, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_base_values(item, bases, path) for item in value]
    named = _BASE_VALUE.search(value) if isinstance(value, str) else None
    if named is None:
        return value
    name = named[1]
    if named[0] != value:
        raise config_error(path, f"{{{{_base_.{name}}}}}", "must be a whole value, not part of a string")
    found: Any = bases
    for key in name.split("."):
        if not isinstance(found, ConfigDict) or key not in found:
            raise config_error(path, f"{{{{_base_.{name}}}}}", f"the inherited files have no {key!r}")
        found = found[key]
    return found
