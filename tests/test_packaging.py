"""What is installed: the wheel, the libraries' symbols and architectures, what an import does."""

import ast
import email
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

import find_tools  # noqa: E402

# Only libtorch_cuda exports these. They stay undefined, so that the library can be linked against a torch without CUDA.
CUDA_SHIMS = {"aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg"}


def python(*arguments, cwd="/", **variables):
    """Runs this interpreter in a new process, outside the checkout and without its environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PPO_EXT_") and k != "PYTHONPATH"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def backend(hook, target, **variables):
    """Runs one hook of the build backend on this checkout; returns the file that it made.

    The options are those with which the checkout itself was built, so that no object has to be compiled again.
    """
    facts = PACKAGE / "_build_info.json"
    info = json.loads(facts.read_text()) if facts.exists() else {}
    options = {
        "PPO_EXT_REQUIRE_NATIVE": "1" if "-Werror" in info.get("cxx_flags", "") else "auto",
        "PPO_EXT_CUDA": "auto" if info.get("cuda", "built") == "built" else "0",
    }
    code = (
        f"import sys; sys.path.insert(0, '_build'); import ppo_build; print('made', ppo_build.{hook}({str(target)!r}))"
    )
    result = python("-c", code, cwd=ROOT, **{**options, **variables})
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
def test_wheel_describes_itself_on_a_package_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        facts = email.message_from_bytes(archive.read(name))
    python = "Programming Language :: Python :: 3."
    minors = sorted(int(row.removeprefix(python)) for row in facts.get_all("Classifier") if row.startswith(python))
    assert minors == list(range(int(facts["Requires-Python"].removeprefix(">=3.")), minors[-1] + 1))
    assert sys.version_info.minor in minors
    addresses = dict(row.split(", ") for row in facts.get_all("Project-URL"))
    assert {"Repository", "Documentation", "Issues", "Changelog"} <= set(addresses)
    text = facts.get_payload()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 10 and text.startswith("# ppo_ext")
    assert not [link for link in [*links, *addresses.values()] if not link.startswith("https://")]


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
def test_wheel_without_a_compiler_fits_every_machine(tmp_path):
    """So that pip does not keep a wheel without libraries as the one for this kind of machine."""
    wheel = backend("build_wheel", tmp_path, PATH="/nowhere", CXX="", PPO_EXT_REQUIRE_NATIVE="auto")
    assert re.fullmatch(r"ppo_ext-[\d.]+-py3-none-any.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (facts,) = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        assert "Root-Is-Purelib: true\nTag: py3-none-any\n" in archive.read(facts).decode()
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        assert "no C++ compiler found" in archive.read("ppo_ext/_build_info.json").decode()


def test_nothing_beside_the_package_is_packed(tmp_path):
    """`ppo_ext_demo` is the folder that the demo writes to."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed here")
    from setuptools.config.pyprojecttoml import read_configuration

    for name in ("ppo_ext/ops/gae.py", "ppo_ext_demo/plot.py", "bench/timing.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    find = read_configuration(ROOT / "pyproject.toml", expand=False)["tool"]["setuptools"]["packages"]["find"]
    assert set(setuptools.find_namespace_packages(str(tmp_path), **find)) == {"ppo_ext", "ppo_ext.ops"}


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
