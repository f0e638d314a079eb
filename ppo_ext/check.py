"""Argument checks that every op shares. One sentence shape: `<op>: <argument> must <condition>, got <value>`."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def value_error(error):
    """What a kernel found wrong with its arguments, as a ValueError: newer versions of torch raise RuntimeError."""
    text = str(error).split("\n")[0]
    return ValueError(text) if " must " in text else error


def fail(op, argument, condition, got, kind=ValueError):
    raise kind(f"{op}: {argument} must {condition}, got {got}")


def tensor(op, argument, x):
    if not isinstance(x, torch.Tensor):
        fail(op, argument, "be a torch.Tensor", type(x).__name__, TypeError)


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


def mask(op, x, expected, device_of, of):
    """The mask as a bool tensor: nonzero where a token counts."""
    tensor(op, "mask", x)
    shape(op, "mask", x, expected, of)
    device(op, "mask", x, device_of, of)
    return x if x.dtype == torch.bool else x.bool()


def positive(op, argument, x):
    if not 0 < x < float("inf"):
        fail(op, argument, "be a positive finite number", x)


def finite(op, argument, x):
    if not -float("inf") < x < float("inf"):
        fail(op, argument, "be a finite number", x)


def accumulate(x):
    """`x` in the dtype that the ops compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def same_dtype(*tensors):
    """Small per-token tensors brought to one dtype: float64 if any of them is, else float32."""
    target = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x if x.dtype == target else x.to(target) for x in tensors]
