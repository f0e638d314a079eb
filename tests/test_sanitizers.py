"""The tests of the ops pass without a report with the CPU kernels under AddressSanitizer and
UndefinedBehaviorSanitizer, and with their threads under ThreadSanitizer. Faults that are planted in copies of the
sources show that reports would come."""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from ops import OP_TESTS
from sanitized import build

# Tests that spend their time in torch and not in the kernels are left out.
SELECTION = "not trl and not opcheck and not compile and not gradcheck"
HALF = dataclasses.replace(build.THREAD, options=build.THREAD.options | {"PPO_EXT_TEST_HALF": "0"})  # it runs slowly
RUNS = {
    "address and undefined": (build.ADDRESS, [*OP_TESTS, "test_hostile_values.py", "test_hostile_operators.py"]),
    "thread": (HALF, [*OP_TESTS, "test_large.py"]),
}

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both runs, started at once; each uses one core."""

    def build_and_run(folder, sanitizer, files):
        return build.run_tests(build.package(folder, sanitizer), sanitizer, SELECTION, *files)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(build_and_run, tmp_path_factory.mktemp("sanitized"), *run) for name, run in RUNS.items()
        }


@pytest.mark.parametrize("name", RUNS)
def test_the_tests_pass_without_a_report(runs, name):
    result = runs[name].result()
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-5000:]
    reports = [line for line in result.stderr.splitlines() if re.search("ERROR: |WARNING: Thread|runtime error", line)]
    assert reports == []


# ---- planted faults -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    sanitizer: build.Sanitizer
    file: str
    right: str
    wrong: str
    tests: str
    selection: str
    seen: str  # a regular expression that the report matches


FAULTS = {
    "write beyond the end": Fault(
        build.ADDRESS,
        "logprobs_simd.cpp",
        "store_tail(y + i, gradient_of<kEntropy>(load_tail(x + i, n - i), row, powers), n - i);",
        "store(y + i, gradient_of<kEntropy>(load_tail(x + i, n - i), row, powers));",
        "test_logprobs.py",
        "logprobs",
        "AddressSanitizer: (heap-buffer-overflow|unknown-crash)",
    ),
    "misaligned load": Fault(
        build.ADDRESS,
        "ppo_loss_cpu.cpp",
        "job.stats[kGradScale]",
        "*reinterpret_cast<const A*>(reinterpret_cast<const char*>(job.stats) + 1)",
        "test_ppo_loss.py",
        "ppo_loss",
        "runtime error: load of misaligned address",
    ),
    "two threads, one place": Fault(
        build.THREAD,
        "ppo_loss_cpu.cpp",
        "parts[b] = PPO_AT_LEVEL",
        "parts[0] = PPO_AT_LEVEL",
        "test_ppo_loss.py",
        "ppo_loss",
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name, tmp_path):
    fault = FAULTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    text = (csrc / fault.file).read_text()
    assert text.count(fault.right) == 1
    (csrc / fault.file).write_text(text.replace(fault.right, fault.wrong))
    package = build.package(tmp_path / "package", fault.sanitizer, {fault.file: csrc})
    result = build.run_tests(package, fault.sanitizer, f"{fault.selection} and {SELECTION}", fault.tests)
    assert result.returncode != 0 and re.search(fault.seen, result.stderr), result.stdout[-2000:] + result.stderr[:3000]


# ---- warnings -------------------------------------------------------------------------------------------------------


def test_a_warning_is_an_error_where_native_parts_are_required(tmp_path):
    """Builds the CPU library from a copy of the project in which a variable is unused."""
    root = pathlib.Path(__file__).parent.parent
    for name in ("csrc", "_build", "ppo_ext"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    source = tmp_path / "csrc" / "common" / "levels_cpu.cpp"
    source.write_text(source.read_text() + "\nstatic int planted(int unused) { int x; return 0; }\n")
    env = {**os.environ, "PPO_EXT_REQUIRE_NATIVE": "1", "PPO_EXT_CUDA": "0", "MAX_JOBS": "2"}
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    output = result.stdout + result.stderr
    assert result.returncode != 0 and "[-Werror=unused" in output, output[-3000:]
