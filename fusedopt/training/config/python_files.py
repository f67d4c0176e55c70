"""Config files in Python."""

from __future__ import annotations

import ast
import traceback
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from ..errors import ConfigError
from .dicts import ConfigDict
from .naming import config_error
from .placeholders import BASE_VALUE, FileNames

__all__ = ["BASE", "NO_SETTING", "PythonFile"]

BASE = "_base_"
#: Types that a config file may import or define for its own use; such names are not part of the config.
NO_SETTING = (ModuleType, FunctionType, BuiltinFunctionType, type)


class PythonFile:
    """A config file in Python, parsed.

    Args:
        text: its content.
        path: the file.

    Raises:
        ConfigError: a syntax error.
    """

    def __init__(self, text: str, path: Path):
        self.path = path
        self.names = FileNames(text, path)
        try:
            self._tree = ast.parse(self.names.text, str(path))
            _replace(self._tree, self._without_placeholder)
            self._refuse_lazy()
        except ConfigError:
            raise
        except (SyntaxError, ValueError) as error:  # ValueError: a null byte
            raise self._syntax_error(error) from error

    def _refuse_lazy(self) -> None:
        for node in ast.walk(self._tree):
            for item in node.items if isinstance(node, ast.With) else ():
                called = getattr(item.context_expr, "func", None)
                if "read_base" in (getattr(called, "id", None), getattr(called, "attr", None)):
                    raise ConfigError(
                        f"{self.path}:{item.context_expr.lineno}: `with read_base():` is how MMEngine's lazy configs "
                        f"inherit, which is not supported; expected {BASE} = [...]"
                    )

    def _syntax_error(self, error: Exception) -> ConfigError:
        line = getattr(error, "lineno", None) or 1
        return ConfigError(f"{self.path}:{line}: syntax error: {getattr(error, 'msg', error)}")

    def _without_placeholder(self, node: ast.AST) -> ast.AST:
        """``node``, or what it stands for."""
        if isinstance(node, ast.Set):
            return _base_value_in_sets(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self._string(node, node.value)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and self.names.fill(node.id) != node.id:
            filled: ast.AST = ast.Constant(self.names.fill(node.id))
            return ast.copy_location(filled, node)
        texts = [value.decode("latin-1") if isinstance(value, bytes) else value for value in vars(node).values()]
        if any(isinstance(text, str) and self.names.occur_in(text) for text in texts):
            line = getattr(node, "lineno", 1)
            raise ConfigError(f"{self.path}:{line}: the placeholder of a file name must be in a string")
        return node

    def _string(self, node: ast.Constant, text: str) -> ast.AST:
        named = BASE_VALUE.search(text)
        if named is None:
            node.value = self.names.fill(text)
            return node
        if named[0] != text:
            raise ConfigError(
                f"{self.path}:{node.lineno}: {{{{_base_. ...}}}} must be a whole value, not part of a string; in a "
                "string write f'... {_base_. ...}'"
            )
        expression = ast.parse(f"_base_.{named[1]}", str(self.path), "eval").body
        return ast.fix_missing_locations(ast.copy_location(expression, node))

    def take_bases(self) -> Any:
        """The value of ``_base_``; its assignment is not run."""
        found = [node for node in self._tree.body if _sets_base(node)]
        self._tree.body = [node for node in self._tree.body if node not in found]
        try:
            return ast.literal_eval(found[-1].value) if found else []  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            line = found[-1].lineno
            raise ConfigError(f"{self.path}:{line}: {BASE} must be a literal string or list of strings") from error

    def settings(self, bases: ConfigDict) -> dict[str, Any]:
        """Run the file; return its settings."""
        path = str(self.path)
        namespace: dict[str, Any] = {"__file__": path, "__name__": self.path.stem, BASE: bases}
        try:
            code = compile(self._tree, path, "exec", dont_inherit=True)
        except SyntaxError as error:  # such as a `return`, which only compile() rejects
            raise self._syntax_error(error) from error
        try:
            exec(code, namespace)
        except (Exception, SystemExit) as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            line = lines[-1] if lines else 1
            reason = " ".join(str(error).split())
            raise config_error(f"{path}:{line}", type(error).__name__, reason) from error
        if namespace[BASE] is not bases:
            raise config_error(self.path, BASE, "must be set on its own line, outside any block")
        return {
            key: value
            for key, value in namespace.items()
            if not key.startswith("_")
            and not isinstance(value, NO_SETTING)
            and type(value).__module__ not in ("typing", "__future__")
        }


def _replace(tree: ast.AST, replacement: Callable[[ast.AST], ast.AST]) -> None:
    """Replace every node below ``tree``, without the recursion of ``ast.NodeTransformer``."""
    pending = [tree]
    while pending:
        node = pending.pop()
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                value[:] = [replacement(item) if isinstance(item, ast.AST) else item for item in value]
                pending += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST):
                setattr(node, field, replacement(value))
                pending.append(getattr(node, field))


def _base_value_in_sets(node: ast.Set) -> ast.AST:
    """``{{_base_.key}}`` outside quotes is to Python a set in a set; it stands for ``_base_.key``."""
    inner = node.elts[0]
    if len(node.elts) == 1 and isinstance(inner, ast.Set) and len(inner.elts) == 1:
        named = root = inner.elts[0]
        while isinstance(root, ast.Attribute):
            root = root.value
        if named is not root and isinstance(root, ast.Name) and root.id == BASE:
            return named
    return node


def _sets_base(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == BASE for to in node.targets)
