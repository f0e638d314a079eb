"""Memory of large tensors that is used again, `ppo_ext.ops._pages`: never by two tensors at a time, and not for ever."""

import copy
import gc
import io
import mmap
import pathlib
import threading

import pytest
import torch

from ppo_ext.ops import _pages

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="Linux alone keeps memory")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def only_mine(monkeypatch):
    monkeypatch.setattr(_pages, "_LEAST", MIB)
    monkeypatch.setattr(_pages, "_spare", [])


def new(mib, dtype=torch.float32):
    return _pages.new_empty(torch.empty(0), mib, MIB // dtype.itemsize, dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_a_tensor_like_any_other(dtype):
    x = new(3, dtype)
    assert x.shape == (3, MIB // dtype.itemsize) and x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0
    assert x.untyped_storage().nbytes() == 3 * MIB and not x.requires_grad
    assert x._base is None
    x.fill_(2)
    saved = io.BytesIO()
    torch.save(x, saved)
    saved.seek(0)
    for other in (copy.deepcopy(x), torch.load(saved, weights_only=True), x.clone().share_memory_()):
        assert torch.equal(other, x) and other.data_ptr() != x.data_ptr()


def test_memory_of_a_tensor_that_is_gone_is_used_again():
    x, y = new(3), new(3)
    address = x.data_ptr()
    assert y.data_ptr() != address and not _pages._spare
    del x
    assert new(3, torch.bfloat16).data_ptr() == address


@pytest.mark.parametrize("mib, again", ((4, False), (3, True), (2, True), (1, False)))
def test_for_a_tensor_of_half_its_size_or_more(mib, again):
    x = new(3)
    address = x.data_ptr()
    del x
    assert (new(mib).data_ptr() == address) is again


def test_the_smallest_memory_that_fits():
    tensors = {mib: new(mib) for mib in (6, 4, 5)}
    address = tensors[4].data_ptr()
    del tensors
    assert new(4).data_ptr() == address


def test_not_while_a_view_or_a_storage_is_left():
    x = new(3)
    view, storage = x[1:, :5].t(), x.untyped_storage()
    addresses = {x.data_ptr()}
    del x
    assert new(3).data_ptr() not in addresses
    del view
    assert new(3).data_ptr() not in addresses
    del storage
    gc.collect()
    assert addresses <= {block_address(block) for block in _pages._spare}


def block_address(block):
    return torch.frombuffer(block, dtype=torch.uint8, count=1).data_ptr()


def test_a_gradient_that_autograd_keeps_is_not_lent_again():
    weight = torch.zeros(3, MIB // 4, requires_grad=True)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.sum()

        @staticmethod
        def backward(ctx, _):
            return new(3).fill_(7)

    Gradient.apply(weight).backward()
    new(3).fill_(9)
    assert bool((weight.grad == 7).all())
    Gradient.apply(weight).backward()
    assert bool((weight.grad == 14).all())


def test_at_most_four_are_kept_the_last_ones():
    tensors = [new(2) for _ in range(6)]
    last = {x.data_ptr() for x in tensors[2:]}
    while tensors:
        del tensors[0]
    assert {block_address(block) for block in _pages._spare} == last


def test_threads_never_share_memory():
    wrong = []

    def work(number):
        for _ in range(50):
            x = new(1).fill_(number)
            if not bool((x == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(_pages._spare) <= 4


def resident():
    [line] = [x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def lazily_freed():
    """Bytes that the system may take back without asking."""
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    [line] = [x for x in lines if x.startswith("LazyFree:")]
    return int(line.split()[1]) * 1024


def test_the_system_may_take_back_what_goes_beyond_a_limit(monkeypatch):
    monkeypatch.setattr(_pages, "_HELD", 100 * MIB)
    first, second, before = new(64).fill_(1), new(64).fill_(1), lazily_freed()
    address = first.data_ptr()
    del first
    assert abs(lazily_freed() - before) < 4 * MIB
    del second
    assert 60 * MIB < lazily_freed() - before < 68 * MIB
    assert new(64).data_ptr() == address


def test_it_is_offered_before_another_thread_can_take_it(monkeypatch):
    offered = []

    class Block(mmap.mmap):
        def madvise(self, advice):
            offered.append((advice, list(_pages._spare)))

    monkeypatch.setattr(_pages, "_HELD", 0)
    _pages._keep(Block(-1, MIB))
    assert offered == [(mmap.MADV_FREE, [])] and len(_pages._spare) == 1


def test_forget_gives_it_back_at_once():
    x = new(64)
    x.fill_(1)
    held = resident()
    del x
    assert held - resident() < 16 * MIB
    _pages.forget()
    assert held - resident() > 48 * MIB and not _pages._spare


def test_new_memory_is_present():
    before = resident()
    x = new(64)
    assert resident() - before > 48 * MIB and x.numel()


def test_too_little_memory_is_torchs_error():
    with pytest.raises(RuntimeError, match="allocate"):
        _pages.new_empty(torch.empty(0), 1 << 50, dtype=torch.float32)


@pytest.mark.parametrize("platform, mib", (("linux", 0), ("darwin", 3), ("win32", 3)))
def test_small_tensors_and_other_systems_are_torchs(monkeypatch, platform, mib):
    monkeypatch.setattr(_pages.sys, "platform", platform)
    monkeypatch.setattr(_pages.mmap, "mmap", None)
    assert new(mib).shape == (mib, MIB // 4)
