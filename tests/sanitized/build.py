"""Compiles the CPU sources with sanitizers into a package that can be imported, and runs Python with it."""

import concurrent.futures
import dataclasses
import os
import pathlib
import platform
import subprocess
import sys

import torch
from cuda_on_host.build import CSRC, CXX, TORCH, headers, link_python, made, missing  # noqa: F401

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPPO_EXT_ONE_LEVEL",
    "-DPPO_LEVEL=base",
]


@dataclasses.dataclass(frozen=True)
class Sanitizer:
    """`flags` for the compiler, `preload`: the libraries that must be loaded first, `options`: environment
    variables."""

    flags: tuple
    preload: tuple
    options: dict


def _widest():
    """The flag for the widest vectors of this machine, so that the two sanitizers run two of the three levels."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}.get(capability, ())


ADDRESS = Sanitizer(
    ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", *_widest()),
    ("libasan.so", "libstdc++.so"),
    {
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
)
THREAD = Sanitizer(
    ("-fsanitize=thread", "-include", str(HERE / "threads.h")),
    ("libtsan.so", "libstdc++.so"),
    {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66:report_signal_unsafe=0"},
)


def _object(source, sanitizer, csrc):
    """Compiles one source. File names are relative, so that copies of csrc share what is unchanged."""
    command = [
        CXX,
        *_FLAGS,
        *sanitizer.flags,
        f"-I{csrc.name}",
        "-isystem",
        str(TORCH / "include"),
        "-c",
        f"{csrc.name}/{source}",
    ]
    return made(command, [csrc / source, *headers(HERE, csrc)], ".o", csrc.parent)


def package(folder, sanitizer, replaced=None):
    """Makes `folder` a place to import ppo_ext from. `replaced` maps the name of a source to another csrc to take it
    from."""
    sources = sorted(
        str(path.relative_to(CSRC)) for pattern in ("*_cpu.cpp", "*_simd.cpp") for path in CSRC.rglob(pattern)
    )
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda name: _object(name, sanitizer, (replaced or {}).get(name, CSRC)), sources))
    libraries = TORCH / "lib"
    link = [
        CXX,
        "-shared",
        *sanitizer.flags[:1],
        *map(str, objects),
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        "-lpthread",
        f"-Wl,-rpath,{libraries}",
    ]
    built = made(link, objects, ".so")
    link_python(folder)
    (folder / "ppo_ext" / "_C_cpu.so").symlink_to(built)
    return folder


def run(folder, sanitizer, *arguments):
    """Runs Python under the sanitizer with the package in `folder`, without randomised addresses, as ThreadSanitizer
    requires."""
    libraries = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in sanitizer.preload
    ]
    env = {
        **os.environ,
        **sanitizer.options,
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "PPO_EXT_REQUIRE_NATIVE": "1",
        "PPO_EXT_TEST_DEVICE": "cpu",
    }
    preloaded = ["setarch", platform.machine(), "--addr-no-randomize", "env", f"LD_PRELOAD={' '.join(libraries)}"]
    return subprocess.run(
        [*preloaded, sys.executable, *arguments], env=env, cwd=folder, capture_output=True, text=True, timeout=1800
    )


def run_tests(folder, sanitizer, selection, *files):
    """Runs some of the project's tests. pytest must not capture the output of C++, or a report would be lost when the
    process ends."""
    return run(
        folder,
        sanitizer,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "--rootdir",
        str(HERE.parent),
        "-c",
        os.devnull,
        "-k",
        selection,
        *(str(HERE.parent / name) for name in files),
    )
