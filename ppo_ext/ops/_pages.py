"""Large new tensors on a CPU, whose memory is made present in one call, as in csrc/common/pages.h.

The system gives a new tensor pages of 4 KB, each of which costs a fault when it is first written: for the gradient of a
head as long as a third of the matrix product that fills it. Pages of 2 MB would take fewer faults, but in a virtual
machine whose host takes free memory back such a fault may last milliseconds.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch

_LEAST = 4 << 20  # bytes; smaller blocks come from memory that is there already
_PAGE = 4096
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux


@functools.cache
def _advise() -> Callable[..., int] | None:
    """madvise of the C library, or None where there is none."""
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def new_empty(like: torch.Tensor, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """`like.new_empty`. That the system may refuse the call is no error: then the pages fault one by one."""
    x = like.new_empty(shape, dtype=dtype)
    size = x.numel() * x.element_size()
    if x.device.type == "cpu" and size >= _LEAST and (advise := _advise()):
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        advise(start, (x.data_ptr() + size - start) // _PAGE * _PAGE, _POPULATE_WRITE)
    return x
