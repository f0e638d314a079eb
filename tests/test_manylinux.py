"""PPO_EXT_MANYLINUX=1: the libraries ask for no newer glibc than 2.28, whatever this machine has."""

import ctypes
import dataclasses
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

import manylinux  # noqa: E402
from build_options import BuildError  # noqa: E402
from compile_library import Library, Source, compile_library  # noqa: E402
from find_tools import find_cxx, run_text  # noqa: E402

LIBC = tuple(int(part) for part in platform.libc_ver()[1].split(".") if part)

# What the kernels and the CUDA runtime use that glibc 2.29, 2.32 and 2.34 or GCC 9 brought in a new version.
EVERYTHING_NEW = """
#include <cmath>
#include <dlfcn.h>
#include <memory>
#include <pthread.h>
#include <semaphore.h>
#include <sstream>
#include <string>
#include <sys/mman.h>

extern "C" __attribute__((visibility("default"))) double answer(double x) {
  std::ostringstream text;
  text << std::exp(x) + std::log(x) + std::exp2(x) + std::expm1(x);
  std::stringstream again;
  again << text.str();
  std::shared_ptr<std::string> kept = std::make_shared<std::string>(again.str()), copy = kept;
  pthread_key_t key;
  if (pthread_key_create(&key, nullptr) != 0 || pthread_setspecific(key, &key) != 0) return -1;
  sem_t semaphore;
  if (sem_init(&semaphore, 0, 1) != 0 || sem_wait(&semaphore) != 0) return -2;
  if (dlsym(RTLD_DEFAULT, "printf") == nullptr || shm_open("/no/such", 0, 0) != -1) return -3;
  std::allocator<int*> allocator;
  allocator.deallocate(allocator.allocate(again.str().size()), again.str().size());
  return std::stod(*copy);
}
"""


TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"

CALLS_TORCH = """
#include <cstdint>

extern "C" int aoti_torch_dtype_bool();
extern "C" uint64_t aoti_torch_abi_version();

extern "C" __attribute__((visibility("default"))) uint64_t answer() { return aoti_torch_abi_version(); }
extern "C" __attribute__((visibility("default"))) int dtype() { return aoti_torch_dtype_bool(); }
"""


def linked_again(folder, text, of_torch=()):
    """The library as it is linked at first, and for manylinux."""
    cxx = find_cxx() or pytest.skip("no C++ compiler here")
    (folder / "sample.cpp").write_text(text)
    sources = [Source(folder / "sample.cpp"), Source(manylinux.SOURCE)]
    compile = [*cxx, "-O2", "-fPIC", "-fvisibility=hidden"]
    library = Library("sample.so", sources, compile, [*cxx, "-shared"], ["-Wl,--as-needed", "-lstdc++", "-ldl", "-lrt"])
    library = dataclasses.replace(library, torch=list(of_torch))
    built = compile_library(library, folder / "build")
    return built, manylinux.relink(library, built, cxx)


def newest(library, name):
    table = subprocess.run(["readelf", "--dyn-syms", "--wide", library], capture_output=True, text=True).stdout
    return max(tuple(map(int, version.split("."))) for version in re.findall(rf"@{name}_([\d.]+)", table))


def test_takes_the_old_versions_of_what_is_new_here(tmp_path):
    first, second = linked_again(tmp_path, EVERYTHING_NEW)
    assert LIBC < (2, 34) or newest(first, "GLIBC") == (2, 34)
    assert newest(second, "GLIBC") <= manylinux.GLIBC and newest(second, "GLIBCXX") <= manylinux.LIBSTDCXX
    for library in (first, second):
        answer = ctypes.CDLL(str(library)).answer
        answer.argtypes, answer.restype = [ctypes.c_double], ctypes.c_double
        assert answer(1.0) == pytest.approx(2.71828 + 0 + 2 + 1.71828, abs=1e-4)


def test_its_own_definitions_are_hidden(tmp_path):
    _, library = linked_again(tmp_path, EVERYTHING_NEW)
    exported = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert not re.search("__libc_single_threaded|stringstream", exported)


@pytest.mark.skipif(LIBC < (2, 36), reason="arc4random came with glibc 2.36")
def test_names_what_glibc_2_28_does_not_have(tmp_path):
    text = '#include <stdlib.h>\nextern "C" __attribute__((visibility("default"))) int f() { return arc4random(); }\n'
    with pytest.raises(BuildError, match="glibc 2.28 has no arc4random; define it in newer_symbols.cpp or do without"):
        linked_again(tmp_path, text)


def test_names_what_an_old_libstdcxx_does_not_have(tmp_path):
    text = (
        "#include <charconv>\n"
        'extern "C" __attribute__((visibility("default"))) int f(char* s) { return std::to_chars(s, s + 9, 0.5).ptr - s; }\n'
    )
    with pytest.raises(BuildError, match="to_chars.*@GLIBCXX_.*define it in newer_symbols.cpp or do without"):
        linked_again(tmp_path, text)


def test_needs_no_libtorch_but_calls_the_one_that_is_imported(tmp_path):
    first, second = linked_again(tmp_path, CALLS_TORCH, [f"-L{TORCH_LIBRARIES}", "-ltorch_cpu"])
    needed = [
        re.findall("NEEDED.*\\[(.*)\\]", run_text(["readelf", "-d", str(library)])) for library in (first, second)
    ]
    assert "libtorch_cpu.so" in needed[0] and not any("torch" in name for name in needed[1])
    assert not re.search("aoti_torch|ppo_torch", run_text(["nm", "-D", str(second)]))
    library, libtorch = ctypes.CDLL(str(second)), ctypes.CDLL(str(TORCH_LIBRARIES / "libtorch_cpu.so"))
    for function in (library.answer, libtorch.aoti_torch_abi_version):
        function.restype = ctypes.c_uint64
    assert library.answer() == libtorch.aoti_torch_abi_version() > 0
    assert library.dtype() == libtorch.aoti_torch_dtype_bool()


def test_says_that_torch_must_be_imported_first(tmp_path):
    _, library = linked_again(tmp_path, CALLS_TORCH, [f"-L{TORCH_LIBRARIES}", "-ltorch_cpu"])
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.startswith(
        "ppo_ext: import a torch that has aoti_torch_abi_version before this library is loaded"
    )
