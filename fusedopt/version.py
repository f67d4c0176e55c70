"""The version of fusedopt, apart from the package so that a build can read it without importing torch."""

__version__ = "0.1.0"
