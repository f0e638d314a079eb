"""The steps of bench/on_gpu.sh in their order, the most important first, and the function that runs one of them."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.ops import OP_TESTS

from . import sass

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Step:
    """`command` starts with a tool or with "python", and may contain {device} and {results}. `needs`: modules that
    must be installed. If a `required` step does not pass, the following steps are skipped: they would test something
    else."""

    name: str
    seconds: float
    command: tuple
    needs: tuple = ()
    gpu_only: bool = False
    required: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    step: str
    result: str  # passed, failed, timeout, missing or skipped
    seconds: float = 0.0
    note: str = ""


# ---- the steps ------------------------------------------------------------------------------------------------------

_OPS = [f"tests/{name}" for name in OP_TESTS]
# not in the step "suite": files that have a step of their own, and files in which the device changes nothing
_NOT_SUITE = [
    *_OPS,
    *(
        f"tests/test_{name}.py"
        for name in (
            "gpu",
            "large",
            "on_gpu",
            "static_report",
            "cuda_on_host",
            "host_layer",
            "planted_faults",
            "packaging",
            "bench",
            "build",
            "demo_rlhf",
            "demo_rlhf_parts",
            "demo_sentiment",
            "demo_sentiment_parts",
            "examples_on_a_model",
            "find_tools",
            "manylinux",
            "mutants",
            "platforms",
            "third_party",
        )
    ),
]
_LOADED = """
import sys, ppo_ext
state = ppo_ext.ops._native.status()[sys.argv[1]]
print(f"the library of {sys.argv[1]}: {state}")
sys.exit(state != "loaded")
"""


def _pytest(name, seconds, *arguments, **more):
    command = ("python", "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *arguments)
    return Step(
        name, seconds, command, needs=("pytest", "pytest_benchmark"), **more
    )  # pyproject.toml has an option of the second


def _sanitizer(tool, *options):
    command = (
        "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--report-api-errors",
        "no",
        *options,
        "python",
        "tests/sanitizer_driver.py",
        "--device",
        "{device}",
    )
    return Step(tool, 90, command, gpu_only=True)


# racecheck and synccheck make kernels up to twenty times slower, so they watch ours only. initcheck must see all writes.
_OUR_KERNELS = ("--kernel-name", "kernel_substring=ppo_ext")
STEPS = (
    Step(
        "build", 240, ("python", "setup.py", "--quiet", "build_ext", "--inplace"), needs=("setuptools",), required=True
    ),
    Step("load", 60, ("python", "-c", _LOADED, "{device}"), required=True),
    Step("info", 60, ("python", "-m", "ppo_ext", "info")),
    _pytest("ops", 180, *_OPS),
    _pytest("graphs", 90, "tests/test_gpu.py", "-k", "not large and not repeated"),
    _pytest("large", 90, "tests/test_gpu.py", "tests/test_large.py", "-k", "large", gpu_only=True),
    _pytest("repeat", 150, "tests/test_gpu.py", "-k", "repeated"),
    _sanitizer("memcheck", "--padding", "32"),
    _sanitizer("racecheck", *_OUR_KERNELS),
    _sanitizer("initcheck"),
    _sanitizer("synccheck", *_OUR_KERNELS),
    Step("bench", 480, ("python", "-m", "bench", "--device", "{device}", "--seconds", "0.3", "--save", "{results}")),
    Step(
        "ncu",
        60,
        (
            "ncu",
            "--csv",
            "--page",
            "details",
            "--section",
            "SpeedOfLight",
            "--section",
            "Occupancy",
            "--kernel-name",
            "regex:(forward|backward)_kernel",
            "python",
            "-m",
            "bench.hot_kernels",
        ),
        gpu_only=True,
    ),
    _pytest("suite", 300, "tests", *(f"--ignore={path}" for path in _NOT_SUITE)),
)


# ---- one step -------------------------------------------------------------------------------------------------------


def first_failure(log):
    """The first line of a log that says what went wrong, in the form of pytest, compute-sanitizer or Python; else the
    last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (
        r"(FAILED|ERROR) ",
        r"=========\s+(?!COMPUTE-SANITIZER|ERROR SUMMARY)\S",
        r"[\w.]*(Error|Exception)\b",
    ):
        for line in lines:
            if re.match(pattern, line):
                return line[:300]
    return lines[-1][:300] if lines else "no output"


def missing_part(step, environment):
    """The first module or tool that a step needs and that is not installed, else None."""
    for module in step.needs:
        if subprocess.run([sys.executable, "-c", f"import {module}"], env=environment, capture_output=True).returncode:
            return f"module {module}"
    try:
        _program(step.command[0])
    except sass.ToolMissing:
        return step.command[0]
    return None


def _program(word):
    return sys.executable if word == "python" else sass.find_tool(word)


def run(step, places, seconds, log, environment):
    """Runs one step with its output in the file `log`; ends it and its child processes after `seconds`."""
    missing = missing_part(step, environment)
    if missing:
        return Result(step.name, "missing", note=missing)
    start = time.monotonic()
    places = {"python": sys.executable, **places}
    command = [_program(step.command[0]), *(places.get(word, word) for word in step.command[1:])]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took, text = round(time.monotonic() - start, 1), log.read_text(errors="replace")
    if status == 0:
        return Result(step.name, "passed", took, text.strip().rpartition("\n")[2][:300])
    return Result(step.name, "timeout" if status is None else "failed", took, first_failure(text))
