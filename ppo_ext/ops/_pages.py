"""Large new tensors on a CPU, in large pages of memory.

The system gives a new tensor pages of 4 KB, each of which costs a fault when it is first written: for the gradient of a
head as long as a third of the matrix product that fills it. Where the system has pages of 2 MB and leaves the choice to
the program, it is asked for these.
"""

import ctypes
import functools
import sys
from collections.abc import Callable

import torch

_LEAST = 4 << 20  # bytes; smaller blocks come from memory that is there already
_PAGE = 4096
_HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux


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
    """`like.new_empty`. That the system may refuse large pages is no error: then it gives small ones."""
    x = like.new_empty(shape, dtype=dtype)
    size = x.numel() * x.element_size()
    if x.device.type == "cpu" and size >= _LEAST and (advise := _advise()):
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        advise(start, (x.data_ptr() + size - start) // _PAGE * _PAGE, _HUGE_PAGES)
    return x
