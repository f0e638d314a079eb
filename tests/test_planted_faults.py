"""The host layer catches the faults that it is made for. Each of five faults is planted in the kernels; then a test
of theirs must fail with the right message. A fault is a change of text in a copy of csrc; without it the same tests
pass."""

import concurrent.futures
import dataclasses
import re
import shutil

import pytest
from cuda_on_host import build
from test_cuda_on_host import package, run_tests  # noqa: F401

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@dataclasses.dataclass(frozen=True)
class Fault:
    """In `file`, the text `right` is replaced by `wrong`, and the kernels of `op` are compiled with it. Then the tests
    in the file `tests` that the pytest `selection` names must fail, with a message that matches `seen`."""

    file: str
    right: str
    wrong: str
    op: str
    tests: str
    selection: str
    seen: str


FAULTS = {
    "missing barrier": Fault(
        "common/reduce.cuh",
        "    if (lane == 0) parts[warp] = state;\n    __syncthreads();\n    if (warp == 0) state = reduce_lanes",
        "    if (lane == 0) parts[warp] = state;\n    if (warp == 0) state = reduce_lanes",
        "masked",
        "test_masked.py",
        "test_few_entries_give_no_nan",
        r"masked_\w+, block \d+, thread \d+: a (load|store) of (8|24) bytes of shared memory must be separated by a "
        r"barrier from the (load|store) of thread \d+, got none \(csrc/common/reduce.cuh:\d+",
    ),
    "off-by-one tail": Fault(
        "common/load.cuh",
        "  if (last < in.V) {",
        "  if (last <= in.V) {",
        "logprobs",
        "test_logprobs.py",
        "test_half_logits_give_fp32_accurate_logprobs",
        r"logprobs, block \d+, thread \d+: a load of 2 bytes must touch allocated memory only \(AddressSanitizer\), got "
        r"0 bytes beyond the end of a heap block of \d+ bytes \(csrc/common/load.cuh:\d+",
    ),
    "misaligned vector load": Fault(
        "common/load.cuh",
        "    if (kAligned || (stride == 1 && beyond == 0)) {",
        "    if (kAligned || stride == 1) {",
        "logprobs",
        "test_logprobs.py",
        "test_views_give_the_same_bits",
        r"logprobs, block \d+, thread \d+: a use of a 'const struct Pack' must be at a multiple of 16 bytes, got an "
        r"address with remainder (2|4|8) \(csrc/common/load.cuh:\d+",
    ),
    "wrong shuffle mask": Fault(
        "common/reduce.cuh",
        "constexpr unsigned kWholeWarp = 0xffffffffu;",
        "constexpr unsigned kWholeWarp = 0x0000ffffu;",
        "kl_rewards",
        "test_kl_rewards.py",
        "test_hand_worked_case",
        r"kl_rewards, block 0, thread \d+: the mask must name lane (1[6-9]|2\d|3[01]), which calls, got "
        r"__shfl_down_sync \(reduce.cuh:\d+\) with mask 0x0000ffff",
    ),
    "int32 row offset": Fault(
        "common/rows.h",
        "return dims > 0 ? result + n * strides[0] : result;",
        "return dims > 0 ? result + int32_t(n * strides[0]) : result;",
        "logprobs",
        "test_large.py",
        "test_offsets_beyond_32_bits and logprobs",
        r"result \d: \d+ of \d+ entries differ",
    ),
}


def plant(fault, folder):
    """Makes a folder to import ppo_ext from, with the fault in the kernels of one op."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc)
    text = (csrc / fault.file).read_text()
    assert text.count(fault.right) == 1, f"{fault.file} must have this text once: {fault.right}"
    (csrc / fault.file).write_text(text.replace(fault.right, fault.wrong))
    return build.package(folder, {f"{fault.op}_cuda.cu": csrc})


@pytest.fixture(scope="module")
def outcomes(package, tmp_path_factory):  # noqa: F811
    """The outcome of the tests for each fault and, under None, without one; all are started at once, and each uses one
    core."""

    def run_with(fault):
        return run_tests(plant(fault, tmp_path_factory.mktemp("planted")), [fault.tests], 0, fault.selection)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        files = sorted({fault.tests for fault in FAULTS.values()})
        selection = " or ".join(f"({fault.selection})" for fault in FAULTS.values())
        yield {
            None: pool.submit(run_tests, package, files, 0, selection),
            **{name: pool.submit(run_with, fault) for name, fault in FAULTS.items()},
        }


def test_without_a_fault_the_tests_pass(outcomes):
    result = outcomes[None].result()
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(outcomes, name):
    result = outcomes[name].result()
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]
    assert re.search(FAULTS[name].seen, result.stdout), result.stdout[-3000:]
