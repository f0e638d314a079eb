"""What is installed: the wheel, the libraries' symbols and architectures, how the build finds its tools, what an import
does."""

import ast
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ppo_ext"
sys.path.insert(0, str(ROOT / "_build"))

import compile_library  # noqa: E402
import find_tools  # noqa: E402
import native_build  # noqa: E402
from native_build import BuildError, Options  # noqa: E402

# Only libtorch_cuda exports these. They stay undefined, so that the library can be linked against a torch without CUDA.
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}


def python(*arguments, cwd="/", **variables):
    """Runs this interpreter in a new process, outside the checkout and without its environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PPO_EXT_") and k != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def backend(hook, target):
    """Runs one hook of the build backend on this checkout; returns the file that it made.

    The options are those with which the checkout itself was built, so that no object has to be compiled again.
    """
    facts = PACKAGE / "_build_info.json"
    info = json.loads(facts.read_text()) if facts.exists() else {}
    options = {
        "PPO_EXT_REQUIRE_NATIVE": str(int("-Werror" in info.get("cxx_flags", ""))),
        "PPO_EXT_CUDA": "auto" if info.get("cuda", "built") == "built" else "0",
    }
    code = (
        f"import sys; sys.path.insert(0, '_build'); import ppo_build; print('made', ppo_build.{hook}({str(target)!r}))"
    )
    result = python("-c", code, cwd=ROOT, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return Path(target, re.findall(r"^made (.*)$", result.stdout, re.MULTILINE)[0])


def library(backend):
    path = PACKAGE / f"_C_{backend}.so"
    if not path.exists():
        required = backend == "cpu" and os.environ.get("PPO_EXT_REQUIRE_NATIVE") == "1"
        required |= backend == "cuda" and os.environ.get("PPO_EXT_CUDA") == "1" and any(ROOT.glob("csrc/*_cuda.cu"))
        assert not required, f"{path} must exist here"
        pytest.skip(f"{path.name} is not built here")
    return path


def symbols(path, *flags):
    output = subprocess.run(["nm", "-D", *flags, str(path)], capture_output=True, text=True, check=True).stdout
    return [
        line.split(maxsplit=1)[-1].strip() if line.startswith(" ") else line.split(maxsplit=2)[-1]
        for line in output.splitlines()
    ]


# ---- the libraries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_library_uses_only_the_stable_abi(backend):
    path = library(backend)
    mangled = [name for name in symbols(path) if re.match(r"[A-Za-z] _Z\w*?N?K?(2at|3c10|5torch)\d", name)]
    readable = [name for name in symbols(path, "-C") if re.search(r"\b(at|c10|torch)::", name)]
    assert not mangled and not readable
    assert not [name for name in symbols(path) if re.match(r"\w? ?_?Py[A-Z_]", name)]


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_undefined_symbols_are_allowed(backend):
    names = [name.split(maxsplit=1)[-1] for name in symbols(library(backend), "--undefined-only")]
    standard = re.compile(r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$|_Z(N|NK|T[ISTV]N?)?St")
    weak = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__cxa_finalize"}
    shims = {name for name in names if not standard.match(name) and name not in weak}
    assert not [name for name in shims if not name.startswith(("aoti_torch_", "torch_"))]
    exported = {
        name.split(maxsplit=1)[-1]
        for name in symbols(find_tools.find_torch().folder / "lib/libtorch_cpu.so", "--defined-only")
    }
    assert shims - exported <= (CUDA_SHIMS if backend == "cuda" else set())


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_library_exports_nothing_of_its_own(backend):
    """The library contains a private static CUDA runtime. Its symbols must not be visible beside those of torch's
    runtime."""
    exported = symbols(library(backend), "-C", "--defined-only")
    own = [name for name in exported if not re.search(r"\bstd::|__gnu_cxx|_edata|_end|__bss_start|_fini|_init", name)]
    assert not own


def fat_binaries(path):
    """{(kind, architecture)} of the device code in a library, kind being "sass" or "ptx"."""
    data, found = path.read_bytes(), set()
    for start in (match.start() for match in re.finditer(rb"\x50\xed\x55\xba\x01\x00", data)):
        header_bytes, size = struct.unpack_from("<HQ", data, start + 6)
        position, end = start + header_bytes, start + header_bytes + size
        while position < end:
            kind, _, header_bytes, entry_bytes = struct.unpack_from("<HHIQ", data, position)
            (arch,) = struct.unpack_from("<I", data, position + 28)
            found.add(({1: "ptx", 2: "sass"}[kind], f"{arch // 10}.{arch % 10}"))
            position += header_bytes + entry_bytes
    return found


def test_cuda_library_holds_the_architectures_it_reports():
    path = library("cuda")
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    assert fat_binaries(path) == {("sass", a) for a in info["sass"]} | {("ptx", a) for a in info["ptx"]}
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        assert {"8.0", "9.0"} <= set(info["sass"]) and "9.0" in info["ptx"]


def test_build_info_says_how_it_was_made():
    library("cpu")
    info = json.loads((PACKAGE / "_build_info.json").read_text())
    assert info["cpu"] == "built" and info["torch_target"] == "2.10"
    assert {"version", "git", "date", "torch", "cxx", "cxx_flags", "cuda"} <= set(info)
    for flag in ("-ffast-math", "-march=native"):
        assert flag not in info["cxx_flags"] + info.get("nvcc_flags", "")


# ---- the wheel and the sdist ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return backend("build_wheel", tmp_path_factory.mktemp("wheel"))


def tracked(*folders):
    command = ["git", "-C", str(ROOT), "ls-files", *folders]
    files = subprocess.run(command, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout, so the list of tracked files is unknown")
    return {file for file in files if (ROOT / file).exists()}


@pytest.mark.slow
def test_wheel_fits_every_python(wheel):
    assert re.fullmatch(r"ppo_ext-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    built = {"ppo_ext/_build_info.json"} | {f"ppo_ext/{path.name}" for path in PACKAGE.glob("_C_*.so")}
    assert packed - built <= {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed >= built | tracked("ppo_ext")
    assert not [name for name in packed if not name.startswith("ppo_ext/")]


@pytest.mark.slow
def test_wheel_works_without_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, ppo_ext; x = torch.randn(3, 5); y = ppo_ext.logprobs(x, torch.tensor([0, 4, 2]));"
        "assert torch.allclose(y, x.log_softmax(-1)[[0, 1, 2], [0, 4, 2]]); print(ppo_ext.__file__)"
    )
    result = python("-W", "error", "-c", code, PYTHONPATH=str(tmp_path), PPO_EXT_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path))


@pytest.mark.slow
def test_sdist_holds_every_source(tmp_path):
    with tarfile.open(backend("build_sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "_build", "ppo_ext", "tests", "bench", "docs", "examples", ".github")
    assert names >= tracked(*folders, "setup.py", "Makefile", "constraints.txt", "*.md", "CITATION.cff")
    assert not [name for name in names if name.endswith((".so", "_build_info.json", ".pyc"))]


def test_pre_commit_runs_the_pinned_versions():
    pinned = (ROOT / "constraints.txt").read_text().split()
    used = re.findall(r"[\w-]+==[\w.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(used) >= 3 and set(used) <= set(pinned)


def test_versions_agree():
    import ppo_ext

    assert f'version = "{ppo_ext.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {ppo_ext.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {ppo_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# ---- finding torch and CUDA -----------------------------------------------------------------------------------------


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
    result = python("-S", "-c", code)
    assert repr(find_tools.find_torch().folder) in result.stdout, result.stdout + result.stderr


def test_backend_asks_for_torch_only_if_there_is_none(monkeypatch):
    backend = pytest.importorskip("ppo_build", reason="setuptools is not installed here")
    monkeypatch.delenv("PPO_EXT_BUILD_TORCH", raising=False)
    assert backend.torch_requirement() == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert backend.torch_requirement() == ["torch>=2.10"]
    monkeypatch.setenv("PPO_EXT_BUILD_TORCH", "torch==2.11.0")
    assert backend.torch_requirement() == ["torch==2.11.0"]


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


# ---- the build's options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("PPO_EXT_CUDA", "yes", "PPO_EXT_CUDA must be one of auto 0 1, got yes"),
        ("PPO_EXT_REQUIRE_NATIVE", "true", "PPO_EXT_REQUIRE_NATIVE must be one of 0 1, got true"),
        ("PPO_EXT_DEBUG", "2", "PPO_EXT_DEBUG must be one of 0 1, got 2"),
        ("MAX_JOBS", "0", "MAX_JOBS must be a positive integer, got 0"),
    ],
)
def test_rejects_options(name, value, text):
    with pytest.raises(BuildError, match=re.escape(text)):
        Options.from_env({name: value})


def test_empty_options_are_the_defaults():
    assert Options.from_env({"PPO_EXT_CUDA": "", "MAX_JOBS": ""}) == Options()


def test_default_archs_are_those_that_nvcc_knows():
    assert native_build.resolve_archs("", {"7.5", "8.0", "9.0", "10.0", "12.0", "12.1"}) == (
        ["8.0", "9.0", "10.0", "12.0"],
        ["9.0", "12.0"],
    )
    assert native_build.resolve_archs("", {"7.5", "8.0", "8.6"}) == (["8.0"], ["8.0"])


def test_arch_list_is_honoured():
    known = {"7.5", "8.0", "9.0"}
    assert native_build.resolve_archs("7.5 8.0;9.0a+PTX", known) == (["7.5", "8.0", "9.0a"], ["9.0a"])
    assert native_build.gencode_flags(["8.0"], ["9.0a"]) == [
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
        native_build.resolve_archs(archs, {"9.0", "8.0"})


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


def test_missing_compiler_is_recorded_or_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "find_cxx", lambda: None)
    native_build.NativeBuild(ROOT, Options(cuda="0")).run(tmp_path, "0.1.0")
    info = json.loads((tmp_path / "_build_info.json").read_text())
    assert info["cpu"].startswith("not built: no C++ compiler found; install g++")
    assert info["cuda"] == "not built: PPO_EXT_CUDA=0"
    with pytest.raises(BuildError, match="no C.. compiler found"):
        native_build.NativeBuild(ROOT, Options(cuda="0", require_native=True)).run(tmp_path, "0.1.0")


def test_missing_cuda_is_an_error_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "find_cuda", lambda: (None, ["/usr/local/cuda lacks bin/nvcc"]))
    with pytest.raises(native_build.NotWanted, match="/usr/local/cuda lacks bin/nvcc"):
        native_build.NativeBuild(ROOT, Options(require_native=True)).cuda_library()
    with pytest.raises(BuildError, match="set CUDA_HOME to one"):
        native_build.NativeBuild(ROOT, Options(cuda="1")).cuda_library()


def test_target_macro():
    assert native_build.target_macro("2.10") == "0x020a000000000000"


# ---- the package's habits -------------------------------------------------------------------------------------------

BANNED_MODULES = {
    "pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "requests",
    "urllib.request",
}
BANNED_CALLS = {"torch.load", "torch.save", "torch.hub", "eval", "exec"}


def banned_names(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in BANNED_MODULES:
            yield node.module, node.lineno
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in BANNED_CALLS:
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
            yield node.func.id, node.lineno


@pytest.mark.parametrize("source", ["import pickle", "from pickle import loads", "torch.load(f)", "eval('1')"])
def test_the_search_for_unsafe_calls_finds(source):
    assert list(banned_names(ast.parse(source)))


def test_no_pickle_and_no_download():
    found = [
        (str(path.relative_to(ROOT)), *hit)
        for path in sorted(PACKAGE.rglob("*.py"))
        for hit in banned_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


def test_ops_do_not_import_transformers():
    code = (
        "import sys, torch, ppo_ext; ppo_ext.masked_mean(torch.ones(2, 2), torch.ones(2, 2));"
        "print(sorted({'transformers', 'accelerate', 'peft'} & set(sys.modules)))"
    )
    result = python("-c", code, cwd=ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
