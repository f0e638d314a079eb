"""Compiles the CPU library against given headers with each of several compilers, warnings being errors."""

import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

from .packages import FOLDER, ROOT

# isort: split
from build_options import Options
from compile_library import plan
from native_build import NativeBuild, Tools


def check_compiler(torch, cxx, syntax_only=False):
    """Compiles every source. In the result "failures" holds what the compiler said, if anything."""
    if shutil.which(cxx) is None:
        package = cxx.replace("++", "")
        return {"torch": torch.version, "compiler": cxx, "failures": [f"not installed; apt-get install {package}"]}
    folder = FOLDER / f"objects-{torch.version}-{cxx}"
    folder.mkdir(parents=True, exist_ok=True)
    build = NativeBuild(ROOT, Options(cuda="0", require_native="1"), Tools(torch, [cxx]))
    *steps, _ = plan(build.cpu_library(), folder)
    begin = time.perf_counter()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        commands = [[*step.command, *["-fsyntax-only"] * syntax_only] for step in steps]
        said = list(pool.map(run_compiler, commands))
    return {
        "torch": torch.version,
        "compiler": build.facts["cxx"],
        "files": len(steps),
        "seconds": round(time.perf_counter() - begin, 1),
        "failures": [text for text in said if text],
    }


def run_compiler(command):
    """What the compiler said, "" if nothing."""
    result = subprocess.run(command, capture_output=True, text=True)
    said = (result.stdout + result.stderr).strip()
    return said or ("" if result.returncode == 0 else f"exit status {result.returncode}")
