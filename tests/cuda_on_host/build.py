"""Compiles CUDA sources for the host together with the layer that runs them, and keeps the results until a source
changes."""

import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sysconfig
import time

import torch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_on_host"
CXX = "g++"
TORCH = pathlib.Path(torch.__file__).parent

# The compiler inserts a call at each load and store (a whole vector is one access), for which memory.cpp has the
# functions, and checks for undefined behaviour, for which undefined.cpp has them.
CHECKS = [
    "-fsanitize=thread",
    "-fno-tree-sra",
    "-fsanitize=alignment,bounds,object-size,bool,shift",
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
]
BASE = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
LAYER = ("fibers", "grids", "warps", "memory", "races", "undefined", "binding")


def missing():
    """Why the kernels cannot run on the CPU of this machine, or None. Where native parts are required, g++ is required
    too."""
    if platform.machine() != "x86_64":
        return "the fibers switch by x86-64 instructions"
    reason = None
    if shutil.which(CXX) is None:
        reason = f"{CXX} is not installed"
    elif not all(map(os.path.isabs, preloaded())):
        reason = f"{CXX} has no AddressSanitizer"
    if reason and os.environ.get("PPO_EXT_REQUIRE_NATIVE") == "1":
        raise RuntimeError(f"PPO_EXT_REQUIRE_NATIVE=1, but {reason}")
    return reason


def preloaded():
    """The libraries to preload: AddressSanitizer, and the C++ library, whose exceptions it must find when it starts."""
    return [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]


# ---- compiling ------------------------------------------------------------------------------------------------------


def made(command, inputs, suffix, folder=ROOT):
    """Runs `command` with -o in `folder`; returns the file that it writes, or the kept one if no content of `inputs`
    has changed."""
    digest = hashlib.sha256("\n".join(command).encode())
    for path in sorted(inputs):
        digest.update(path.name.encode() + path.read_bytes())
    target = CACHE / (digest.hexdigest()[:24] + suffix)
    if target.exists():
        os.utime(target)
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}{suffix}")
    result = subprocess.run([*command, "-o", str(fresh)], cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-4000:]}")
    os.replace(fresh, target)
    return target


def forget_unused(days=7):
    for path in CACHE.glob("*"):
        if path.stat().st_mtime < time.time() - days * 86400:
            path.unlink(missing_ok=True)


def headers(*folders):
    return [path for folder in folders for pattern in ("*.h", "*.cuh") for path in folder.rglob(pattern)]


def kernel_object(source, csrc=CSRC):
    """Compiles one .cu file with the headers of `csrc`. File names are relative, so that copies of csrc share what is
    unchanged."""
    command = [CXX, "-x", "c++", *BASE, *CHECKS, "-w", f"-I{HERE}", "-isystem", str(TORCH / "include")]
    command += ["-include", str(HERE / "prelude.h"), f"-I{csrc.name}"] if source.parent == csrc else [f"-I{csrc}"]
    folder = source.parent.parent
    command += ["-c", str(source.relative_to(folder))]
    return made(command, [source, *headers(HERE, csrc)], ".o", folder)


def layer_object(name, *flags):
    import pybind11

    includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    source = HERE / f"{name}.cpp"
    return made(
        [CXX, *BASE, "-Wall", "-Wextra", *includes, *flags, "-c", str(source.relative_to(ROOT))],
        [source, *headers(HERE)],
        ".o",
    )


def library(kernels):
    """A library of the objects that `kernels` make and of the layer. Torch loads it, and it is the Python module
    `layer` too."""
    forget_unused()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kernels = [pool.submit(make) for make in kernels]
        begin, end = (pool.submit(layer_object, "shared_memory", *flags) for flags in (["-DPPO_SHARED_BEGIN"], []))
        layer = [pool.submit(layer_object, name) for name in LAYER]
        objects = [str(future.result()) for future in (begin, *kernels, end, *layer)]
    libraries = TORCH / "lib"
    return made(
        [CXX, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"],
        map(pathlib.Path, objects),
        ".so",
    )


def load_layer(path):
    """The module `layer` of the library at `path`, under a name of its own: pybind11 would take two of one name for the
    same."""
    spec = importlib.util.spec_from_file_location(f"{pathlib.Path(path).resolve().stem}.layer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what the tests run ---------------------------------------------------------------------------------------------


def test_kernels():
    """The library of the kernels that test the layer itself."""
    return library([lambda source=source: kernel_object(source) for source in sorted((HERE / "kernels").glob("*.cu"))])


def link_python(folder):
    """Fills `folder` with links to the Python files of ppo_ext, in folders of its own, so that libraries can be put
    beside them."""
    for source in (ROOT / "ppo_ext").rglob("*.py"):
        link = folder / source.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(source)


def package(folder, replaced=None):
    """Makes `folder` a place to import ppo_ext from, with the CUDA kernels as its CPU library. `replaced` maps the name
    of a .cu file to another folder to take that file and its headers from."""

    def compile_one(name):
        csrc = (replaced or {}).get(name, CSRC)
        return lambda: kernel_object(csrc / name, csrc)

    built = library([compile_one(source.name) for source in sorted(CSRC.glob("*_cuda.cu"))])
    link_python(folder)
    (folder / "ppo_ext" / "_C_cpu.so").symlink_to(built)
    return folder


def environment(folder, seed):
    """The environment variables for a process that runs the package in `folder`. There AddressSanitizer manages torch's
    memory and fills it with 0xff, which is NaN, until it is written."""
    options = {
        "detect_leaks": 0,
        "detect_odr_violation": 0,
        "alloc_dealloc_mismatch": 0,
        "allocator_may_return_null": 1,
        "malloc_fill_byte": 255,
        "max_malloc_fill_size": 2**30,
    }
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preloaded()),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
        "CUDA_ON_HOST_SEED": str(seed),
        "PPO_EXT_REQUIRE_NATIVE": "1",
        "PPO_EXT_TEST_DEVICE": "cpu",
    }
