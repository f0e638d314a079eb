"""`python -m ppo_ext info`: its facts, its diagnosis, and what it says about a broken install."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops import OPS

from ppo_ext.info import report, selftest
from ppo_ext.ops import _native

PACKAGE = Path(report.__file__).resolve().parent.parent


def run(*arguments, folder=PACKAGE.parent, **variables):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PPO_EXT_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": str(folder), **variables},
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the package whose build found no compiler."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copytree(
        PACKAGE, folder / "ppo_ext", ignore=shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    )
    facts = {
        "version": "0.1.0",
        "cpu": "not built: no C++ compiler found; install g++",
        "cuda": "not built: PPO_EXT_CUDA=0",
    }
    (folder / "ppo_ext/_build_info.json").write_text(json.dumps(facts))
    return folder


needs_native = pytest.mark.skipif(
    _native.status()["cpu"] != "loaded" and os.environ.get("PPO_EXT_REQUIRE_NATIVE") != "1",
    reason="the compiled part is not built here",
)


# ---- the command ----------------------------------------------------------------------------------------------------


@needs_native
def test_a_good_install_is_fine():
    result = run("-m", "ppo_ext", "info")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("everything fine")
    assert "self-test on cpu" in result.stdout and "_C_cpu.so    loaded" in result.stdout


@needs_native
def test_json_has_every_fact():
    result = run("-m", "ppo_ext", "info", "--json", OMP_NUM_THREADS="1")
    report = json.loads(result.stdout)
    assert set(report) == {
        "ppo_ext",
        "folder",
        "python",
        "platform",
        "packages",
        "build",
        "libraries",
        "ops",
        "cpu",
        "environment",
        "cuda",
        "selftest",
        "problem",
        "fix",
    }
    assert report["environment"]["OMP_NUM_THREADS"] == "1" and report["cpu"]["threads"] == 1
    assert report["ops"]["_gae"]["cpu"] and report["selftest"]["cpu"]["passed"] and report["problem"] is None


def test_a_missing_library_fails_and_names_the_fix(bare):
    result = run("-m", "ppo_ext", "info", folder=bare)
    assert result.returncode == 1
    problem, command = result.stdout.rstrip().splitlines()[-2:]
    assert problem == (
        "problem: _C_cpu.so was not built (not built: no C++ compiler found; install g++); "
        "the slow reference implementation was installed"
    )
    assert command.startswith("run: apt-get install -y g++ && ")
    assert "-m pip install --no-deps --force-reinstall --no-cache-dir" in command


@needs_native
def test_a_checkout_that_hides_the_installed_package(bare, tmp_path):
    """`python -m` puts the folder it is started in before site-packages; in a checkout nothing may be compiled."""
    shutil.copytree(PACKAGE, tmp_path / "ppo_ext", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ppo_ext-0.1.0.dist-info").mkdir()
    (tmp_path / "ppo_ext-0.1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: ppo_ext\nVersion: 0.1.0\n")
    path = os.pathsep.join(map(str, (bare, tmp_path)))
    result = run("-m", "ppo_ext", "info", PYTHONPATH=path)
    assert result.returncode == 1
    problem, command = result.stdout.rstrip().splitlines()[-2:]
    assert problem == (
        f"problem: {bare}/ppo_ext has no _C_cpu.so, and Python finds it before the installed {tmp_path}/ppo_ext"
    )
    assert command == f"run: cd / && {sys.executable} -m ppo_ext info"
    code = "import torch, ppo_ext; ppo_ext.masked_mean(torch.ones(2), torch.ones(2))"
    assert "To change that: start Python in another folder" in run("-c", code, PYTHONPATH=path).stderr


def test_a_missing_library_warns_once_and_still_works(bare):
    code = (
        "import torch, ppo_ext; x = torch.randn(3, 5, requires_grad=True); y = torch.tensor([0, 4, 2]);"
        "ours = [ppo_ext.logprobs(x, y) for _ in range(3)]; ours[0].sum().backward();"
        "assert torch.allclose(ours[0], x.log_softmax(-1)[[0, 1, 2], y]) and x.grad is not None"
    )
    result = run("-W", "always", "-c", code, folder=bare)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("Warning") == 1 and "python -m ppo_ext info" in result.stderr


def test_a_broken_library_is_quoted(bare, tmp_path):
    shutil.copytree(bare, tmp_path, dirs_exist_ok=True)
    (tmp_path / "ppo_ext/_C_cpu.so").write_bytes(b"no library")
    (tmp_path / "ppo_ext/_build_info.json").write_text('{"cpu": "built"}')
    result = run("-m", "ppo_ext", "info", folder=tmp_path)
    assert result.returncode == 1
    assert "problem: _C_cpu.so does not load: " in result.stdout and "PPO_EXT_REQUIRE_NATIVE=1" in result.stdout


def test_rejects_other_commands():
    result = run("-m", "ppo_ext", "inform")
    assert result.returncode == 2 and "invalid choice" in result.stderr


# ---- its parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, expected",
    [
        ((8, 0), "SASS 8.0"),
        ((8, 9), "SASS 8.0"),
        ((9, 0), "SASS 9.0"),
        ((10, 3), "SASS 10.0"),
        ((11, 0), "PTX 9.0"),
        ((12, 1), "SASS 12.0"),
        ((13, 0), "PTX 12.0"),
        ((7, 5), None),
    ],
)
def test_coverage(capability, expected):
    assert report.coverage(capability, ["8.0", "9.0", "10.0", "12.0"], ["9.0", "12.0"]) == expected


def test_coverage_of_architecture_specific_code():
    assert report.coverage((9, 0), ["9.0a"], []) == "SASS 9.0a"
    assert report.coverage((10, 0), [], ["9.0a"]) is None
    assert report.coverage((10, 3), ["10.0f"], []) == "SASS 10.0f"


def facts(cpu="loaded", cuda="loaded", covered="SASS 9.0", passed=True, driver="13.0"):
    device = {"name": "a GPU", "capability": "7.5", "covered_by": covered}
    return {
        "libraries": {"cpu": cpu, "cuda": cuda},
        "build": {"sass": ["9.0"], "nvcc": "13.0"},
        "cuda": {"devices": [device], "driver": driver},
        "selftest": {"cuda": {"passed": passed}},
    }


@pytest.mark.parametrize("driver", ["13.0", "13.2", None])
def test_diagnosis_of_a_good_report(driver):
    assert report.diagnose(facts(driver=driver)) == (None, None)


@pytest.mark.parametrize(
    "broken, problem, command",
    [
        (facts(cuda="_C_cuda.so was not built"), "_C_cuda.so was not built", "PPO_EXT_CUDA=1"),
        (facts(covered=None), "no kernels for a GPU of capability 7.5", 'TORCH_CUDA_ARCH_LIST="7.5 9.0"'),
        (
            facts(driver="12.8"),
            "kernels built by nvcc 13.0 need a newer driver than this one for CUDA 12.8",
            "CUDA_HOME=/usr/local/cuda-12.8 PPO_EXT_CUDA=1",
        ),
        (facts(passed=False), "the self-test fails on cuda", "pip install"),
    ],
)
def test_diagnosis_names_one_command(monkeypatch, broken, problem, command):
    monkeypatch.delenv("PPO_EXT_DISABLE_NATIVE", raising=False)
    found, fix = report.diagnose(broken)
    assert found == problem and command in fix


def test_diagnosis_of_a_disabled_library(monkeypatch):
    monkeypatch.setenv("PPO_EXT_DISABLE_NATIVE", "1")
    assert report.diagnose(facts(cpu="disabled"))[1] == "unset PPO_EXT_DISABLE_NATIVE"


@needs_native
def test_selftest_sees_a_wrong_op(monkeypatch):
    assert selftest.run(["cpu"])["cpu"]["passed"]
    monkeypatch.setattr("ppo_ext.gae", lambda values, rewards, mask: (values.detach(), values.detach()))
    result = selftest.run(["cpu"])["cpu"]
    assert not result["passed"] and not result["raised"] and result["errors"]["gae"] > 0.1


@needs_native
def test_selftest_runs_every_op():
    assert set(selftest.run(["cpu"])["cpu"]["errors"]) == set(OPS)


@needs_native
def test_selftest_sees_nan(monkeypatch):
    monkeypatch.setattr("ppo_ext.masked_mean", lambda values, mask: values.mean() * torch.nan)
    result = selftest.run(["cpu"])["cpu"]
    assert not result["passed"] and result["raised"] == {"masked_mean": "ArithmeticError: the result is not finite"}
