"""Builds fusedopt._C by csrc/build.py, which lists the environment variables that choose how."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

BUILD = runpy.run_path(str(Path(__file__).resolve().parent / "csrc" / "build.py"))["build"]


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        BUILD(Path(self.get_ext_fullpath(ext.name)).resolve().parent, Path(self.build_temp))


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
