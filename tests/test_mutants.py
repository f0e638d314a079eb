"""Each mutant still applies, the kept outcomes are of the present list, and two mutants are run. `make mutants` runs
all."""

import dataclasses
import json
import pathlib

import pytest
from mutants import check
from mutants.table import CPU, CUDA, MUTANTS, PYTHON

ROOT = pathlib.Path(__file__).parent.parent
CHEAP = {PYTHON: "the advantages stand in for the mask", CUDA: "the score falls on the padding on CUDA"}

on_this_machine = pytest.mark.skipif(check.on_host.missing() is not None, reason=str(check.on_host.missing()))


def named(name):
    return next(mutant for mutant in MUTANTS if mutant.name == name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_has_tests(mutant):
    assert check.mutated_text(mutant) != (ROOT / mutant.file).read_text()
    assert all((ROOT / "tests" / name).exists() for name in mutant.tests.split())


def test_every_kernel_and_every_loop_has_a_mutant():
    mutated = {mutant.file for mutant in MUTANTS}
    kernels = {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*_cuda.cu")}
    vectors = {f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*_simd.cpp")}
    assert kernels | vectors <= mutated and len(kernels) >= 6
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_all_were_killed_when_all_were_made():
    kept = json.loads((ROOT / "bench/evidence/mutants.json").read_text())["mutants"]
    assert [row["name"] for row in kept] == [mutant.name for mutant in MUTANTS]
    assert all(row["killed_by"] for row in kept)


@on_this_machine
@pytest.mark.parametrize("side", CHEAP)
def test_a_mutant_is_killed(side, tmp_path):
    outcome = check.check(named(CHEAP[side]), tmp_path)
    assert outcome.killed_by and outcome.killed_by.startswith("test_"), outcome


def test_a_mutant_that_changes_nothing_survives(tmp_path):
    mutant = dataclasses.replace(
        named(CHEAP[PYTHON]),
        wrong=named(CHEAP[PYTHON]).right,
        tests="test_ppo_loss.py",
        selection="hand_worked or matches_float64",
    )
    assert check.check(mutant, tmp_path).killed_by is None


def test_what_noticed_a_change_has_to_pass_without_one(tmp_path, monkeypatch):
    mutant = named(CHEAP[PYTHON])
    killed_by = "test_ppo_loss.py::test_hand_worked_case[cpu]"
    outcome = check.Outcome(mutant.name, mutant.side, mutant.file, killed_by, 1.0)
    for name in ("unchanged", "changed"):
        (tmp_path / name).mkdir()
    assert check.failure_without([mutant], [outcome], tmp_path / "unchanged") is None
    package = check.package
    monkeypatch.setattr(check, "package", lambda mutant, folder, mutate: package(mutant, folder))
    assert check.failure_without([mutant], [outcome], tmp_path / "changed") == killed_by


def test_what_includes_a_header_is_compiled_again():
    assert "common/moments.h" in check.includes("ppo_loss_cpu.cpp", check.on_host.CSRC)
    assert "gae.h" not in check.includes("ppo_loss_cpu.cpp", check.on_host.CSRC)
    assert {mutant.side for mutant in MUTANTS} == {PYTHON, CPU, CUDA}
