"""What the checks need from the package index: torch's headers and libraries, and environments with one torch each."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "platforms"
sys.path.insert(0, str(ROOT / "_build"))

from find_tools import read_torch  # noqa: E402

OLDEST = "2.10.0"
# The wheel for macOS has the same headers of the stable ABI as the one for Linux, and is a tenth of its size.
HEADERS = "macosx_14_0_arm64"


def run(command, cwd="/", **variables):
    """Standard output of `command`; what it printed is in the exception if it fails."""
    result = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**without_path(), **variables}, capture_output=True, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return result.stdout


def without_path():
    """The environment of a process that is to find its own packages only."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def pip(python, *arguments):
    """pip with this repository's pins of the packages that are named, and with no other constraints."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "constraints.txt"
    file.write_text(pins(arguments))
    return run([python, "-m", "pip", "--disable-pip-version-check", *arguments], PIP_CONSTRAINT=str(file))


def pins(arguments):
    """Not those of what the named packages depend on: torch 2.12 asks for an older setuptools than newer ones do."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if line.partition("==")[0] in arguments)


def fetch_torch(version, platform=HEADERS, parts=("include/",)):
    """Parts of torch's wheel for some platform, unpacked once."""
    folder = FOLDER / f"torch-{version}-{platform}"
    if read_torch(folder / "torch") is None:
        wheel = download(f"torch=={version}", [f"--platform={platform}"], folder)
        with zipfile.ZipFile(wheel) as archive:
            wanted = ("torch/version.py", *(f"torch/{part}" for part in parts))
            archive.extractall(folder, [name for name in archive.namelist() if name.startswith(wanted)])
        wheel.unlink()
    torch = read_torch(folder / "torch")
    if torch is None:
        raise RuntimeError(f"{folder} holds no torch with the headers of the stable ABI")
    return torch


def download(requirement, platforms, folder):
    """One wheel of the package index, without what it depends on."""
    arguments = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.11", *platforms, "--dest", folder]
    pip(sys.executable, "download", *arguments, requirement)
    (wheel,) = folder.glob("*.whl")
    return wheel


def newest_version():
    """The newest torch that the index has for this interpreter."""
    listed = pip(sys.executable, "index", "versions", "torch")
    return re.search(r"^torch \(([\d.]+)", listed, re.MULTILINE)[1]


def make_environment(version):
    """The python of a virtual environment with one torch and what the op tests need."""
    folder = FOLDER / f"environment-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        run([sys.executable, "-m", "venv", "--clear", folder])
        needs = "numpy", "pytest", "pytest-benchmark", "hypothesis"
        pip(python, "install", "--quiet", "--no-compile", f"torch=={version}", *needs)
        (folder / "complete").touch()
    return python
