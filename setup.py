"""Builds fusedopt._C by csrc/build.py, which lists the environment variables that choose how."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from prerequisites import setuptools_is_new

setuptools_is_new()

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

from build import build  # noqa: E402


class CMakeBuild(build_ext):
    """build_ext that hands the one extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("FUSEDOPT_TORCHES") and (self.inplace or self.editable_mode):
            raise SystemExit("FUSEDOPT_TORCHES is for wheels; build in place for the one torch that is installed")
        build(Path(self.get_ext_fullpath(ext.name)).resolve().parent, Path(self.build_temp))


setup(ext_modules=[Extension("fusedopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
