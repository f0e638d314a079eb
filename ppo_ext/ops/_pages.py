"""Large new tensors on a CPU, in memory that earlier ones have left.

The system gives a new tensor pages of 4 KB, each of which costs a fault when it is first written: for the gradient of a
head as long as a third of the matrix product that fills it. So the memory of the last few tensors is kept for those that
come next. What goes beyond a gigabyte, the system may take back at any time: it does so before it runs short of memory, and
then the pages fault again. Not all is offered to it, as a page that was offered costs time when it is next written. (Pages
of 2 MB would take fewer faults, but in a virtual machine whose host takes free memory back such a fault may last
milliseconds.)
"""

import mmap
import sys
import weakref

import torch

_LEAST = 32 << 20  # bytes; the C library keeps the memory of smaller tensors itself
_MOST_SPARE = 4
_HELD = 1 << 30  # bytes of spare memory that are not offered to the system

_spare: list[mmap.mmap] = []  # the memory of tensors that are gone, the last one at the end


def new_empty(like: torch.Tensor, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """`like.new_empty`."""
    count = torch.Size(shape).numel()
    if like.device.type != "cpu" or sys.platform != "linux" or count * dtype.itemsize < _LEAST:
        return like.new_empty(shape, dtype=dtype)
    try:
        block = _take(count * dtype.itemsize)
    except OSError:  # there is not so much memory, and torch's sentence says how much was asked for
        return like.new_empty(shape, dtype=dtype)
    lent = memoryview(block)  # lives as long as the tensor
    weakref.finalize(lent, _keep, block).atexit = False
    # not a view, whose storage would have two owners: autograd adds in place to a gradient that is its own alone
    return torch.frombuffer(lent, dtype=dtype, count=count).resize_(shape)


def forget() -> None:
    """Gives all memory that no tensor uses back to the system."""
    _spare.clear()


def _take(size: int) -> mmap.mmap:
    fitting = [block for block in tuple(_spare) if size <= len(block) <= 2 * size]
    for block in sorted(fitting, key=len):
        try:
            _spare.remove(block)
        except ValueError:  # another thread took it
            continue
        return block
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)


def _keep(block: mmap.mmap) -> None:
    if len(block) + sum(map(len, tuple(_spare))) > _HELD:
        block.madvise(mmap.MADV_FREE)  # before another thread can take it
    _spare.append(block)
    del _spare[:-_MOST_SPARE]
