"""Config files in JSON and YAML."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from ...messages import require
from ..errors import ConfigError
from .dicts import ConfigDict
from .naming import config_error
from .placeholders import BASE_VALUE, FileNames

__all__ = ["DataFile"]

#: A string in double quotes, or a base value, in single quotes or none.
_STRING_OR_BASE_VALUE = re.compile(r"""("(?:[^"\\\n]|\\.)*")|('?)(\{\{\s*_base_\.[\w.]+\s*\}\})\2""")

#: In valid JSON: a string, with the colon if it is a key, or a brace.
_JSON_KEY = re.compile(r'("(?:[^"\\]|\\.)*")(\s*:)?|[{}]')

#: Values that a YAML file may have when its aliases are expanded.
_MOST_VALUES = 1_000_000


class DataFile:
    """A config file in JSON or YAML, parsed.

    Args:
        text: its content.
        path: the file; its suffix says which of the two.

    Raises:
        ConfigError: a syntax error, a key that occurs twice, or aliases that expand to more than a million values.
        MissingExtraError: PyYAML is not installed.
    """

    def __init__(self, text: str, path: Path):
        self.path = path
        self.names = FileNames(text, path)
        # Placeholders for base values become strings, which are replaced after parsing.
        text = _STRING_OR_BASE_VALUE.sub(lambda match: match[1] or f'"{match[3]}"', self.names.text)
        data = self._read_json(text) if path.suffix == ".json" else self._read_yaml(text)
        if not isinstance(data, dict):
            raise config_error(path, "", f"a config is a mapping of keys to values, got {type(data).__name__}")
        self._data = data

    def _error(self, line: int, message: str) -> ConfigError:
        return config_error(f"{self.path}:{line}", "", message)

    def _read_json(self, text: str) -> Any:
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise self._error(error.lineno, f"syntax error: {error.msg}") from error
        except ValueError as error:  # an integer with too many digits
            raise config_error(self.path, "", str(error)) from error
        objects: list[set[str]] = []
        for token in _JSON_KEY.finditer(text):
            if token[0] == "{":
                objects.append(set())
            elif token[0] == "}":
                objects.pop()
            elif token[2]:
                key = json.loads(token[1])
                if key in objects[-1]:
                    raise self._error(text.count("\n", 0, token.start()) + 1, f"the key {key!r} occurs twice")
                objects[-1].add(key)
        return data

    def _read_yaml(self, text: str) -> Any:
        yaml = require("yaml", "engine")

        class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
            def construct_object(self, node: Any, deep: bool = False) -> Any:
                try:
                    return super().construct_object(node, deep)
                except (yaml.YAMLError, RecursionError):
                    raise
                except Exception as error:  # PyYAML's constructors let pass what int() or date() raise
                    reason = f"{reprlib.repr(node.value)} is not a valid {node.tag.rpartition(':')[2]}"
                    if isinstance(error, ValueError):
                        reason += f": {error}"
                    raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error

        loader = None
        try:
            loader = Loader(text)
            root = loader.get_single_node()
            if root is None:
                return None
            self._check_nodes(loader, root, {})
            return loader.construct_document(root)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            reason = getattr(error, "problem", None) or str(error)
            raise self._error(mark.line + 1 if mark else 1, f"syntax error: {' '.join(reason.split())}") from error
        finally:
            if loader is not None:
                loader.dispose()

    def _check_nodes(self, loader: Any, node: Any, sizes: dict[Any, float]) -> float:
        """The number of values below a YAML node, with aliases expanded; checks it, and that no key occurs twice."""
        if node not in sizes:
            sizes[node] = math.inf  # of an alias for a value that holds the alias
            children = []
            if node.id == "mapping":
                keys = set()
                for key, value in node.value:
                    children += [key, value]
                    tag = key.tag.rpartition(":")[2]
                    if key.id != "scalar" or tag == "merge":
                        continue
                    name = key.value if tag == "value" else loader.construct_object(key)  # PyYAML reads = as '='
                    if not isinstance(name, Hashable):  # such as a scalar that is tagged as a set
                        raise self._error(key.start_mark.line + 1, f"a {type(name).__name__} cannot be a key")
                    if name in keys:
                        raise self._error(key.start_mark.line + 1, f"the key {name!r} occurs twice")
                    keys.add(name)
            elif node.id == "sequence":
                children = node.value
            size = 1 + sum(self._check_nodes(loader, child, sizes) for child in children)
            if size > _MOST_VALUES:
                message = f"with aliases expanded, there are more than {_MOST_VALUES} values here"
                raise self._error(node.start_mark.line + 1, message)
            sizes[node] = size
        return sizes[node]

    def take_bases(self) -> Any:
        """The value of ``_base_``, which is removed."""
        return self._filled(self._data.pop("_base_", []), ConfigDict())

    def settings(self, bases: ConfigDict) -> dict[str, Any]:
        """The settings, with inherited values and file names in place of the placeholders."""
        return self._filled(self._data, bases)

    def _filled(self, value: Any, bases: ConfigDict) -> Any:
        if isinstance(value, dict):
            filled: dict[Any, Any] = {}
            for key, item in value.items():
                name = self.names.fill(key) if isinstance(key, str) else key
                if name in filled:
                    raise config_error(self.path, str(name), "the key occurs twice, once as a placeholder")
                filled[name] = self._filled(item, bases)
            return filled
        if isinstance(value, (list, tuple, set)):
            return type(value)(self._filled(item, bases) for item in value)
        if not isinstance(value, str):
            return value
        named = BASE_VALUE.search(value)
        if named is None:
            return self.names.fill(value)
        return self._inherited(named[1], bases, named[0] == value)

    def _inherited(self, name: str, bases: ConfigDict, is_whole: bool) -> Any:
        if not is_whole:
            raise config_error(self.path, f"{{{{_base_.{name}}}}}", "must be a whole value, not part of a string")
        found: Any = bases
        for key in name.split("."):
            if not isinstance(found, ConfigDict) or key not in found:
                raise config_error(self.path, f"{{{{_base_.{name}}}}}", f"the inherited files have no {key!r}")
            found = found[key]
        return found
