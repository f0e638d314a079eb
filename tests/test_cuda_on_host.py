"""The CUDA kernels, run without a GPU: g++ compiles the same .cu files, every CUDA thread is a fiber, and the tests of
the ops run on them.

`cuda_on_host/layer.h` describes the layer. A seed draws the order in which threads run, so that a missing barrier
shows; each load and store must touch memory that AddressSanitizer knows, and barriers must order accesses of different
threads. An error inside a kernel is an exception in the test that ran it.
"""

import concurrent.futures
import os
import subprocess
import sys

import pytest
from cuda_on_host import build
from ops import OP_TESTS

TESTS = build.HERE.parent
# On CUDA a label outside the vocabulary gives NaN instead of an error, which is tested below. Many rows take minutes here,
# and no grid has a second dimension, whose limit they would exceed: all go through `Launcher`.
SELECTION = "not ids_outside_the_vocabulary and not equals_trl and not more_rows_than_65535"
HOSTILE_TESTS = [f"test_{name}.py" for name in ("hostile_values", "hostile_operators", "properties")]
HALVES = ({"PPO_EXT_TEST_HALF": "0"}, {"PPO_EXT_TEST_HALF": "1"})  # each case of an op runs with one of two seeds
RUNS = {
    "ops, seed 0": (0, OP_TESTS, HALVES[0]),
    "ops, seed 1": (1, OP_TESTS, HALVES[1]),
    "hostile inputs, random inputs": (3, HOSTILE_TESTS, {}),
    "bounds and sizes": (2, ["test_large.py", "cuda_on_host/only_on_host.py"], {}),
}

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

BAD_IDS = """
import sys
import torch, ppo_ext

note = torch.zeros(4, dtype=torch.int64)
sys.modules["ppo_ext.ops.logprobs"].note = lambda device: note

logits = torch.randn(4, 3000, requires_grad=True)
clean, clean_entropy = ppo_ext.logprobs_and_entropy(logits.detach(), torch.zeros(4, dtype=torch.int64))
for bad in (-100, -1, 3000, 2**40):
    labels = torch.tensor([0, bad, 0, bad])
    logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, labels, mask=torch.tensor([1, 1, 1, 0]))
    grad, = torch.autograd.grad(logprobs.nansum() + entropy.nansum(), logits)
    assert logprobs[1].isnan() and (grad[1] == 0).all()
    assert logprobs[3] == 0 and (grad[3] == 0).all()
    assert torch.equal(logprobs[[0, 2]], clean[[0, 2]]) and (grad[[0, 2]] != 0).any()
    assert note.tolist() == [1, 1, bad, 3000], note
    note.zero_()
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder to import ppo_ext from whose CPU library holds the CUDA kernels."""
    return build.package(tmp_path_factory.mktemp("cuda_on_host"))


def run(package, *arguments, seed, variables=None):
    return subprocess.run(
        [sys.executable, *arguments],
        env=build.environment(package, seed) | (variables or {}),
        cwd=package,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def run_tests(package, names, seed, selection=SELECTION, variables=None):
    files = [str(TESTS / name) for name in names]
    return run(
        package,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "--rootdir",
        str(TESTS),
        "-c",
        os.devnull,
        "-k",
        selection,
        *files,
        seed=seed,
        variables=variables,
    )


@pytest.fixture(scope="module")
def runs(package):
    """All runs, started at once; each uses one core."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run_tests, package, files, seed, variables=variables)
            for name, (seed, files, variables) in RUNS.items()
        }


@pytest.mark.parametrize("name", RUNS)
def test_all_tests_pass(runs, name):
    result = runs[name].result()
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-3000:]


def test_the_library_under_test_is_this_one(package):
    result = run(package, "-c", "import ppo_ext; print(ppo_ext.__file__, ppo_ext.ops._native.status()['cpu'])", seed=0)
    assert result.stdout.split() == [str(package / "ppo_ext/__init__.py"), "loaded"]


def test_ids_outside_the_vocabulary_are_not_read(package):
    result = run(package, "-c", BAD_IDS, seed=0)
    assert result.returncode == 0, result.stderr[-2000:]
