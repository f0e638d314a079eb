"""The native part of the build; everything declarative is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build"))

from compile_library import BuildError  # noqa: E402
from native_build import NativeBuild, Options  # noqa: E402


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
    def has_ext_modules(self):
        return True  # runs build_ext and makes the wheel a platform wheel


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # no Python symbol is used: one wheel for every Python


setup(distclass=NativeDistribution, cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
