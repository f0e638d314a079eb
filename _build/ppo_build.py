"""PEP 517 backend: setuptools, plus one thing. It builds against the torch that is already installed.

A plain `pip install .` isolates the build from the environment. Naming torch in `build-system.requires` would then
download the newest torch, whatever is installed. This backend asks for torch only if the environment has none.
`PPO_EXT_BUILD_TORCH="torch==2.13.0"` makes it fetch exactly that one.
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools
from find_tools import find_cxx, find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

OLDEST_SETUPTOOLS = 77  # reads `license = "Apache-2.0"` in pyproject.toml

if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"ppo_ext: setuptools must be {OLDEST_SETUPTOOLS} or newer, got {setuptools.__version__}; "
        "run: pip install -U setuptools"
    )


def torch_requirement() -> list[str]:
    """What the isolated build has to fetch to get torch's headers; nothing if the caller has them."""
    wanted = os.environ.get("PPO_EXT_BUILD_TORCH", "")
    if wanted:
        return [wanted]
    if find_torch() or find_cxx() is None:
        return []
    print(
        "ppo_ext build: no torch 2.10 or newer is installed, so the build now fetches one for its headers (gigabytes). "
        "If you have one, build against it with --no-build-isolation: needs `pip install setuptools ninja`",
        file=sys.stderr,
        flush=True,
    )
    return ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    forget_earlier_builds()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    forget_earlier_builds()
    return build_meta.build_sdist(sdist_directory, config_settings)


def forget_earlier_builds() -> None:
    """Remove what setuptools would pack again although its source is gone; compiled objects stay."""
    for folder in Path("build").glob("lib*"):
        shutil.rmtree(folder)
    Path("ppo_ext.egg-info/SOURCES.txt").unlink(missing_ok=True)
