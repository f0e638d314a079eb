"""The native part of the build; everything declarative is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))

from build_options import BuildError, Options  # noqa: E402
from native_build import NativeBuild  # noqa: E402


class BuildNative(build_ext):
    """Compiles csrc; the libraries are loaded by torch, not imported, so there is no Python extension module."""

    def finalize_options(self):
        super().finalize_options()
        self.target = ROOT / "ppo_ext" if self.inplace or self.editable_mode else Path(self.build_lib, "ppo_ext")

    def run(self):
        try:
            NativeBuild(ROOT, Options.from_env()).run(self.target, self.distribution.get_version())
        except BuildError as error:
            raise SystemExit(f"ppo_ext build: ERROR: {error}") from None

    def get_outputs(self):
        return [str(file) for pattern in ("_C_*.so", "_build_info.json") for file in self.target.glob(pattern)]

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class NativeDistribution(Distribution):
    has_libraries = True  # until the build has found nothing to compile them with

    def has_ext_modules(self):
        return self.has_libraries  # runs build_ext and makes the wheel a platform wheel


class AnyPythonWheel(bdist_wheel):
    def run(self):
        self.run_command("build")
        self.skip_build = True
        built = Path(self.get_finalized_command("build").build_lib, "ppo_ext").glob("_C_*.so")
        self.distribution.has_libraries = any(built)
        self.root_is_pure = not self.distribution.has_libraries
        super().run()

    def get_tag(self):
        # no Python symbol is used: one wheel for every Python, and without libraries for every machine
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


setup(distclass=NativeDistribution, cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
