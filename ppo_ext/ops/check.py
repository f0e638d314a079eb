"""Checks of arguments that the ops share. Every error reads `<op>: <argument> must <condition>, got <value>`."""

import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LEAST, _MOST = 1e-30, 1e30
_IN_RANGE = "be between 1e-30 and 1e30"
_FLOAT32_MAX = torch.finfo(torch.float32).max


def naming(op: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments); a kernel's error about the arguments is raised as a ValueError with the name of `op`.

    Versions of torch differ in the type that an error of a kernel gets, and a kernel may serve several ops.
    """
    if torch.compiler.is_compiling():
        return function(*arguments)
    try:
        return function(*arguments)
    except (RuntimeError, ValueError) as error:
        sentence = re.match(r"\w+: (.* must .*, got .*)", str(error))
        raise (ValueError(f"{op}: {sentence[1]}") if sentence else error) from None


def fail(op: str, argument: str, condition: str, got: Any, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"{op}: {argument} must {condition}, got {got}")


# ---- tensors --------------------------------------------------------------------------------------------------------


def tensor(op: str, argument: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        fail(op, argument, "be a torch.Tensor", type(x).__name__, TypeError)
    if x.layout is not torch.strided or x.is_nested:
        fail(op, argument, "be a dense tensor", "a nested one" if x.is_nested else x.layout, TypeError)


def values(op: str, argument: str, x: Any) -> None:
    """`x` must be a tensor whose values the host can read: dense, not quantized, and not on the meta device."""
    tensor(op, argument, x)
    if x.is_quantized or x.device.type == "meta":
        got = "a quantized one" if x.is_quantized else "one on the meta device"
        fail(op, argument, "be a dense tensor with values", got, TypeError)


def floating(op: str, argument: str, x: Any) -> None:
    """`x` must be a tensor of one of the four floating dtypes."""
    tensor(op, argument, x)
    if x.dtype not in FLOATS:
        fail(op, argument, "be float32, bfloat16, float16 or float64", x.dtype, TypeError)


def plain(op: str, argument: str, x: Any) -> None:
    """`x` must be a floating tensor that a matrix product can read as it is."""
    if hasattr(x, "full_tensor"):
        fail(op, argument, "be a plain tensor", f"a {type(x).__name__}; pass {argument}.full_tensor()", TypeError)
    tensor(op, argument, x)
    if x.dtype not in FLOATS:
        hint = "" if x.dtype.is_floating_point or x.dtype.is_complex else "; dequantize it first"
        fail(op, argument, "be float32, bfloat16, float16 or float64", f"{x.dtype}{hint}", TypeError)


def shape(op: str, argument: str, x: torch.Tensor, expected: torch.Size, of: str) -> None:
    """`x` must have the expected shape, which the text calls the shape of `of`."""
    if x.shape != expected:
        fail(op, argument, f"have the shape {list(expected)} of {of}", list(x.shape))


def device(op: str, argument: str, x: torch.Tensor, expected: torch.device, of: str) -> None:
    if x.device != expected:
        fail(op, argument, f"be on the device {expected} of {of}", x.device)


def weights(op: str, x: Any) -> None:
    """`x` must be a tensor that a mask can be made of: nonzero where a token counts."""
    tensor(op, "mask", x)
    if x.dtype.is_complex or x.is_quantized:
        fail(op, "mask", "be bool, int or float", x.dtype, TypeError)


def mask(op: str, x: Any, expected: torch.Size, device_of: torch.device, of: str) -> torch.Tensor:
    """The mask as a bool tensor."""
    weights(op, x)
    shape(op, "mask", x, expected, of)
    device(op, "mask", x, device_of, of)
    return x if x.dtype == torch.bool else x.bool()


def labels(op: str, x: Any, expected: torch.Size, of: str) -> torch.Tensor:
    """The labels as a dense int64 tensor."""
    tensor(op, "labels", x)
    if x.dtype not in (torch.int64, torch.int32):
        fail(op, "labels", "be int64 or int32", x.dtype, TypeError)
    shape(op, "labels", x, expected, of)
    # looking takes less time than a conversion that changes nothing
    return x if x.dtype == torch.int64 and x.is_contiguous() else x.to(torch.int64).contiguous()


def ids(op: str, labels: torch.Tensor, vocabulary: int, mask: torch.Tensor | None) -> None:
    """Labels that count must be in [0, vocabulary). The host waits for their device."""
    flat = labels.reshape(-1)
    found = first((flat < 0) | (flat >= vocabulary), mask, labels.shape)
    if found is not None:
        got = labels[tuple(found)].item()
        hint = "; leave rows without a label out by the mask" if got == -100 else ""
        fail(op, f"labels{found}", f"be an id in [0, {vocabulary})", f"{got}{hint}")


def first(wrong: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Size) -> list[int] | None:
    """The place of the first token that counts where something is wrong; None if there is none. `wrong` is flat, as
    torch compares tensors of up to 64 dimensions only."""
    if mask is not None:
        wrong = wrong & mask.reshape(-1)
    if not wrong.any():
        return None
    rest = int(wrong.nonzero()[0])
    position: list[int] = []
    for size in reversed(tokens):
        position.insert(0, rest % size)
        rest //= size
    return position


def no_tangent(op: str, argument: str, x: torch.Tensor) -> None:
    """The operators have no rule for forward mode, so without this error it would take the op for a constant."""
    # outside of any level there is no tangent, which unpack_dual takes longer to say
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        fail(op, argument, "be differentiated in reverse mode", "a forward-mode tangent", NotImplementedError)


def no_gradient_of_gradient(op: str, grad_loss: torch.Tensor) -> None:
    """For an op whose loss is all that could need a second derivative. Cheaper than once_differentiable."""
    if grad_loss.requires_grad:
        raise RuntimeError(
            f"{op}: the gradient of the loss must not need a gradient itself, got one that does; "
            f"{op} is differentiable once"
        )


def overwritable(x: torch.Tensor, read: torch.Tensor | None = None) -> bool:
    """Whether a kernel may write each entry of `x` once it has read the entries of `x` and `read` at that position.

    No two entries of `x` may share an address, as those of an expanded tensor do, and no entry of `read` may lie where
    an entry of `x` at another position is.
    """
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


def accumulate(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype that the ops compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def same_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in one dtype: float64 if any of them has it, else float32."""
    target = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x if x.dtype == target else x.to(target) for x in tensors]


# ---- numbers and flags ----------------------------------------------------------------------------------------------


def number(op: str, argument: str, x: Any, condition: str = "be a number") -> float:
    """`x` as a float: a number of Python or numpy, or a tensor of one entry (the host waits for its device)."""
    if isinstance(x, float):
        return x
    try:
        if isinstance(x, (str, bytes)):  # float() would parse them
            raise TypeError
        return float(x)
    except OverflowError:  # an int beyond float64
        return math.inf if x > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        return fail(op, argument, condition, type(x).__name__, TypeError)


def flag(op: str, argument: str, x: Any) -> bool:
    """`x` as a bool; a 0 or 1 of another type is accepted."""
    if isinstance(x, bool):
        return x
    value = number(op, argument, x, "be True or False")
    if value not in (0, 1):
        fail(op, argument, "be True or False", value)
    return value == 1


def temperature(
    op: str, x: Any, expected: torch.Size, device_of: torch.device, of: str, dtype: torch.dtype
) -> tuple[float, torch.Tensor | None]:
    """(a number, None), or (1, a dense tensor of `dtype` with a number for each token)."""
    if not isinstance(x, torch.Tensor) or (x.numel() == 1 and x.shape != expected):
        return positive(op, "temperature", number(op, "temperature", x, "be a number or a tensor of numbers")), None
    floating(op, "temperature", x)
    if x.shape != expected:
        fail(op, "temperature", f"be a number or have the shape {list(expected)} of {of}", list(x.shape))
    device(op, "temperature", x, device_of, of)
    return 1.0, x.detach().to(dtype).contiguous()


def temperatures(op: str, x: torch.Tensor, mask: torch.Tensor | None) -> None:
    """The temperatures of tokens that count must be in their range. The host waits for their device."""
    flat = x.reshape(-1)
    found = first(~((flat >= _LEAST) & (flat <= _MOST)), mask, x.shape)
    if found is not None:
        fail(op, f"temperature{found}", _IN_RANGE, x[tuple(found)].item())


def positive(op: str, argument: str, x: Any, condition: str = "be a positive finite number") -> float:
    """`x` as a float between 1e-30 and 1e30: beyond these 1 / x is no float32, and 0 * inf is NaN."""
    x = number(op, argument, x)
    if not 0 < x < math.inf:
        fail(op, argument, condition, x)
    in_range(op, argument, x)
    return x


def in_range(op: str, argument: str, x: float) -> None:
    if not _LEAST <= x <= _MOST:
        fail(op, argument, _IN_RANGE, x)


def finite(op: str, argument: str, x: Any, least: float = -math.inf, condition: str = "be a finite number") -> float:
    """`x` as a float, which must be at least `least` and finite in float32."""
    x = number(op, argument, x)
    if not least <= x or x in (-math.inf, math.inf):
        fail(op, argument, condition, x)
    if not -_FLOAT32_MAX <= x <= _FLOAT32_MAX:
        fail(op, argument, "lie in the range of float32", x)
    return x


def not_negative(op: str, argument: str, x: Any) -> float:
    return finite(op, argument, x, 0, "be finite and not negative")
