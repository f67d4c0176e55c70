"""Configs: Python, JSON and YAML files, their inheritance, and command-line options."""

from ..errors import ConfigError
from .config import Config
from .dicts import ConfigDict
from .naming import naming
from .options import parse_options

__all__ = ["Config", "ConfigDict", "ConfigError", "naming", "parse_options"]
