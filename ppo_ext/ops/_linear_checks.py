"""What the operators on hidden states and the head's weights check, in Python as their loops are."""

from typing import Any

import torch

from . import check


def arithmetic(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype of the logits and of the results."""
    return torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32


def check_head(op: str, hidden: Any, weight: Any, bias: Any) -> None:
    """hidden [..., H], weight [V, H] and bias [V] must match."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
            check.plain(op, name, x)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        check.fail(op, "hidden", "have the shape [..., H] with H >= 1", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        condition = f"have the shape [V, {hidden.shape[-1]}] with V >= 1 and the last dimension of hidden"
        check.fail(op, "weight", condition, list(weight.shape))
    check.device(op, "weight", weight, hidden.device, "hidden")
    if bias is not None:
        check.shape(op, "bias", bias, weight.shape[:1], "weight's first dimension")
        check.device(op, "bias", bias, hidden.device, "hidden")


def check_values(op: str, vocabulary: int, labels: torch.Tensor, mask: Any, temperatures: Any) -> None:
    """The labels and temperatures of the tokens that count must be in their ranges. The host waits for the device."""
    check.ids(op, labels, vocabulary, mask)
    if temperatures is not None:
        check.temperatures(op, temperatures, mask)


def check_operator(op: str, tensors: tuple, more: dict[str, tuple]) -> None:
    """What the public functions see to, and the kernels rely on. `more`: other tensors of one number a token, by name,
    and their dtypes."""
    hidden, weight, labels, bias, mask, temperatures = tensors
    check_head(op, hidden, weight, bias)
    dtype = arithmetic(hidden, weight)
    rows = {"labels": (labels, torch.int64), "mask": (mask, torch.bool), "temperatures": (temperatures, dtype)}
    for name, (x, expected) in (rows | more).items():
        if x is None:
            continue
        if x.dtype != expected:
            check.fail(op, name, f"be {str(expected).removeprefix('torch.')}", x.dtype, TypeError)
        check.shape(op, name, x, hidden.shape[:-1], "hidden without its last dimension")
        check.device(op, name, x, hidden.device, "hidden")
        if not x.is_contiguous():
            check.fail(op, name, "be contiguous", f"strides {list(x.stride())}")


def check_note(op: str, noted: torch.Tensor | None) -> None:
    if noted is None:
        return
    if noted.dtype != torch.int64:
        check.fail(op, "label_note", "be int64", noted.dtype, TypeError)
    if noted.numel() != 4:
        check.fail(op, "label_note", "have 4 entries", noted.numel())
    if not noted.is_contiguous():
        check.fail(op, "label_note", "be contiguous", f"strides {list(noted.stride())}")


def check_numbers(op: str, temperature: float, logit_scale: float, softcap: float) -> None:
    check.in_range(op, "temperature", temperature)
    check.in_range(op, "logit_scale", logit_scale)
    if softcap != 0:
        check.in_range(op, "softcap", softcap)
