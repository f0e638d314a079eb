"""Runs the op tests of one wheel, built once, on several versions of torch, each in an environment of its own, where the
sources are installed as well."""

import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from .packages import FOLDER, OLDEST, ROOT, make_environment, newest_version, pip, run, without_path

TOLD = 500  # the last characters of an error that a row shows


def versions():
    """The torches that a wheel has to run on: the oldest, two between, and the newest of the package index."""
    return (OLDEST, "2.12.1", "2.13.0", newest_version())


def op_tests():
    """The test files of the ops."""
    from tests.ops import OP_TESTS  # imports the package, which the checks of compilers do without

    return [f"tests/{name}" for name in OP_TESTS]


def check_torch(version, wheel, compilers, keep=False):
    """Installs the wheel beside this torch, runs `info` and the op tests, then installs the sources by each compiler."""
    python = make_environment(version)
    pip(python, "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    report = json.loads(run([python, "-m", "ppo_ext", "info", "--json"]))
    begin = time.perf_counter()
    found = run_op_tests([python], op_tests())
    row = {
        "torch": report["packages"]["torch"],
        "python": report["python"],
        "cpu": report["libraries"]["cpu"],
        "cuda": report["libraries"]["cuda"],
        **total(found),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    for cxx in compilers:
        row["failures"] += install_sources(python, cxx)
    row["pip install ."] = ", ".join(compilers)
    if not keep:
        shutil.rmtree(FOLDER / f"environment-{version}")
    return row


def install_sources(python, cxx):
    """What went wrong in `pip install .` of a copy of the sources, without the CUDA kernels, and in `info` after it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT, folder, ignore=without_outputs, dirs_exist_ok=True)
        try:
            run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "ppo_ext"])
            arguments = ["install", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", folder]
            run([python, "-m", "pip", *arguments], CXX=cxx, PPO_EXT_CUDA="0", PPO_EXT_REQUIRE_NATIVE="1")
            printed = run([python, "-m", "ppo_ext", "info"])
        except RuntimeError as error:
            return [f"{cxx}: {str(error)[-TOLD:]}"]
    return [] if printed.rstrip().endswith("everything fine") else [f"{cxx}: {printed[-TOLD:]}"]


def without_outputs(folder, names):
    """What of a folder is no source."""
    built = {"build", "dist"} & set(names) if Path(folder) == ROOT else set()
    return built | {name for name in names if name.startswith(".") or name.endswith((".so", "_build_info.json"))}


# ---- op tests -------------------------------------------------------------------------------------------------------


def run_op_tests(interpreter, files, options=(), timeout=3600):
    """{file: {"passed", "skipped", "failures", "seconds"}} of tests that `interpreter` runs in one process, on a copy of
    tests/, away from this package."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("tests", "bench"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__", "results"))
        report = Path(folder, "report.xml")
        quietly = ["-q", "-p", "no:cacheprovider", "--benchmark-skip", "--show-capture=no", "--tb=line"]
        command = [*map(str, interpreter), "-m", "pytest", *quietly, f"--junitxml={report}", *options, *files]
        environment = {**without_path(), "PPO_EXT_REQUIRE_NATIVE": "1"}
        try:
            result = subprocess.run(
                command, cwd=folder, env=environment, timeout=timeout, capture_output=True, text=True
            )
        except subprocess.TimeoutExpired:
            return {file: outcome([f"not done after {timeout} seconds"]) for file in files}
        found = read_report(report, files) if report.exists() else {file: outcome() for file in files}
    if result.returncode != 0 and not any(row["failures"] for row in found.values()):
        found[files[0]]["failures"] = [(result.stdout + result.stderr)[-TOLD:]]
    return found


def outcome(failures=()):
    return {"passed": 0, "skipped": 0, "failures": list(failures), "seconds": 0.0}


def read_report(path, files):
    """The counts of each file in a report in JUnit's format. What failed outside of them counts for the first one."""
    found = {file: outcome() for file in files}
    for case in ElementTree.parse(path).iter("testcase"):
        file = f"{case.get('classname', '').replace('.', '/')}.py"
        row = found.get(file, found[files[0]])
        row["seconds"] = round(row["seconds"] + float(case.get("time", 0)), 1)
        if case.find("failure") is not None or case.find("error") is not None:
            row["failures"].append(f"{file}::{case.get('name')}")
        else:
            row["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def total(found):
    """The counts of all files together."""
    rows = found.values()
    failures = [text for row in rows for text in row["failures"]]
    return {
        "passed": sum(row["passed"] for row in rows),
        "skipped": sum(row["skipped"] for row in rows),
        "failures": failures,
    }
