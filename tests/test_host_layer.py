"""The layer that runs CUDA kernels on the host: each primitive does what CUDA's does, and misuse is an error.

The kernels of these tests are in cuda_on_host/kernels. Tests that need AddressSanitizer are in
cuda_on_host/only_on_host.py.
"""

import re

import pytest
import torch
from cuda_on_host import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

SEEDS = range(8)


@pytest.fixture(scope="module")
def module():
    return build.load_layer(build.test_kernels())


@pytest.fixture
def layer(module):
    module.take_counters()
    yield module
    module.set_seed(0)
    module.set_races(True)
    module.set_max_blocks(2**31 - 1)


def launch(layer, name, blocks=1, threads=64, n=0, data=None):
    data = torch.zeros(4096, dtype=torch.int32) if data is None else data
    layer.launch(name, blocks, threads, data.data_ptr(), n)
    return data


def by_seed(layer, *arguments, **options):
    for seed in SEEDS:
        layer.set_seed(seed)
        yield launch(layer, *arguments, **options)


# ---- what works -----------------------------------------------------------------------------------------------------


def test_every_thread_of_every_block_runs_once(layer):
    data = launch(layer, "indices", blocks=5, threads=96)
    assert data[:480].tolist() == [5000 + 10000 * block + thread for block in range(5) for thread in range(96)]
    counters = layer.take_counters()
    assert (counters["grids"], counters["blocks"], counters["stores"]) == (1, 5, 480)
    assert layer.take_counters()["blocks"] == 0


def test_the_seed_draws_the_order_of_threads(layer):
    orders = [data[:64].tolist() for data in by_seed(layer, "arrivals", n=64)]
    assert all(sorted(order) == list(range(64)) for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    assert orders == [data[:64].tolist() for data in by_seed(layer, "arrivals", n=64)]
    runs_ahead = [len({thread // 32 for thread in order[:32]}) == 1 for order in orders]
    assert any(runs_ahead) and not all(runs_ahead)


def test_the_seed_draws_the_order_of_blocks(layer):
    orders = [data[:12].tolist() for data in by_seed(layer, "arrivals", blocks=12, threads=1, n=12)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) > 4


def test_barriers(layer):
    for data in by_seed(layer, "neighbour", blocks=2, threads=256):
        assert data[:512].tolist() == [(t + 1) % 256 for t in range(256)] * 2
    for data in by_seed(layer, "neighbour_in_warp"):
        assert data[:64].tolist() == [t ^ 1 for t in range(64)]


@pytest.mark.parametrize("n", (0, 1, 7, 31))
def test_shuffles(layer, n):
    def sources(thread):
        begin, lane = thread // 32 * 32, thread % 32
        return n, lane + n if lane + n < 32 else lane, lane - n if lane >= n else lane, lane ^ n, begin

    expected = [[100 + begin + lane for lane in lanes] for *lanes, begin in map(sources, range(64))]
    for data in by_seed(layer, "shuffles", n=n):
        assert data[:256].reshape(64, 4).tolist() == expected


def test_masks_of_half_a_warp(layer):
    for data in by_seed(layer, "halves"):
        assert data[:64].tolist() == [120] * 16 + [1] * 16 + [16 * 32 + 120] * 16 + [0] * 16


@pytest.mark.parametrize("n", (0, 1, 31, 32))
def test_votes(layer, n):
    ballot = 2**n - 1 - (2**32 if n == 32 else 0)
    for data in by_seed(layer, "votes", n=n):
        assert data[:192].reshape(64, 3).tolist() == [[n > 0, n == 32, ballot]] * 64


def test_atomics(layer):
    start = torch.tensor([0, -5, -1, 1, 0, 0], dtype=torch.int32)
    for seed in SEEDS:
        layer.set_seed(seed)
        data = launch(layer, "atomics", blocks=2, data=start.clone())
        total, largest, last, power = data[:4].tolist()
        assert (total, largest, power) == (128 * 127 // 2, 127, pow(3, 128, 1000003))
        assert 0 <= last < 128 and data.view(torch.float32)[4] == 64.0 and data[5] == 0


def test_the_last_block_may_read_what_others_wrote(layer):
    for data in by_seed(layer, "last_block_adds", blocks=8, threads=1, n=8):
        assert data[9] == 28


def test_vector_accesses_are_counted(layer):
    data = torch.arange(1024, dtype=torch.int32)
    launch(layer, "copy_packs", n=64, data=data)
    assert data[256:512].tolist() == list(range(256))
    assert layer.take_counters()["vector_accesses"] == 128


# ---- what is an error -----------------------------------------------------------------------------------------------

UNORDERED = (
    "a (load|store) of 4 bytes of {} memory must be separated by a barrier from the (load|store) of {}, got none"
)
IN_SHARED = UNORDERED.format("shared", r"thread \d+")
SAME_CALL = "all lanes of a mask must make the same call, got "
WRONG = {  # name: options, what the error says
    "no_barrier": ({}, IN_SHARED),
    "no_second_barrier": ({}, IN_SHARED),
    "no_syncwarp": ({}, IN_SHARED),
    "shuffle_for_a_barrier": ({}, IN_SHARED),
    "counts_without_atomics": ({}, UNORDERED.format("global", r"thread \d+")),
    "reads_the_block_before": ({"blocks": 4, "threads": 1}, UNORDERED.format("global", "another block")),
    "barrier_for_some": (
        {"n": 5},
        r"every thread must reach the __syncthreads at wrong.cu:\d+, got 63 of 64 there, while thread 5 has ended",
    ),
    "two_barriers_at_once": (
        {"n": 5},
        r"every thread must reach the same __syncthreads, got wrong.cu:\d+ and wrong.cu:\d+",
    ),
    "mask_without_the_caller": (
        {},
        r"the mask must name lane (1[6-9]|2\d|3[01]), which calls, got __shfl_down_sync \(wrong.cu:\d+\) with mask "
        "0x0000ffff",
    ),
    "shuffle_for_some": (
        {"n": 5},
        r"every lane that the mask names must make the call, got __shfl_down_sync \(wrong.cu:\d+\) with mask "
        "0xffffffff in lanes 0xffffffdf only",
    ),
    "source_outside_the_mask": (
        {},
        "lane 15 must read from a lane that the mask names, got lane 16 in __shfl_down_sync",
    ),
    "different_calls": ({"n": 5}, SAME_CALL + "__a(ll|ny)_sync .* and __a(ll|ny)_sync"),
    "different_masks": ({}, SAME_CALL + "__any_sync .* mask 0xfffffff[ef] .* mask 0xfffffff[ef]"),
    "different_lines": ({"n": 5}, SAME_CALL + r"__any_sync \(wrong.cu:\d+\)"),
    "too_much_shared": ({"threads": 1, "n": 49156}, "the bytes of shared memory must be between 1 and 49152, got 4915"),
    "beyond_shared": ({"threads": 1, "n": 4}, r"an index must be within its array, got 4 \(wrong.cu:\d+\)"),
    "beyond_local": (
        {"threads": 1},
        r"a load of a 'int' must be within its variable, got one beyond it \(wrong.cu:\d+\)",
    ),
    "divides_by": ({"threads": 1, "n": 0}, "a quotient must fit into its integer type"),
    "shifts_by": ({"threads": 1, "n": 32}, "a shift must be by less than the bits of its type"),
    "casts": ({"threads": 1, "n": 2**30}, "a number must fit into the integer type it is cast to"),
}
OVERFLOWS = {
    "adds_one": (2**31 - 1, "a sum must fit"),
    "subtracts_one": (-(2**31), "a difference must fit"),
    "doubles": (2**30, "a product must fit"),
    "negates": (-(2**31), "a negated number must fit"),
    "reads_bool": (7, "a bool must be 0 or 1"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_an_error_whatever_the_order(layer, name, seed):
    layer.set_seed(seed)
    options, text = WRONG[name]
    with pytest.raises(layer.KernelError, match=rf"^{name}(, block \d+, thread \d+)?: .*{text}"):
        launch(layer, name, **options)
    assert launch(layer, "neighbour", threads=32)[:32].tolist() == [*range(1, 32), 0], "the layer must go on working"


@pytest.mark.parametrize("threads", (32, 64))
def test_a_store_after_loads_of_others_is_an_error(layer, threads):
    for n in range(threads):  # the storing thread is another one each time, at some point the last one
        with pytest.raises(layer.KernelError, match=UNORDERED.format("global", r"(thread \d+|several warps)")):
            launch(layer, "one_stores_what_all_load", threads=threads, n=n)


@pytest.mark.parametrize("name", OVERFLOWS)
def test_overflow_is_an_error(layer, name):
    value, text = OVERFLOWS[name]
    data = torch.tensor([value], dtype=torch.int32)
    with pytest.raises(layer.KernelError, match=text):
        launch(layer, name, threads=1, data=data)
    launch(layer, name, threads=1, data=data.sign().abs())  # with 1 there is no overflow


@pytest.mark.parametrize("offset", (1, 2, 3))
def test_vector_accesses_must_be_aligned(layer, offset):
    data = torch.zeros(1024, dtype=torch.int32)[offset:]
    text = (
        r"a use of a 'const struct Pack' must be at a multiple of 16 bytes, got an address with remainder "
        rf"{4 * offset} \(load.cuh:\d+\)"
    )
    with pytest.raises(layer.KernelError, match=text):
        launch(layer, "copy_packs", n=64, data=data)


@pytest.mark.parametrize("name", ("no_barrier", "no_second_barrier", "no_syncwarp"))
def test_without_a_barrier_the_order_shows(layer, name):
    """With the check for unordered accesses switched off, the results depend on the order of the threads."""
    layer.set_races(False)
    results = [data[:128].tolist() for data in by_seed(layer, name)]
    right = {
        "no_barrier": [(t + 32) % 64 for t in range(64)] + [0] * 64,
        "no_second_barrier": [0] * 64 + [1] * 64,
        "no_syncwarp": [t ^ 1 for t in range(64)] + [0] * 64,
    }[name]
    assert all(result != right for result in results)


def test_shared_memory_begins_as_garbage(layer):
    found = set()
    for data in by_seed(layer, "reads_shared_before_writing", threads=1):
        number, integer = data.view(torch.float32)[0], data[2:4].view(torch.int64).item()
        assert number.isnan() and abs(integer) > 2**50
        found.add(integer > 0)
    assert found == {False, True}


def test_shared_memory_is_measured(layer):
    launch(layer, "neighbour", threads=256)
    assert layer.take_counters()["shared_bytes"] == 1024
    launch(layer, "too_much_shared", threads=1, n=49152)
    assert layer.take_counters()["shared_bytes"] == 49152


def test_grids_must_be_possible(layer):
    layer.set_max_blocks(10)
    for options, text in (
        ({"threads": 1025}, "threads of a block must be between 1 and 1024, got 1025"),
        ({"threads": 0}, "threads of a block must be between 1 and 1024, got 0"),
        ({"blocks": 11}, "blocks of a grid must be between 1 and 10, got 11"),
    ):
        with pytest.raises(layer.KernelError, match=re.escape(text)):
            launch(layer, "indices", **options)
    launch(layer, "indices", threads=1024)
