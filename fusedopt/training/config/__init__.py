"""Configs: Python, JSON and YAML files, what they inherit, and the options of a command line."""

from ..errors import ConfigError
from .config import Config
from .dicts import ConfigDict
from .naming import naming
from .options import parse_options

__all__ = ["Config", "ConfigDict", "ConfigError", "naming", "parse_options"]
