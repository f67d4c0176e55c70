"""A compact training engine: configs, hooks and a Runner."""

from .config import Config, ConfigDict, ConfigError, parse_options

__all__ = ["Config", "ConfigDict", "ConfigError", "parse_options"]
