"""What pip calls: setuptools' own hooks, where setuptools is there and new enough to read this tree."""

from prerequisites import setuptools_is_new

setuptools_is_new()

from setuptools.build_meta import *  # noqa: E402, F403
