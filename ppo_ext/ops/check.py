"""Argument checks that every op shares. One sentence shape: `<op>: <argument> must <condition>, got <value>`."""

import math
import re

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT32_MAX = torch.finfo(torch.float32).max


def value_error(op, error):
    """What a kernel found wrong with the arguments of `op`, as a ValueError: newer versions of torch raise
    RuntimeError, and a kernel may serve several ops."""
    sentence = re.match(r"\w+: (.* must .*, got .*)", str(error))
    return ValueError(f"{op}: {sentence[1]}") if sentence else error


def fail(op, argument, condition, got, kind=ValueError):
    raise kind(f"{op}: {argument} must {condition}, got {got}")


def tensor(op, argument, x):
    if not isinstance(x, torch.Tensor):
        fail(op, argument, "be a torch.Tensor", type(x).__name__, TypeError)
    if x.layout is not torch.strided or x.is_nested:
        fail(op, argument, "be a dense tensor", "a nested one" if x.is_nested else x.layout, TypeError)


def floating(op, argument, x):
    """`x` is a tensor of one of the four floating dtypes."""
    tensor(op, argument, x)
    if x.dtype not in FLOATS:
        fail(op, argument, "be float32, bfloat16, float16 or float64", x.dtype, TypeError)


def shape(op, argument, x, expected, of):
    if x.shape != expected:
        fail(op, argument, f"have the shape {list(expected)} of {of}", list(x.shape))


def device(op, argument, x, expected, of):
    if x.device != expected:
        fail(op, argument, f"be on the device {expected} of {of}", x.device)


def weights(op, x):
    """A mask as it is given: nonzero where a token counts."""
    tensor(op, "mask", x)
    if x.dtype.is_complex or x.is_quantized:
        fail(op, "mask", "be bool, int or float", x.dtype, TypeError)


def mask(op, x, expected, device_of, of):
    """The mask as a bool tensor."""
    weights(op, x)
    shape(op, "mask", x, expected, of)
    device(op, "mask", x, device_of, of)
    return x if x.dtype == torch.bool else x.bool()


def number(op, argument, x, condition="be a number"):
    """`x` as a float: one of Python's or numpy's numbers, or a tensor of one entry, whose device is waited for."""
    if isinstance(x, float):
        return x
    try:
        if isinstance(x, (str, bytes)):  # float() would read them
            raise TypeError
        return float(x)
    except OverflowError:  # an int beyond float64
        return math.inf if x > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return fail(op, argument, condition, type(x).__name__, TypeError)


def flag(op, argument, x):
    """`x` as a bool; 0 and 1 in another type will do."""
    if isinstance(x, bool):
        return x
    value = number(op, argument, x, "be True or False")
    if value not in (0, 1):
        fail(op, argument, "be True or False", value)
    return value == 1


def temperature(op, x):
    x = number(op, "temperature", x)
    if not 0 < x < math.inf:
        fail(op, "temperature", "be a positive finite number", x)
    if not 1e-30 <= x <= 1e30:  # beyond these 1 / x leaves float32, and 0 * inf is NaN
        fail(op, "temperature", "be between 1e-30 and 1e30", x)
    return x


def finite(op, argument, x, least=-math.inf, condition="be a finite number"):
    x = number(op, argument, x)
    if not least <= x or x in (-math.inf, math.inf):
        fail(op, argument, condition, x)
    if not -_FLOAT32_MAX <= x <= _FLOAT32_MAX:
        fail(op, argument, "lie in the range of float32", x)
    return x


def not_negative(op, argument, x):
    return finite(op, argument, x, 0, "be finite and not negative")


def no_tangent(op, argument, x):
    """Forward-mode differentiation would silently see a constant."""
    if forward_ad.unpack_dual(x).tangent is not None:
        fail(op, argument, "be differentiated in reverse mode", "a forward-mode tangent", NotImplementedError)


def overwritable(x, read=None):
    """Whether `x` can be overwritten entry by entry, also while `read` is read at the same entries: no two of its
    entries share an address, as an expanded tensor's do, and no entry of `read` lies where another one of `x` does."""
    if x.is_neg():  # its memory holds the negated values
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    if read is None or (read.data_ptr() == x.data_ptr() and read.stride() == x.stride()):
        return True
    read_reach = sum((size - 1) * stride for stride, size in zip(read.stride(), read.shape))
    return not (
        x.data_ptr() <= read.data_ptr() + read_reach * read.element_size()
        and read.data_ptr() <= x.data_ptr() + reach * x.element_size()
    )


def accumulate(x):
    """`x` in the dtype that the ops compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def same_dtype(*tensors):
    """Small per-token tensors brought to one dtype: float64 if any of them is, else float32."""
    target = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x if x.dtype == target else x.to(target) for x in tensors]
