"""Importing this prepares the framework that reads a config, so that one file serves several.

Where MMEngine is loaded, which then is what reads it, fusedopt's names are registered there, as by
:mod:`fusedopt.integrations.mmengine`. fusedopt's own engine needs nothing.
"""

import sys

if "mmengine" in sys.modules:
    from . import mmengine  # noqa: F401
