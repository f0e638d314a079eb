"""What the build looks for: torch, a CUDA toolkit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

import find_tools  # noqa: E402

# ---- torch ----------------------------------------------------------------------------------------------------------


def make_torch(site, version, headers=True):
    folder = site / "torch"
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    if headers:
        (folder / "include/torch/csrc/stable/library.h").touch()
    return folder


def test_find_torch_takes_the_first_usable_one(tmp_path):
    make_torch(tmp_path / "old", "2.9.1")
    make_torch(tmp_path / "bare", "2.13.0", headers=False)
    good = make_torch(tmp_path / "good", "2.10.0+cpu")
    make_torch(tmp_path / "later", "2.15.0")
    path = [str(tmp_path / name) for name in ("empty", "old", "bare", "good", "later")]
    assert find_tools.find_torch(path, env={}) == find_tools.Torch(good, "2.10.0+cpu")


def test_find_torch_looks_out_of_build_isolation():
    """Without site-packages on its path, as in pip's build isolation, the build finds the torch of this interpreter."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / '_build')!r}); import find_tools; print(find_tools.find_torch())"
    )
    found = subprocess.run([sys.executable, "-S", "-c", code], cwd="/", capture_output=True, text=True).stdout
    assert repr(find_tools.find_torch().folder) in found


@pytest.mark.parametrize("place", ["PATH", "PWD", "CONDA_PREFIX"])
def test_find_torch_in_the_environment_that_uv_hides(tmp_path, monkeypatch, place):
    """uv points VIRTUAL_ENV, the interpreter and the first entry of PATH at an environment made for the build."""
    monkeypatch.setattr(find_tools, "_torch_seen_by", lambda python: None)
    callers = tmp_path / "project/.venv"
    torch = make_torch(callers / "lib/python3.11/site-packages", "2.12.1")
    env = {"VIRTUAL_ENV": str(tmp_path / "builds-v0"), "PATH": str(tmp_path / "builds-v0/bin")}
    assert find_tools.find_torch([], env) is None
    callers_own = {
        "PATH": os.pathsep.join([env["PATH"], str(callers / "bin"), "/usr/bin"]),
        "PWD": str(callers.parent / "src"),
        "CONDA_PREFIX": str(callers),
    }
    assert find_tools.find_torch([], {**env, place: callers_own[place]}) == find_tools.Torch(torch, "2.12.1")


def test_backend_asks_for_torch_only_if_there_is_none(monkeypatch, capfd):
    backend = pytest.importorskip("ppo_build", reason="setuptools is not installed here")
    monkeypatch.delenv("PPO_EXT_BUILD_TORCH", raising=False)
    assert backend.torch_requirement() == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "find_cxx", lambda: ["g++"])
    capfd.readouterr()
    assert backend.torch_requirement() == ["torch>=2.10"]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "--no-build-isolation" in said
    monkeypatch.setattr(backend, "find_cxx", lambda: None)
    assert backend.torch_requirement() == [], "without a compiler nothing needs torch's headers"
    monkeypatch.setenv("PPO_EXT_BUILD_TORCH", "torch==2.11.0")
    assert backend.torch_requirement() == ["torch==2.11.0"]


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def make_toolkit(root, release="13.0", lack=()):
    files = {
        "nvcc": "bin/nvcc",
        "header": "include/cuda_runtime.h",
        "cccl": "include/nv/target",
        "runtime": "lib64/libcudart_static.a",
    }
    for name, file in files.items():
        if name not in lack:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
            (root / file).chmod(0o755)
    return root


def test_find_cuda_is_not_fooled_by_a_wrapper(tmp_path):
    """nvcc on $PATH may be a script in a folder without a toolkit."""
    wrapper = make_toolkit(tmp_path / "local", lack=("header", "cccl", "runtime"))
    half = make_toolkit(tmp_path / "half", lack=("runtime",))
    good = make_toolkit(tmp_path / "cuda", "12.8")
    cuda, rejected = find_tools.find_cuda({}, [wrapper, half, good])
    assert (cuda.nvcc, cuda.library, cuda.version) == (good / "bin/nvcc", good / "lib64", "12.8")
    assert rejected == [
        f"{wrapper} lacks include/cuda_runtime.h, include/nv/target, lib64/libcudart_static.a",
        f"{half} lacks lib64/libcudart_static.a",
    ]


def test_find_cuda_says_what_each_place_lacks(tmp_path):
    cuda, rejected = find_tools.find_cuda({}, [tmp_path / "none"])
    assert cuda is None
    assert rejected == [
        f"{tmp_path / 'none'} lacks bin/nvcc, include/cuda_runtime.h, include/nv/target, lib64/libcudart_static.a"
    ]


@pytest.mark.parametrize("beside", ["torch", "interpreter"])
def test_find_cuda_in_the_packages_of_pip(tmp_path, monkeypatch, beside):
    """pip installs nvcc into nvidia/cu13 with the runtime in lib, beside torch or in this interpreter's folder."""
    folders = {name: tmp_path / name for name in ("torch", "interpreter")}
    torch = find_tools.Torch(make_torch(folders["torch"], "2.13.0"), "2.13.0")
    monkeypatch.setattr(find_tools, "find_torch", lambda env: torch)
    monkeypatch.setattr(find_tools.sysconfig, "get_path", lambda name: str(folders["interpreter"]))
    root = make_toolkit(folders[beside] / "nvidia/cu13")
    (root / "lib64").rename(root / "lib")
    of_pip = [root for root in find_tools.cuda_roots({"PATH": ""}) if tmp_path in root.parents]
    cuda, _ = find_tools.find_cuda({}, of_pip)
    assert cuda == find_tools.Cuda(root / "bin/nvcc", root / "include", root / "lib", "13.0")


def test_find_cuda_misses_the_headers_that_nvcc_does_not_bring(tmp_path):
    """The package nvidia-cuda-nvcc does not depend on nvidia-cuda-cccl, without which no kernel compiles."""
    cuda, rejected = find_tools.find_cuda({}, [make_toolkit(tmp_path / "nvidia/cu13", lack=("cccl",))])
    assert cuda is None and rejected == [f"{tmp_path / 'nvidia/cu13'} lacks include/nv/target"]


def test_cuda_home_comes_first(tmp_path):
    nvcc = make_toolkit(tmp_path / "onpath") / "bin"
    env = {"CUDA_HOME": str(tmp_path / "home"), "CUDA_PATH": str(tmp_path / "path"), "PATH": str(nvcc)}
    roots = list(find_tools.cuda_roots(env))
    assert roots[:2] == [tmp_path / "home", tmp_path / "path"]
    assert roots.index(Path("/usr/local/cuda")) < roots.index(tmp_path / "onpath")
