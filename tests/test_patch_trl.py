"""`patch_trl` in TRL's releases, each in a process of its own; `make test` has installed them beside the oracle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppo_ext

ROOT = Path(__file__).resolve().parent.parent
RELEASES = Path(sys.prefix) / "share" / "trl"  # filled by the Makefile


def _releases():
    found = sorted(folder.name for folder in RELEASES.glob("*.*.*"))
    return found or [None]


@pytest.mark.parametrize("part", ["functions", "trainers"])
@pytest.mark.parametrize("release", _releases())
def test_in_a_release(release, part):
    if release is None:
        missing = f"no release of TRL in {RELEASES}; `make test` installs them"
        (pytest.fail if os.environ.get("PPO_EXT_REQUIRE_ORACLE") == "1" else pytest.skip)(missing)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/patched_trl/{part}.py"]
    path = os.pathsep.join([str(RELEASES / release), str(ROOT)])
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_without_a_fitting_trl():
    """The environment has TRL 0.11.4, and a Python without any finds none."""
    code = "import ppo_ext; ppo_ext.patch_trl()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "RuntimeError: patch_trl: TRL must be a release from 1.12 on" in run.stderr, run.stderr


def test_without_any_trl(monkeypatch):
    from ppo_ext.integrations import trl

    def none(name):
        raise trl.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(trl.importlib.metadata, "version", none)
    with pytest.raises(ImportError, match="patch_trl: TRL must be installed .*, got none"):
        ppo_ext.patch_trl()
