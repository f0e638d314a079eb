"""The build: what its options mean, which failures stop it, and when it compiles again."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

import compile_library  # noqa: E402
import cuda_archs  # noqa: E402
import find_tools  # noqa: E402
import native_build  # noqa: E402
from build_options import BuildError, NotWanted, Options  # noqa: E402

# ---- the build's options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("PPO_EXT_CUDA", "yes", "PPO_EXT_CUDA must be one of auto 0 1, got yes"),
        ("PPO_EXT_REQUIRE_NATIVE", "true", "PPO_EXT_REQUIRE_NATIVE must be one of auto 0 1, got true"),
        ("PPO_EXT_DEBUG", "2", "PPO_EXT_DEBUG must be one of 0 1, got 2"),
        ("PPO_EXT_MANYLINUX", "2_28", "PPO_EXT_MANYLINUX must be one of 0 1, got 2_28"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got 0"),
    ],
)
def test_rejects_options(name, value, text):
    with pytest.raises(BuildError, match=re.escape(text)):
        Options.from_env({name: value})


def test_empty_options_are_the_defaults():
    assert Options.from_env({"PPO_EXT_CUDA": "", "MAX_JOBS": ""}) == Options()


def test_default_archs_are_those_that_nvcc_knows():
    assert cuda_archs.resolve_archs("", {"7.5", "8.0", "9.0", "10.0", "12.0", "12.1"}) == (
        ["8.0", "9.0", "10.0", "12.0"],
        ["9.0", "12.0"],
    )
    assert cuda_archs.resolve_archs("", {"7.5", "8.0", "8.6"}) == (["8.0"], ["8.0"])


def test_arch_list_is_honoured():
    known = {"7.5", "8.0", "9.0"}
    assert cuda_archs.resolve_archs("7.5 8.0;9.0a+PTX", known) == (["7.5", "8.0", "9.0a"], ["9.0a"])
    assert cuda_archs.gencode_flags(["8.0"], ["9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=compute_90a",
    ]


@pytest.mark.parametrize(
    "archs, text",
    [
        ("Hopper", "each entry must be like 9.0 or 9.0+PTX, got Hopper"),
        ("12.0", "each entry must be one this nvcc knows (8.0 9.0), got 12.0"),
    ],
)
def test_rejects_arch_list(archs, text):
    with pytest.raises(BuildError, match=re.escape(text)):
        cuda_archs.resolve_archs(archs, {"9.0", "8.0"})


def sample_library(folder, text="int answer() { return 42; }\n"):
    (folder / "answer_cpu.cpp").write_text(text)
    cxx = find_tools.find_cxx() or pytest.skip("no C++ compiler here")
    compile = [*cxx, "-fPIC"]
    source = compile_library.Source(folder / "answer_cpu.cpp")
    return compile_library.Library("answer.so", [source], compile, [*cxx, "-shared"], [])


def test_compile_again_only_after_a_change(tmp_path):
    folder = tmp_path / "with a blank"
    folder.mkdir()
    (folder / "value.h").write_text("#define VALUE 42\n")
    sample = sample_library(folder, '#include "value.h"\nint answer() { return VALUE; }\n')
    if find_tools.find_ninja() is None:
        pytest.skip("no ninja here")
    built = compile_library.compile_library(sample, folder / "build")
    first = built.stat().st_mtime_ns
    assert compile_library.compile_library(sample, folder / "build").stat().st_mtime_ns == first
    (folder / "value.h").write_text("#define VALUE 43\n")
    assert compile_library.compile_library(sample, folder / "build").stat().st_mtime_ns > first


def test_builds_without_ninja(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_library, "find_ninja", lambda: None)
    assert compile_library.compile_library(sample_library(tmp_path), tmp_path / "build").exists()


# ---- what stops a build, and what it does without --------------------------------------------------------------------


def build(folder, **options):
    """Runs the build into `folder` and returns what it wrote about itself."""
    native_build.NativeBuild(ROOT, Options(**{"cuda": "0", **options})).run(folder, "0.1.0")
    return json.loads((folder / "_build_info.json").read_text())


@pytest.fixture
def broken_sources(monkeypatch):
    def fail(library, *_):
        raise BuildError(f"compiling {library.name} failed")

    find_tools.find_cxx() or pytest.skip("no C++ compiler here")
    monkeypatch.setattr(native_build, "compile_library", fail)


def test_no_compiler_leaves_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "find_cxx", lambda: None)
    info = build(tmp_path)
    assert info["cpu"].startswith("not built: no C++ compiler found; install g++")
    assert info["cuda"] == "not built: PPO_EXT_CUDA=0"
    with pytest.raises(BuildError, match="no C.. compiler found"):
        build(tmp_path, require_native="1")


def test_a_failing_compile_stops_the_build(tmp_path, broken_sources):
    with pytest.raises(BuildError, match="compiling _C_cpu.so failed. PPO_EXT_REQUIRE_NATIVE=0 installs"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_compile_may_be_allowed(tmp_path, broken_sources, capfd):
    (tmp_path / "_C_cpu.so").write_bytes(b"of an earlier build")
    assert build(tmp_path, require_native="0")["cpu"] == "not built: compiling _C_cpu.so failed"
    assert "WARNING: without it ppo_ext runs its slow reference" in capfd.readouterr().err
    assert not (tmp_path / "_C_cpu.so").exists()


def test_failing_cuda_kernels_stop_the_build(tmp_path, monkeypatch):
    def nvcc_fails(library, folder, jobs):
        if library.name == "_C_cuda.so":
            raise BuildError("compiling _C_cuda.so failed")
        (tmp_path / "built").touch()
        return tmp_path / "built"

    find_tools.find_cxx() or pytest.skip("no C++ compiler here")
    cuda = find_tools.Cuda(tmp_path / "nvcc", tmp_path, tmp_path, "13.0")
    monkeypatch.setattr(native_build, "find_cuda", lambda: (cuda, []))
    monkeypatch.setattr(native_build, "known_archs", lambda cuda: {"8.0", "9.0"})
    monkeypatch.setattr(native_build, "compile_library", nvcc_fails)
    with pytest.raises(BuildError, match="compiling _C_cuda.so failed. PPO_EXT_CUDA=0 builds without the CUDA kernels"):
        build(tmp_path, cuda="auto")
    info = build(tmp_path, cuda="auto", require_native="0")
    assert (info["cpu"], info["cuda"]) == ("built", "not built: compiling _C_cuda.so failed")
    with pytest.raises(BuildError, match="compiling _C_cuda.so failed"):
        build(tmp_path, cuda="1", require_native="0")


@pytest.mark.parametrize("cxx", ["no-such-c++", "ccache no-such-c++", "false"])
def test_a_compiler_that_does_not_run_is_named(tmp_path, monkeypatch, cxx):
    """It must not be exchanged for another compiler that happens to be there."""
    monkeypatch.setenv("CXX", cxx)
    assert find_tools.find_cxx() == shlex.split(cxx)
    with pytest.raises(BuildError, match=re.escape(f"CXX must be a C++ compiler that runs, got {cxx}")):
        build(tmp_path)


def test_missing_cuda_is_an_error_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "find_cuda", lambda: (None, ["/usr/local/cuda lacks bin/nvcc"]))
    with pytest.raises(NotWanted, match="/usr/local/cuda lacks bin/nvcc"):
        native_build.NativeBuild(ROOT, Options(require_native="1")).cuda_library()
    with pytest.raises(BuildError, match="set CUDA_HOME to one"):
        native_build.NativeBuild(ROOT, Options(cuda="1")).cuda_library()


def test_target_macro():
    assert native_build.target_macro("2.10") == "0x020a000000000000"
