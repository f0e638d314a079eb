"""Cross-compiles both libraries for aarch64 Linux and runs the op tests under qemu's user-mode emulation.

As root on Debian 12: the compiler (g++-aarch64-linux-gnu), the emulator (qemu-user) and the interpreter come from its
packages; torch, numpy and what the tests need from the package index, as wheels for aarch64.
"""

import shutil
import sys
import time

from .packages import FOLDER, OLDEST, ROOT, download, fetch_torch, pip, run
from .torches import op_tests, run_op_tests

# isort: split
from build_options import BuildError, Options
from find_tools import Cuda, find_cuda
from native_build import NativeBuild, Tools

CXX = "aarch64-linux-gnu-g++"
# For libraries and headers, an unpacked wheel; this version's has no CUDA and is a third of the later ones' size.
TORCH = OLDEST
ARCHS = "9.0 10.0"  # GH200, GB200
DEBIAN = """libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 libssl3 libcrypt1 libuuid1
    libsqlite3-0 libncursesw6 libtinfo6 libpython3.11-minimal libpython3.11-stdlib python3.11-minimal""".split()
PLATFORMS = [
    f"--platform={tag}_aarch64" for tag in ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
]
NEEDS = "pytest pytest-benchmark hypothesis sympy networkx jinja2 fsspec filelock typing_extensions".split()
LONGEST = 7200  # seconds that the tests may take, beside much else; they take a tenth of that


def check_aarch64():
    """One row for each library that is built, for `info`, and for each file of op tests."""
    if shutil.which(CXX) is None or shutil.which("qemu-aarch64") is None:
        yield {"step": "tools", "failures": ["apt-get install g++-aarch64-linux-gnu qemu-user"]}
        return
    package = FOLDER / "aarch64-package"
    shutil.rmtree(package, ignore_errors=True)
    unbuilt = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "ppo_ext", package / "ppo_ext", ignore=unbuilt)
    torch = fetch_torch(TORCH, "manylinux_2_28_aarch64", ("include/", "lib/lib"))
    cuda, _ = find_cuda()
    options = Options(cuda="1" if cuda else "0", require_native="1", manylinux=True, arch_list=ARCHS)
    build = NativeBuild(ROOT, options, Tools(torch, [CXX], cuda and cross_toolkit(cuda)))
    yield timed("_C_cpu.so compiles and links", lambda: compiled(build, build.cpu_library, package / "ppo_ext"))
    if cuda:
        yield timed("_C_cuda.so compiles and links", lambda: compiled(build, build.cuda_library, package / "ppo_ext"))
    emulator = make_emulator(package)
    yield timed("python -m ppo_ext info", lambda: self_test(emulator))
    # in one process, as importing torch takes longer there than most files do
    found = run_op_tests(emulator, op_tests(), ["-p", "tests.platforms.few_cases"], LONGEST)
    yield from ({"step": file, **row} for file, row in found.items())


# ---- compile and link -----------------------------------------------------------------------------------------------


def compiled(build, describe, target):
    """Every warning is an error, no symbol of libtorch may be missing, and none of glibc may be newer than 2.28."""
    try:
        library = describe()
        shutil.copy(build.compile(library, FOLDER / "aarch64-objects"), target / library.name)
    except BuildError as error:
        return {"failures": [str(error)]}
    return {"failures": []}


def self_test(emulator):
    try:
        printed = run([*emulator, "-m", "ppo_ext", "info"])
    except RuntimeError as error:
        return {"failures": [str(error)[-500:]]}
    return {"failures": [] if printed.rstrip().endswith("everything fine") else [printed[-500:]]}


def cross_toolkit(cuda):
    """This machine's nvcc and headers with the runtime library for aarch64."""
    folder = FOLDER / "aarch64-cudart"
    found = list(folder.rglob("libcudart_static.a"))
    if not found:
        wheel = download(f"nvidia-cuda-runtime=={cuda.version}.*", PLATFORMS, folder)
        shutil.unpack_archive(wheel, folder, "zip")
        wheel.unlink()
        found = list(folder.rglob("libcudart_static.a"))
    return Cuda(cuda.nvcc, cuda.include, found[0].parent, cuda.version)


# ---- run ------------------------------------------------------------------------------------------------------------


def make_emulator(package):
    """The command that runs an aarch64 Python with torch and, before it, the package in that folder."""
    root, site = FOLDER / "aarch64-root", FOLDER / "aarch64-site"
    if not (root / "usr/bin/python3.11").exists():
        unpack_debian_packages(root)
    if not (site / "torch").exists():
        arguments = ["install", "--quiet", "--target", site, "--python-version=3.11", "--only-binary=:all:", *PLATFORMS]
        pip(sys.executable, *arguments, "numpy", *NEEDS)
        pip(sys.executable, *arguments, "--no-deps", f"torch=={TORCH}")
    libraries = f"{root}/usr/lib/aarch64-linux-gnu:{root}/lib/aarch64-linux-gnu"
    variables = {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": f"{package}:{site}", "OMP_NUM_THREADS": "1"}
    settings = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
    return ["qemu-aarch64", "-L", root, *settings, root / "usr/bin/python3.11"]


def unpack_debian_packages(root):
    """Unpacks the interpreter and its libraries. apt gets lists of its own, so that this machine's are left as they are."""
    apt = FOLDER / "apt"
    for part in ("lists/partial", "cache/archives/partial", "packages"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    options = [f"APT::Architectures::={name}" for name in ("amd64", "arm64")]
    options += [f"Dir::State::Lists={apt}/lists", f"Dir::Cache={apt}/cache", "APT::Sandbox::User=root"]
    command = ["apt-get", "-qq", *(part for option in options for part in ("-o", option))]
    run([*command, "update"])
    run([*command, "download", *(f"{name}:arm64" for name in DEBIAN)], cwd=apt / "packages")
    for package in sorted((apt / "packages").glob("*.deb")):
        run(["dpkg-deb", "-x", package, root])


def timed(step, action):
    begin = time.perf_counter()
    return {"step": step, **action(), "seconds": round(time.perf_counter() - begin, 1)}
