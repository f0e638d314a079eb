"""Build what csrc holds: _C_cpu.so, _C_cuda.so, and _build_info.json, which says how they were made."""

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import manylinux
from build_options import BuildError, NoCompiler, NotWanted, Options
from compile_library import Library, Source, compile_library
from cuda_archs import gencode_flags, known_archs, resolve_archs
from find_tools import Cuda, Torch, find_cuda, find_cxx, find_torch, run_text

TORCH_TARGET = "2.10"  # LibTorch stable ABI: the built libraries run on every torch from here on
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]  # psabi: notes on 64-byte vectors, which never cross a library
# The instruction sets that csrc/*_simd.cpp is compiled for; each is a namespace in csrc/common/levels.h. The lowest comes
# first, because the linker keeps the first of several definitions of a function.
LEVELS = {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4",)}
HIDE = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
WAY_OUT = {
    "cpu": "PPO_EXT_REQUIRE_NATIVE=0 installs the slow reference implementation in its place",
    "cuda": "PPO_EXT_CUDA=0 builds without the CUDA kernels",
}


@dataclass(frozen=True)
class Tools:
    """What to build with, where that is not what this machine has: another torch or compiler, another machine's."""

    torch: Torch | None = None
    cxx: list[str] | None = None
    cuda: Cuda | None = None


class NativeBuild:
    """Builds the libraries of the source tree `root`; `facts` collects what _build_info.json will say."""

    def __init__(self, root: Path, options: Options, tools: Tools = Tools()):
        self.root = root
        self.options = options
        self.tools = tools
        self._strict = options.require_native == "1"
        kind = ["debug" if options.debug else "release"]
        kind += ["strict"] * self._strict  # not manylinux: that links differently, from the same objects
        self.folder = root / "build" / "-".join(kind)
        self.facts: dict = {"torch_target": TORCH_TARGET, "debug": options.debug}

    def run(self, target: Path, version: str) -> None:
        """Put the libraries and _build_info.json into `target`; raises BuildError if one that must be there fails."""
        say(str(self.options))
        for backend, describe in (("cpu", self.cpu_library), ("cuda", self.cuda_library)):
            library = target / f"_C_{backend}.so"
            try:
                install(self.compile(describe(), self.folder), library)
                self.facts[backend] = "built"
                continue
            except NotWanted as reason:
                self.facts[backend] = f"not built: {reason}"
                say(f"{library.name} {self.facts[backend]}")
            except BuildError as error:
                if self._must_succeed(backend, error):
                    raise BuildError(f"{error}. {WAY_OUT[backend]}") from None
                self.facts[backend] = f"not built: {error}"
                say(f"WARNING: {library.name} {self.facts[backend]}")
                say(f"WARNING: without it ppo_ext runs its slow reference implementation on {backend} tensors")
            library.unlink(missing_ok=True)  # one from an earlier build would not fit these sources
        info = {"version": version, "git": git_sha(self.root), "date": build_date(), **self.facts}
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def compile(self, library: Library, folder: Path) -> Path:
        """Build `library` in `folder` and return its path."""
        if not self.options.manylinux:
            return compile_library(library, folder, self.options.max_jobs)
        library.sources.append(Source(manylinux.SOURCE))
        built = compile_library(library, folder, self.options.max_jobs)
        return manylinux.relink(library, built, self._cxx())

    def _must_succeed(self, backend: str, error: BuildError) -> bool:
        if backend == "cuda" and self.options.cuda == "1":
            return True
        # without a compiler there is nothing to mend in the sources: the reference implementation is a whole install
        allowed = ("0", "auto") if isinstance(error, NoCompiler) else ("0",)
        return self.options.require_native not in allowed

    def cpu_library(self) -> Library:
        cxx, torch = self._cxx(), self._torch()
        flags = [*self._optimize(["-fno-math-errno", "-fno-trapping-math"]), *WARNINGS, *HIDE]
        target = run_text([*cxx, "-dumpmachine"])  # not this machine's when cross-compiling
        levels = LEVELS if target.startswith("x86_64") and not self.options.debug else {"base": ()}
        flags += ["-DPPO_EXT_ONE_LEVEL"] * (len(levels) == 1)
        flags += ["-Werror"] * self._strict
        self.facts["cxx_flags"] = " ".join(flags)
        compile = [*cxx, *flags, *self._includes(torch), *self._hide_paths(torch)]
        of_torch = self._link_torch(torch, "-ltorch_cpu", "-lc10")
        sources = self._sources("*_cpu.cpp")
        for level, machine in levels.items():
            sources += [
                Source(source.path, (*machine, f"-DPPO_LEVEL={level}"), level) for source in self._sources("*_simd.cpp")
            ]
        return Library("_C_cpu.so", sources, compile, self._link(cxx), ["-Wl,--no-undefined"], of_torch)

    def cuda_library(self) -> Library:
        if self.options.cuda == "0":
            raise NotWanted("PPO_EXT_CUDA=0")
        cuda, rejected = (self.tools.cuda, []) if self.tools.cuda else find_cuda()
        if cuda is None:
            reason = f"no complete CUDA toolkit found ({'; '.join(rejected)}); set CUDA_HOME to one"
            raise BuildError(reason) if self.options.cuda == "1" else NotWanted(reason)
        sources = self._sources("*_cuda.cu")
        cxx, torch = self._cxx(), self._torch()
        sass, ptx = resolve_archs(self.options.arch_list, known_archs(cuda))
        self.facts.update(nvcc=cuda.version, sass=sass, ptx=ptx)
        say(f"nvcc {cuda.version} ({cuda.nvcc}), SASS {' '.join(sass)}, PTX {' '.join(ptx)}")
        flags = [*self._optimize(["-lineinfo"] * self.options.debug), "--expt-relaxed-constexpr", "-DUSE_CUDA"]
        flags += [f"-Xcompiler={','.join([*WARNINGS, *HIDE])}"]
        if float(cuda.version) >= 13:
            flags += ["-compress-mode=size"]  # a quarter of the default's size
        flags += ["-Werror=all-warnings"] * self._strict
        self.facts["nvcc_flags"] = " ".join(flags)
        host = [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []
        compile = [str(cuda.nvcc), *host, *flags, *gencode_flags(sass, ptx), *self._includes(torch)]
        if self.tools.cuda:  # nvcc looks for another machine's headers in folders that this machine's toolkit lacks
            compile += ["-isystem", str(cuda.include), "-isystem", str(cuda.include / "cccl")]
        # nvcc splits what it hands on at blanks and commas
        compile += [f"-Xcompiler={flag}" for flag in self._hide_paths(torch) if not re.search("[ ,]", flag)]
        # libtorch.so brings libtorch_cuda.so into the lookup where torch has CUDA, so that this also links where it
        # has not. The static runtime stays private: its symbols must not mix with those of torch's own runtime.
        of_torch = self._link_torch(torch, "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
        libraries = [str(cuda.library / "libcudart_static.a"), "-lrt", "-ldl", "-lpthread"]
        return Library(
            "_C_cuda.so", sources, compile, [*self._link(cxx), "-Wl,--exclude-libs,ALL"], libraries, of_torch
        )

    def _sources(self, pattern: str) -> list[Source]:
        sources = [Source(path) for path in sorted((self.root / "csrc").rglob(pattern))]
        if not sources:
            raise NotWanted(f"csrc has no {pattern}")
        return sources

    def _torch(self) -> Torch:
        torch = self.tools.torch or find_torch()
        if torch is None:
            raise BuildError(f"no torch {TORCH_TARGET} or newer is installed; pip install torch")
        self.facts["torch"] = torch.version
        return torch

    def _cxx(self) -> list[str]:
        if sys.platform != "linux":
            raise NoCompiler(f"the kernels are built on Linux only, not on {sys.platform}")
        cxx = self.tools.cxx or find_cxx()
        if cxx is None:
            raise NoCompiler("no C++ compiler found; install g++ (apt-get install g++) or set CXX")
        version = run_text([*cxx, "--version"])
        if not version:
            raise BuildError(f"CXX must be a C++ compiler that runs, got {shlex.join(cxx)}")
        self.facts["cxx"] = version.partition("\n")[0]
        return cxx

    def _optimize(self, flags: list[str]) -> list[str]:
        level = ["-O0", "-g"] if self.options.debug else ["-O3"]
        return ["-std=c++17", *level, *flags]

    def _includes(self, torch: Torch) -> list[str]:
        include = torch.folder / "include"
        return [f"-DTORCH_TARGET_VERSION={target_macro(TORCH_TARGET)}", "-isystem", str(include)]

    def _hide_paths(self, torch: Torch) -> list[str]:
        # error texts carry __FILE__; a wheel should not tell where it was built
        places = (torch.folder / "include", self.root)
        return [] if self.options.debug else [f"-ffile-prefix-map={place}/=" for place in places]

    def _link_torch(self, torch: Torch, *libraries: str) -> list[str]:
        # libtorch exports parts of libstdc++ without their versions; naming libstdc++ first keeps them out of ours
        return [f"-L{torch.folder / 'lib'}", "-Wl,--as-needed", "-lstdc++", *libraries]

    def _link(self, cxx: list[str]) -> list[str]:
        return [*cxx, "-shared", *([] if self.options.debug else ["-s"])]


# ---- small facts ----------------------------------------------------------------------------------------------------


def target_macro(version: str) -> str:
    """TORCH_TARGET_VERSION: one byte for the major, one for the minor, six of zeros."""
    major, minor = map(int, version.split("."))
    return f"0x{major:02x}{minor:02x}{0:012x}"


def install(built: Path, target: Path) -> None:
    """Copy by renaming: a process that has the old library loaded keeps it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")
    shutil.copy2(built, fresh)
    os.replace(fresh, target)


def git_sha(root: Path) -> str | None:
    """The commit of the checkout at `root`, with "-dirty" if it was changed; None outside a checkout."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return run_text(command).strip() or None


def build_date() -> str:
    stamp = os.environ.get("SOURCE_DATE_EPOCH")
    moment = datetime.fromtimestamp(int(stamp), timezone.utc) if stamp else datetime.now(timezone.utc)
    return moment.isoformat(timespec="seconds")


def say(text: str) -> None:
    print(f"ppo_ext build: {text}", file=sys.stderr, flush=True)
