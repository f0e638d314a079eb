"""Runs the op tests of one wheel, built once, on several versions of torch, each in an environment of its own."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from .packages import FOLDER, OLDEST, ROOT, make_environment, newest_version, pip, run


def versions():
    """The torches that a wheel has to run on: the oldest, two between, and the newest of the package index."""
    return (OLDEST, "2.12.1", "2.13.0", newest_version())


def op_tests():
    """The test file of each op that has a compiled implementation."""
    stems = sorted(path.name.removesuffix("_cpu.cpp") for path in (ROOT / "csrc").glob("*_cpu.cpp"))
    return [f"tests/test_{stem}.py" for stem in stems if (ROOT / f"tests/test_{stem}.py").exists()]


def check_torch(version, wheel, keep=False):
    """Installs the wheel beside this torch, runs `info` and the op tests, and returns what they say."""
    python = make_environment(version)
    pip(python, "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    report = json.loads(run([python, "-m", "ppo_ext", "info", "--json"]))
    begin = time.perf_counter()
    outcome = run_op_tests([python], op_tests())
    row = {
        "torch": report["packages"]["torch"],
        "python": report["python"],
        "cpu": report["libraries"]["cpu"],
        "cuda": report["libraries"]["cuda"],
        **outcome,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if not keep:
        shutil.rmtree(FOLDER / f"environment-{version}")
    return row


def run_op_tests(interpreter, files, timeout=3600):
    """{"passed", "skipped", "failures"} of tests run by `interpreter` on a copy of tests/, away from this package."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tests", "bench"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__", "results"))
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-skip", "--show-capture=no", "--tb=line"]
        environment = {**os.environ, "PPO_EXT_REQUIRE_NATIVE": "1"}
        try:
            result = subprocess.run(
                [*map(str, interpreter), "-m", "pytest", *options, *files],
                cwd=folder,
                env=environment,
                timeout=timeout,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired:
            return {"passed": 0, "skipped": 0, "failures": [f"not done after {timeout} seconds"]}
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", result.stdout[-300:])}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 0 and not failures:
        failures = [(result.stdout + result.stderr)[-500:]]
    return {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0), "failures": failures}
