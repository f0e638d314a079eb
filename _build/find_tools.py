"""Find what the build needs: torch, a C++ compiler, a CUDA toolkit, ninja. Imports no torch, only looks at files."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the stable ABI that csrc is written against


@dataclass(frozen=True)
class Torch:
    folder: Path
    version: str


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    include: Path
    library: Path
    version: str


def run_text(command: list[str], **kwargs) -> str:
    """Standard output of `command`, or "" if it cannot run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, **kwargs).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- torch ----------------------------------------------------------------------------------------------------------


def find_torch(path: Iterable[str] | None = None, env: Mapping[str, str] = os.environ) -> Torch | None:
    """The first usable torch on `path` (default sys.path), then in the caller's environment, else None.

    The stable ABI makes the built library independent of which torch this is, so any that the caller has will do.
    """
    for folder in _torch_folders(sys.path if path is None else path, env):
        torch = read_torch(folder)
        if torch is not None:
            return torch
    return None


def read_torch(folder: Path) -> Torch | None:
    """The torch installed in `folder` if it is new enough and carries the stable headers, else None."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", text, re.MULTILINE)
    if match is None or (int(match[2]), int(match[3])) < OLDEST_TORCH:
        return None
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return None
    return Torch(folder, match[1])


def _torch_folders(path: Iterable[str], env: Mapping[str, str]) -> Iterator[Path]:
    for entry in path:
        yield Path(entry or ".") / "torch"
    folder = _torch_seen_by(sys.executable)
    if folder is not None:
        yield folder
    for environment in dict.fromkeys(_callers_environments(env)):
        yield from sorted(environment.glob("lib*/python3*/*-packages/torch"), reverse=True)


def _torch_seen_by(python: str) -> Path | None:
    """pip's build isolation only edits sys.path: its interpreter, asked again without, sees its own packages."""
    # -E ignores the PYTHONPATH and PYTHONNOUSERSITE of pip's isolation; "/" keeps the source tree off the path
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    origin = run_text([python, "-E", "-c", code], cwd=os.sep).strip()
    return Path(origin).parent if origin else None


def _callers_environments(env: Mapping[str, str]) -> Iterator[Path]:
    """Environments that the caller may install into.

    uv builds in an environment of its own and points VIRTUAL_ENV at that. What it leaves of the caller's is an activated
    environment's entry in PATH, and in PWD the folder where uv was started and looked for `.venv`, there and above.
    """
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if env.get(name):
            yield Path(env[name])
    for entry in filter(None, env.get("PATH", "").split(os.pathsep)):
        yield Path(entry).parent
    if env.get("PWD"):
        here = Path(env["PWD"])
        yield from (folder / ".venv" for folder in (here, *here.parents))
    yield Path(sys.base_prefix)


# ---- compiler and ninja ---------------------------------------------------------------------------------------------


def find_cxx(env: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler command: $CXX as it stands, else g++, else c++; None if there is none."""
    if env.get("CXX", "").strip():
        return shlex.split(env["CXX"])
    found = shutil.which("g++", path=env.get("PATH")) or shutil.which("c++", path=env.get("PATH"))
    return [found] if found else None


def find_ninja(env: Mapping[str, str] = os.environ) -> str | None:
    """ninja of the `ninja` package, beside the interpreter, or on $PATH; None if there is none.

    The package comes first, as pip's isolated build has it too: another version of ninja would build all over again.
    """
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    folders = [BIN_DIR, str(Path(sys.executable).parent), env.get("PATH", os.defpath)]
    return shutil.which("ninja", path=os.pathsep.join(filter(None, folders)))


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def find_cuda(
    env: Mapping[str, str] = os.environ, roots: Iterable[Path] | None = None
) -> tuple[Cuda | None, list[str]]:
    """The first complete CUDA toolkit, and one line per rejected place saying what it lacks.

    A place counts only with nvcc, the headers and the static runtime together: an nvcc on $PATH may be a wrapper
    script far from its toolkit, and of pip's packages some may be missing; the build would then fail late.
    """
    rejected = []
    for root in cuda_roots(env) if roots is None else roots:
        found = _toolkit_at(Path(root))
        if isinstance(found, Cuda):
            return found, rejected
        if found not in rejected:
            rejected.append(found)
    return None, rejected


def cuda_roots(env: Mapping[str, str]) -> Iterator[Path]:
    """Where a toolkit may be: the user's word first, then the usual places, then pip's nvidia packages."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name):
            yield Path(env[name])
    yield Path("/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    if nvcc:
        yield Path(os.path.realpath(nvcc)).parent.parent
    if env.get("CONDA_PREFIX"):
        yield Path(env["CONDA_PREFIX"])
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    torch = find_torch(env=env)
    packages = [torch.folder.parent] if torch else []
    for folder in dict.fromkeys([*packages, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))]):
        yield from sorted(folder.glob("nvidia/cu[0-9]*"), reverse=True)


def _toolkit_at(root: Path) -> Cuda | str:
    machine = platform.machine()
    target = f"targets/{'sbsa' if machine == 'aarch64' else machine}-linux"
    nvcc = root / "bin/nvcc"
    include = _first(root, ("include", f"{target}/include"), "cuda_runtime.h")
    cccl = _first(root, ("include", "include/cccl", f"{target}/include", f"{target}/include/cccl"), "nv/target")
    library = _first(root, ("lib64", f"{target}/lib", "lib", f"lib/{machine}-linux-gnu"), "libcudart_static.a")
    parts = {
        "bin/nvcc": nvcc.exists(),
        "include/cuda_runtime.h": include,
        "include/nv/target": cccl,
        "lib64/libcudart_static.a": library,
    }
    missing = [name for name, found in parts.items() if not found]
    if include is None or library is None or missing:
        return f"{root} lacks {', '.join(missing)}"
    release = re.search(r"release (\d+\.\d+)", run_text([str(nvcc), "--version"]))
    if release is None:
        return f"{nvcc} does not run"
    return Cuda(nvcc, include, library, release[1])


def _first(root: Path, folders: tuple[str, ...], name: str) -> Path | None:
    return next((root / folder for folder in folders if (root / folder / name).exists()), None)
