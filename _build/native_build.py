"""Build what csrc holds: _C_cpu.so, _C_cuda.so, and _build_info.json, which says how they were made."""

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from compile_library import BuildError, Library, Source, compile_library
from find_tools import Cuda, Torch, find_cuda, find_cxx, find_torch, run_text

TORCH_TARGET = "2.10"  # LibTorch stable ABI: the built libraries run on every torch from here on
SASS = ("8.0", "9.0", "10.0", "12.0")
PTX = ("9.0", "12.0")  # 9.0 for the families between those of SASS, 12.0 for the ones to come
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]  # psabi: notes on 64-byte vectors, which never cross a library
# The instruction sets that csrc/*_simd.cpp is compiled for; each is a namespace in csrc/common/levels.h. The lowest comes
# first, because the linker keeps the first of several definitions of a function.
LEVELS = {"base": (), "v3": ("-march=x86-64-v3",), "v4": ("-march=x86-64-v4",)}
HIDE = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]


class NotWanted(Exception):
    """This build leaves a native part out, and nothing is wrong with that; the text says why."""


@dataclass(frozen=True)
class Options:
    """The build's environment variables, checked."""

    cuda: str = "auto"
    require_native: bool = False
    debug: bool = False
    arch_list: str = ""
    max_jobs: int | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Options":
        def choice(name, default, allowed):
            value = env.get(name) or default
            if value not in allowed:
                raise BuildError(f"{name} must be one of {' '.join(allowed)}, got {value}")
            return value

        jobs = env.get("MAX_JOBS") or None
        if jobs is not None and (not jobs.isdigit() or int(jobs) < 1):
            raise BuildError(f"MAX_JOBS must be a positive integer, got {jobs}")
        return cls(
            cuda=choice("PPO_EXT_CUDA", "auto", ("auto", "0", "1")),
            require_native=choice("PPO_EXT_REQUIRE_NATIVE", "0", ("0", "1")) == "1",
            debug=choice("PPO_EXT_DEBUG", "0", ("0", "1")) == "1",
            arch_list=env.get("TORCH_CUDA_ARCH_LIST", ""),
            max_jobs=int(jobs) if jobs else None,
        )


# ---- GPU architectures ----------------------------------------------------------------------------------------------


def resolve_archs(arch_list: str, known: set[str]) -> tuple[list[str], list[str]]:
    """(SASS, PTX) compute capabilities: TORCH_CUDA_ARCH_LIST if set, else those defaults that this nvcc knows."""
    if not arch_list.strip():
        sass = [arch for arch in SASS if arch in known]
        return sass, [arch for arch in PTX if arch in known] or sass[-1:]
    sass, ptx = [], []
    for entry in re.split(r"[;,\s]+", arch_list.strip(" ;,")):
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: each entry must be like 9.0 or 9.0+PTX, got {entry}")
        if match[1] not in known:
            names = " ".join(sorted(known, key=float))
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: each entry must be one this nvcc knows ({names}), got {entry}")
        sass.append(match[1] + match[2])
        if match[3]:
            ptx.append(match[1] + match[2])
    return sass, ptx


def known_archs(cuda: Cuda) -> set[str]:
    """The compute capabilities that this nvcc compiles for."""
    names = re.findall(r"compute_(\d+)(\d)\b", run_text([str(cuda.nvcc), "--list-gpu-arch"]))
    return {f"{major}.{minor}" for major, minor in names}


def gencode_flags(sass: list[str], ptx: list[str]) -> list[str]:
    def flag(arch, kind):
        number = arch.replace(".", "")
        return f"-gencode=arch=compute_{number},code={kind}_{number}"

    return [flag(arch, "sm") for arch in sass] + [flag(arch, "compute") for arch in ptx]


# ---- the two libraries ----------------------------------------------------------------------------------------------


class NativeBuild:
    """Builds the libraries of the source tree `root`; `facts` collects what _build_info.json will say."""

    def __init__(self, root: Path, options: Options):
        self.root = root
        self.options = options
        kind = "debug" if options.debug else "release"
        self.folder = root / "build" / (f"{kind}-strict" if options.require_native else kind)
        self.facts: dict = {"torch_target": TORCH_TARGET, "debug": options.debug}

    def run(self, target: Path, version: str) -> None:
        """Put the libraries and _build_info.json into `target`; raises BuildError if a required part fails."""
        say(str(self.options))
        for backend, describe in (("cpu", self.cpu_library), ("cuda", self.cuda_library)):
            library = target / f"_C_{backend}.so"
            try:
                install(compile_library(describe(), self.folder, self.options.max_jobs), library)
                self.facts[backend] = "built"
                continue
            except NotWanted as reason:
                self.facts[backend] = f"not built: {reason}"
                say(f"{library.name} {self.facts[backend]}")
            except BuildError as error:
                if self.options.require_native or (backend == "cuda" and self.options.cuda == "1"):
                    raise
                self.facts[backend] = f"not built: {error}"
                say(f"WARNING: {library.name} {self.facts[backend]}")
                say(f"WARNING: without it ppo_ext runs its slow reference implementation on {backend} tensors")
            library.unlink(missing_ok=True)  # one from an earlier build would not fit these sources
        info = {"version": version, "git": git_sha(self.root), "date": build_date(), **self.facts}
        (target / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    def cpu_library(self) -> Library:
        torch, cxx = self._torch(), self._cxx()
        flags = [*self._optimize(["-fno-math-errno", "-fno-trapping-math"]), *WARNINGS, *HIDE]
        levels = LEVELS if platform.machine() == "x86_64" and not self.options.debug else {"base": ()}
        flags += ["-DPPO_EXT_ONE_LEVEL"] * (len(levels) == 1)
        flags += ["-Werror"] * self.options.require_native
        self.facts["cxx_flags"] = " ".join(flags)
        compile = [*cxx, *flags, *self._includes(torch), *self._hide_paths(torch)]
        libraries = [*self._link_torch(torch, "-ltorch_cpu", "-lc10"), "-Wl,--no-undefined"]
        sources = self._sources("*_cpu.cpp")
        for level, machine in levels.items():
            sources += [
                Source(source.path, (*machine, f"-DPPO_LEVEL={level}"), level) for source in self._sources("*_simd.cpp")
            ]
        return Library("_C_cpu.so", sources, compile, self._link(cxx), libraries)

    def cuda_library(self) -> Library:
        if self.options.cuda == "0":
            raise NotWanted("PPO_EXT_CUDA=0")
        cuda, rejected = find_cuda()
        if cuda is None:
            reason = f"no complete CUDA toolkit found ({'; '.join(rejected)}); set CUDA_HOME to one"
            raise BuildError(reason) if self.options.cuda == "1" else NotWanted(reason)
        sources = self._sources("*_cuda.cu")
        torch, cxx = self._torch(), self._cxx()
        sass, ptx = resolve_archs(self.options.arch_list, known_archs(cuda))
        self.facts.update(nvcc=cuda.version, sass=sass, ptx=ptx)
        say(f"nvcc {cuda.version} ({cuda.nvcc}), SASS {' '.join(sass)}, PTX {' '.join(ptx)}")
        flags = [*self._optimize(["-lineinfo"] * self.options.debug), "--expt-relaxed-constexpr", "-DUSE_CUDA"]
        flags += [f"-Xcompiler={','.join([*WARNINGS, *HIDE])}"]
        if float(cuda.version) >= 13:
            flags += ["-compress-mode=size"]  # a quarter of the default's size
        flags += ["-Werror=all-warnings"] * self.options.require_native
        self.facts["nvcc_flags"] = " ".join(flags)
        host = [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []
        compile = [str(cuda.nvcc), *host, *flags, *gencode_flags(sass, ptx), *self._includes(torch)]
        # nvcc splits what it hands on at blanks and commas
        compile += [f"-Xcompiler={flag}" for flag in self._hide_paths(torch) if not re.search("[ ,]", flag)]
        # libtorch.so brings libtorch_cuda.so into the lookup where torch has CUDA, so that this also links where it
        # has not. The static runtime stays private: its symbols must not mix with those of torch's own runtime.
        libraries = [
            *self._link_torch(torch, "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-lc10")
        ]
        libraries += [str(cuda.library / "libcudart_static.a"), "-lrt", "-ldl", "-lpthread"]
        return Library("_C_cuda.so", sources, compile, [*self._link(cxx), "-Wl,--exclude-libs,ALL"], libraries)

    def _sources(self, pattern: str) -> list[Source]:
        sources = [Source(path) for path in sorted((self.root / "csrc").rglob(pattern))]
        if not sources:
            raise NotWanted(f"csrc has no {pattern}")
        return sources

    def _torch(self) -> Torch:
        torch = find_torch()
        if torch is None:
            raise BuildError(f"no torch {TORCH_TARGET} or newer is installed; pip install torch")
        self.facts["torch"] = torch.version
        return torch

    def _cxx(self) -> list[str]:
        if sys.platform != "linux":
            raise BuildError(f"the kernels are built on Linux only, not on {sys.platform}")
        cxx = find_cxx()
        if cxx is None:
            raise BuildError("no C++ compiler found; install g++ (apt-get install g++) or set CXX")
        self.facts["cxx"] = run_text([*cxx, "--version"]).partition("\n")[0]
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
