"""Runs the tests of a mutant on a copy of the part that it changes: the Python package, the CPU library, or the CUDA
kernels on the host layer. Only the sources that include the changed file are compiled again."""

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from cuda_on_host import build as on_host
from sanitized import build as on_cpu

from .table import CPU, CUDA

TESTS = pathlib.Path(__file__).parent.parent
ROOT = TESTS.parent
PLAIN = on_cpu.Sanitizer((), (), {})
# Comparisons with TRL and torch.compile would find few more mutants than those with float64, and take most of the time.
_LEFT_OUT = "not opcheck and not compile and not ids_outside_the_vocabulary"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`killed_by`: the first test that failed, or None. `seconds`: the time to compile and to run the tests."""

    name: str
    side: str
    file: str
    killed_by: str | None
    seconds: float


def includes(name, csrc, found=None):
    """The names, relative to csrc, of the source itself and of all files that it includes, directly or not."""
    found = set() if found is None else found
    if name not in found and (csrc / name).exists():
        found.add(name)
        for other in re.findall(r'#include "([^"]+)"', (csrc / name).read_text()):
            includes(os.path.normpath(os.path.join(os.path.dirname(name), other)), csrc, found)
    return found


def mutated_text(mutant):
    text = (ROOT / mutant.file).read_text()
    count = text.count(mutant.right)
    if count != 1:
        raise ValueError(f"mutants: the text of {mutant.name!r} must occur once in {mutant.file}, got {count}")
    return text.replace(mutant.right, mutant.wrong)


def _csrc(mutant, folder):
    """(a copy of csrc with the mutant, the sources that include the changed file)."""
    csrc = folder / "csrc"
    shutil.copytree(on_host.CSRC, csrc)
    changed = mutant.file.removeprefix("csrc/")
    (csrc / changed).write_text(mutated_text(mutant))
    pattern = "*_cuda.cu" if mutant.side == CUDA else "*.cpp"
    sources = [str(path.relative_to(csrc)) for path in csrc.rglob(pattern)]
    return {source: csrc for source in sources if changed in includes(source, csrc)}


def package(mutant, folder, mutate=True):
    """Makes a folder to import the mutant from or, with mutate=False, the same without the change."""
    target = folder / "package"
    target.mkdir()
    if mutant.side == CUDA:
        return on_host.package(target, _csrc(mutant, folder) if mutate else None)
    if mutant.side == CPU:
        return on_cpu.package(target, PLAIN, _csrc(mutant, folder) if mutate else None)
    on_host.link_python(target)
    for path in (ROOT / "ppo_ext").glob("_C_*.so"):
        (target / "ppo_ext" / path.name).symlink_to(path)
    if mutate:
        changed = target / mutant.file
        changed.unlink()
        changed.write_text(mutated_text(mutant))
    return target


def run_tests(mutant, folder, tests=None):
    """Runs the tests of a mutant, or these ones, on the package in `folder`."""
    env = (
        on_host.environment(folder, seed=0)
        if mutant.side == CUDA
        else {**os.environ, "PYTHONPATH": str(folder), "PPO_EXT_REQUIRE_NATIVE": "1", "PPO_EXT_TEST_DEVICE": "cpu"}
    )
    if mutant.side == CPU:
        env["OMP_NUM_THREADS"] = "2"
    selection = f"({mutant.selection}) and {_LEFT_OUT}" if mutant.selection else _LEFT_OUT
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(TESTS),
        "-c",
        os.devnull,
        "-k",
        selection,
        *(str(TESTS / name) for name in tests or mutant.tests.split()),
    ]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=900)


def first_failure(result):
    """The first test that failed, or how the process ended; None if all tests passed."""
    if result.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py::.+?)(?: - .*)?$", result.stdout, re.M)
    if found is None and result.returncode > 0 and "AddressSanitizer" not in result.stderr:
        raise RuntimeError(f"mutants: the tests must run, got {result.stdout[-2000:]}{result.stderr[-2000:]}")
    return found[1] if found else f"the process, with status {result.returncode}"


def check(mutant, folder, mutate=True):
    """Makes the mutant in `folder`, which must be empty, and runs its tests."""
    start = time.perf_counter()
    killed_by = first_failure(run_tests(mutant, package(mutant, folder, mutate)))
    return Outcome(mutant.name, mutant.side, mutant.file, killed_by, round(time.perf_counter() - start, 1))


def failure_without(mutants, outcomes, folder):
    """The first test that failed without a change among those that noticed one, or None.

    mutants: of one side. A process that ended by itself names no test; for it all tests of its mutant run.
    """
    tests = set()
    for mutant, outcome in zip(mutants, outcomes, strict=True):
        killed_by = outcome.killed_by or ""
        tests |= {killed_by} if killed_by.startswith("test_") else set(mutant.tests.split())
    anything = dataclasses.replace(mutants[0], selection="")
    return first_failure(run_tests(anything, package(anything, folder, mutate=False), sorted(tests)))
