"""The CUDA kernels, run without a GPU: the same .cu files compiled by g++, every CUDA thread a fiber, tested like the CPU.

`cuda_on_host/cuda_on_host.h` stands in for the device. Threads of a block take turns in an order shuffled by a seed, so
a missing barrier shows; a barrier that some threads never reach aborts.
"""

import concurrent.futures
import os
import pathlib
import platform
import subprocess
import sys

import pytest
import torch

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
OP_TESTS = ("logprobs", "full_kl", "gae", "rewards", "whiten", "ppo_loss", "hostile_values", "hostile_operators",
            "properties")
FLAGS = ["-x", "c++", "-std=c++17", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         "-include", str(TESTS / "cuda_on_host/prelude.h"), f"-I{TESTS / 'cuda_on_host'}", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the fibers switch by x86-64 instructions")

BAD_IDS = """
import sys
import torch, ppo_ext

note = torch.zeros(4, dtype=torch.int64)
sys.modules["ppo_ext.logprobs"].note = lambda device: note

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
    folder = tmp_path_factory.mktemp("cuda_on_host")
    torch_root = pathlib.Path(torch.__file__).parent

    def compile_one(source):
        target = folder / (source.stem + ".o")
        include = ["-isystem", str(torch_root / "include")]
        subprocess.run(["g++", *FLAGS, *include, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted((ROOT / "csrc").glob("*_cuda.cu"))))
    (folder / "ppo_ext").mkdir()
    for source in (ROOT / "ppo_ext").glob("*.py"):
        (folder / "ppo_ext" / source.name).symlink_to(source)
    libraries = torch_root / "lib"
    subprocess.run(["g++", "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}",
                    "-o", str(folder / "ppo_ext/_C_cpu.so")], check=True)
    return folder


def run(package, *arguments, seed):
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "CUDA_ON_HOST_SEED": str(seed),
           "PPO_EXT_REQUIRE_NATIVE": "1", "PPO_EXT_TEST_DEVICE": "cpu"}
    return subprocess.run([sys.executable, *arguments], env=env, cwd=package, capture_output=True, text=True)


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("op", OP_TESTS)
def test_the_tests_of_each_op_pass(package, op, seed):
    # On CUDA an id outside the vocabulary gives NaN instead of an error; that has a test of its own below.
    result = run(package, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(TESTS), "-c", os.devnull,
                 "-k", "not ids_outside_the_vocabulary and not equals_trl", str(TESTS / f"test_{op}.py"), seed=seed)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]


def test_the_library_under_test_is_this_one(package):
    result = run(package, "-c", "import ppo_ext; print(ppo_ext.__file__, ppo_ext._native.status()['cpu'])", seed=0)
    assert result.stdout.split() == [str(package / "ppo_ext/__init__.py"), "loaded"]


def test_ids_outside_the_vocabulary_are_not_read(package):
    result = run(package, "-c", BAD_IDS, seed=0)
    assert result.returncode == 0, result.stderr[-2000:]
