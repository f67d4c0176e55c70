"""Importing this prepares the framework that reads a config, so that one config file works with several.

If MMEngine is loaded, it is the framework, and fusedopt's names are registered there, as by
:mod:`fusedopt.integrations.mmengine`. fusedopt's own engine needs no preparation.
"""

import sys

if "mmengine" in sys.modules:
    from . import mmengine  # noqa: F401
