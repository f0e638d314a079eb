"""The build's environment variables, and its two kinds of refusal."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


class NotWanted(Exception):
    """This build leaves a native part out, and nothing is wrong with that; the text says why."""


class BuildError(Exception):
    """A native part cannot be built; the text says what to do."""


class NoCompiler(BuildError):
    """Nothing on this machine compiles the kernels. The package is installed without them, unless they are required."""


@dataclass(frozen=True)
class Options:
    """The build's environment variables, checked."""

    cuda: str = "auto"
    require_native: str = (
        "auto"  # auto: what can be compiled must compile; 0: nothing must; 1: the CPU library must exist
    )
    debug: bool = False
    manylinux: bool = False
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
            require_native=choice("PPO_EXT_REQUIRE_NATIVE", "auto", ("auto", "0", "1")),
            debug=choice("PPO_EXT_DEBUG", "0", ("0", "1")) == "1",
            manylinux=choice("PPO_EXT_MANYLINUX", "0", ("0", "1")) == "1",
            arch_list=env.get("TORCH_CUDA_ARCH_LIST", ""),
            max_jobs=int(jobs) if jobs else None,
        )
