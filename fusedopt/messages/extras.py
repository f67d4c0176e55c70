"""Optional packages, imported when the code that needs them runs."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["MissingExtraError", "require"]

#: Names on the package index that differ from the import names.
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "PyYAML"}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says what to install."""


def require(module: str, extra: str) -> Any:
    """Import and return ``module``, which belongs to the extra called ``extra``.

    Raises:
        MissingExtraError: it is not installed. If an installed package fails to import one of its own dependencies,
            that error passes through unchanged.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        distribution = _DISTRIBUTIONS.get(package, package)
        raise MissingExtraError(
            f"{distribution} is not installed; install it with: pip install 'fusedopt[{extra}]'"
        ) from error
