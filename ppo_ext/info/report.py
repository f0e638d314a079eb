"""What is installed, how it was built, whether it works here, and the one command to run if it does not."""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import urllib.parse
from collections.abc import Sequence
from typing import Any

import torch

import ppo_ext

from ..ops import _native
from . import selftest

_FOLDER = pathlib.Path(__file__).resolve().parent.parent
_VARIABLES = (
    "PPO_EXT_",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "NVCC_APPEND_FLAGS",
)
_LEVELS = (
    "x86-64" if platform.machine() == "x86_64" else platform.machine(),
    "x86-64-v3",
    "x86-64-v4",
)  # csrc/common/levels.h


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 as exit status if the compiled libraries do not work on a device of this machine."""
    parser = argparse.ArgumentParser(prog="python -m ppo_ext info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for a bug report")
    options = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=1) if options.json else render(report))
    return 1 if report["problem"] else 0


def collect() -> dict[str, Any]:
    """The whole report, of values that JSON can hold."""
    report: dict[str, Any] = {
        "ppo_ext": ppo_ext.__version__,
        "folder": str(_FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("torch", "transformers", "accelerate", "peft", "numpy")},
        "build": read_build_info(_FOLDER / "_build_info.json"),
        "libraries": _native.status(),
        "ops": native_ops(),
        "cpu": {"threads": torch.get_num_threads(), "level": cpu_level()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }
    report["cuda"] = _cuda(report["build"])
    report["selftest"] = selftest.run(
        [
            device
            for device, state in report["libraries"].items()
            if state == "loaded" and (device == "cpu" or torch.cuda.is_available())
        ]
    )
    report["problem"], report["fix"] = diagnose(report)
    return report


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_build_info(path: pathlib.Path) -> dict[str, Any]:
    """What the build wrote beside the libraries; {} if nothing was built."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def native_ops() -> dict[str, dict[str, bool]]:
    """{op: {"cpu": has a compiled implementation, "cuda": ...}} of every operator of the package."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ppo_ext::"))
    return {name.partition("::")[2]: {"cpu": has(name, "CPU"), "cuda": has(name, "CUDA")} for name in names}


# ---- the machine ----------------------------------------------------------------------------------------------------


def cpu_level() -> str | None:
    """The instruction set whose CPU kernels run: the best of this machine, or a lower one set by PPO_EXT_CPU_LEVEL."""
    if _native.status()["cpu"] != "loaded":
        return None
    return _LEVELS[torch.ops.ppo_ext_info.cpu_level()]


def _cuda(build: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"torch_cuda": torch.version.cuda, "driver": None, "devices": []}
    if not torch.cuda.is_available():
        return facts
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    facts["driver"] = f"{driver // 1000}.{driver % 1000 // 10}"
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        facts["devices"].append(
            {
                "name": torch.cuda.get_device_name(index),
                "capability": "{}.{}".format(*capability),
                "covered_by": coverage(capability, build.get("sass", []), build.get("ptx", [])),
            }
        )
    return facts


def coverage(capability: tuple[int, int], sass: list[str], ptx: list[str]) -> str | None:
    """What runs on a GPU of this (major, minor) capability: "SASS x.y", "PTX x.y" (compiled on first use) or None."""

    def parse(arch: str) -> tuple[int, ...]:
        return tuple(map(int, arch.rstrip("af").split(".")))

    def runs(arch: str) -> bool:
        return parse(arch) == capability if arch[-1] == "a" else parse(arch) <= capability

    binary = [arch for arch in sass if parse(arch)[0] == capability[0] and runs(arch)]
    if binary:
        return f"SASS {max(binary, key=parse)}"
    portable = [arch for arch in ptx if runs(arch) and (arch[-1] != "f" or parse(arch)[0] == capability[0])]
    return f"PTX {max(portable, key=parse)}" if portable else None


# ---- what is wrong --------------------------------------------------------------------------------------------------


def diagnose(report: dict[str, Any]) -> tuple[str | None, str | None]:
    """(the first problem found, the one command that fixes it), or (None, None)."""
    state, build, devices = report["libraries"], report["build"], report["cuda"]["devices"]
    needed = ["cpu", "cuda"] if devices else ["cpu"]
    missing = next((device for device in needed if state[device] != "loaded"), None)
    bare = [device["capability"] for device in devices if device["covered_by"] is None]
    failed = [device for device, result in report["selftest"].items() if not result["passed"]]
    if missing and os.environ.get("PPO_EXT_DISABLE_NATIVE") == "1":
        return state[missing], "unset PPO_EXT_DISABLE_NATIVE"
    if missing and _native._INSTALLED:
        return state[missing], f"cd / && {sys.executable} -m ppo_ext info"
    if missing:
        reason = build.get(missing, "built")
        problem = state[missing] if reason == "built" else f"{state[missing]} ({reason})"
        if "no C++ compiler" in reason:
            problem += "; the slow reference implementation was installed"
            return problem, f"apt-get install -y g++ && {_reinstall()}"
        return problem, _reinstall("CUDA_HOME=/usr/local/cuda PPO_EXT_CUDA=1 " if missing == "cuda" else "")
    driver, nvcc = report["cuda"]["driver"], build.get("nvcc")
    if driver and nvcc and int(driver.split(".")[0]) < int(nvcc.split(".")[0]):
        return f"kernels built by nvcc {nvcc} need a newer driver than this one for CUDA {driver}", _reinstall(
            f"CUDA_HOME=/usr/local/cuda-{driver} PPO_EXT_CUDA=1 "
        )
    if bare:
        archs = " ".join(sorted({*bare, *build.get("sass", [])}))
        return f"no kernels for a GPU of capability {bare[0]}", _reinstall(f'TORCH_CUDA_ARCH_LIST="{archs}" ')
    if failed:
        return f"the self-test fails on {', '.join(failed)}", _reinstall()
    return None, None


def _reinstall(variables: str = "") -> str:
    """The command that builds the package again from its source, and ends with an error if that is not possible."""
    editable = (_FOLDER.parent / "setup.py").exists()
    source = str(_FOLDER.parent) if editable else _install_source()
    # without --no-cache-dir pip may take the very wheel from its cache that is to be replaced
    how = "--editable" if editable else "--force-reinstall --no-cache-dir"
    return f"{variables}PPO_EXT_REQUIRE_NATIVE=1 {sys.executable} -m pip install --no-deps {how} {source}"


@functools.cache
def _install_source() -> str:
    """The folder that pip installed the package from if it still exists, else ".", to be run in a checkout."""
    try:
        text = importlib.metadata.distribution("ppo_ext").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        text = None
    url = urllib.parse.urlsplit(json.loads(text)["url"]) if text else None
    path = urllib.parse.unquote(url.path) if url and url.scheme == "file" else "."
    return path if os.path.exists(path) else "."


# ---- the text -------------------------------------------------------------------------------------------------------


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    build, cuda = report["build"], report["cuda"]
    lines = [
        f"ppo_ext {report['ppo_ext']} ({build.get('git') or 'no git commit recorded'}) in {report['folder']}",
        f"python {report['python']}, {report['platform']}",
        "packages     " + ", ".join(f"{name} {version or '-'}" for name, version in report["packages"].items()),
        "",
    ]
    for device, state in report["libraries"].items():
        note = build.get(device, "built")
        lines.append(f"_C_{device}.so".ljust(13) + state + ("" if note == "built" else f" ({note})"))
    lines += _render_build(build)
    cpu = report["cpu"]
    lines += [
        f"cpu          {'kernels for ' + cpu['level'] if cpu['level'] else 'reference'}, {cpu['threads']} threads",
        f"cuda         torch {cuda['torch_cuda'] or 'without CUDA'}, driver {cuda['driver'] or '-'}",
    ]
    for device in cuda["devices"]:
        lines.append(
            f"gpu          {device['name']}, capability {device['capability']}, "
            f"{device['covered_by'] or 'no kernels for it'}"
        )
    lines.append("environment  " + (", ".join(f"{k}={v}" for k, v in report["environment"].items()) or "-"))
    lines += ["", "op".ljust(32) + "cpu         cuda"]
    for name, native in report["ops"].items():
        lines.append(
            name.ljust(32)
            + ("native" if native["cpu"] else "reference").ljust(12)
            + ("native" if native["cuda"] else "reference")
        )
    for device, result in report["selftest"].items():
        lines += ["", f"self-test on {device}, largest error against the reference (passes up to {result['limit']:g})"]
        lines += [f"  {name.ljust(30)}{error:.1e}" for name, error in result["errors"].items()]
        lines += [f"  {name.ljust(30)}{message}" for name, message in result["raised"].items()]
    lines.append("")
    if report["problem"]:
        return "\n".join([*lines, f"problem: {report['problem']}", f"run: {report['fix']}"])
    return "\n".join([*lines, "everything fine"])


def _render_build(build: dict[str, Any]) -> list[str]:
    if not build:
        return ["build        no _build_info.json: the compiled part was never built here"]
    lines = [
        f"build        {build.get('date')}, torch {build.get('torch')}, stable ABI {build.get('torch_target')}, "
        f"{build.get('cxx')}" + (", debug" if build.get("debug") else "")
    ]
    if build.get("nvcc"):
        lines.append(f"             nvcc {build['nvcc']}, SASS {' '.join(build['sass'])}, PTX {' '.join(build['ptx'])}")
    return lines
