"""The GPU architectures that the kernels are compiled for."""

import re

from build_options import BuildError
from find_tools import Cuda, run_text

SASS = ("8.0", "9.0", "10.0", "12.0")
PTX = ("9.0", "12.0")  # 9.0 for the families between those of SASS, 12.0 for the ones to come


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
