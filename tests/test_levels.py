"""The CPU kernels are compiled for several instruction sets. The best of the machine runs by default; here the others
run too."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from ops import OP_TESTS

from ppo_ext.info import report
from ppo_ext.ops import _native

TESTS = pathlib.Path(__file__).parent
OBJECTS = sorted((TESTS.parent / "build").glob("release*/*_simd.cpp.v*.o"))
LEVELS = {"1": "x86-64", "3": "x86-64-v3"}  # value of PPO_EXT_CPU_LEVEL: the level that it selects

pytestmark = [
    pytest.mark.skipif(_native.status()["cpu"] != "loaded", reason="the compiled part is not built here"),
    pytest.mark.skipif(report.cpu_level() != "x86-64-v4", reason="this machine has no other level to choose from"),
]


def run(*arguments, level):
    env = {**os.environ, "PPO_EXT_CPU_LEVEL": level, "PYTHONPATH": str(TESTS.parent), "PPO_EXT_TEST_DEVICE": "cpu"}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=TESTS.parent, capture_output=True, text=True)


@pytest.mark.parametrize("level", LEVELS)
def test_the_level_asked_for_runs(level):
    result = run("-c", "from ppo_ext.info import report; print(report.cpu_level())", level=level)
    assert result.stdout.strip() == LEVELS[level], result.stderr


@pytest.mark.parametrize("level", LEVELS)
def test_ops_pass_their_tests(level):
    files = [str(TESTS / name) for name in (*OP_TESTS, "test_hostile_values.py")]
    result = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not trl and not opcheck and not compiles",
        *files,
        level=level,
    )
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:]


@pytest.mark.skipif(not OBJECTS, reason="this checkout was not built in place")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_no_function_of_a_level_can_replace_another_files(path):
    """The linker keeps one of several weak definitions. One that was compiled for newer instructions would crash older
    machines."""
    symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line for line in symbols if re.match(r"[0-9a-f]* +[WVu] ", line)]
    assert any(" T " in line for line in symbols) and not weak


def test_levels_agree_to_rounding():
    code = (
        "import torch, ppo_ext; torch.manual_seed(0); x = torch.randn(8, 4099) * 3; y = torch.arange(8)\n"
        "print(ppo_ext.logprobs_and_entropy(x, y)[1].tolist())"
    )
    best, *others = (torch.tensor(json.loads(run("-c", code, level=level).stdout)) for level in ("4", *LEVELS))
    for other in others:
        torch.testing.assert_close(other, best, rtol=1e-6, atol=0)
