"""The operators of linear_logprobs on a CPU and on CUDA: matrix products by torch, tile by tile.

The outer loop is over the vocabulary and the inner one over all rows, so that each part of the weight's gradient is
complete when it is written, once. The sizes of the tiles follow from the shapes alone.
"""

from typing import Any

import torch

from ._linear_checks import arithmetic, check_note, check_numbers, check_operator, check_values
from ._linear_gradients import RESULTS, STATES, Gradients, fold
from ._linear_head import Head
from .check_labels import note_labels

_OP = "linear_logprobs"

# ---- the operators --------------------------------------------------------------------------------------------------


def forward(
    hidden,
    weight,
    labels,
    bias,
    mask,
    temperatures,
    temperature,
    logit_scale,
    softcap,
    with_entropy,
    with_statistics,
    noted,
):
    tensors, numbers = (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)
    check_operator(_OP, tensors, {})
    check_note(_OP, noted)
    check_numbers(_OP, *numbers)
    if hidden.device.type == "cpu":
        check_values(_OP, weight.shape[0], labels, mask, temperatures)
    elif noted is not None:
        note_labels(noted, labels, mask, weight.shape[0])
    results = _folded(tensors, numbers, with_entropy, with_statistics)
    wanted = (True, with_entropy, True, True, *[with_statistics] * 3)
    return tuple(
        results[:, i].clone().view(labels.shape) if want else results.new_empty(0) for i, want in enumerate(wanted)
    )


def _folded(tensors, numbers, with_entropy, with_statistics):
    """[tokens, RESULTS]."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        head = Head(tensors, numbers)
        results = head.hidden.new_zeros(head.count, RESULTS, dtype=head.dtype)
        states, memory = head.hidden.new_empty(head.count, STATES, dtype=torch.float64), head.new_tile()
        for columns, part in head.parts():
            for block in head.blocks():
                tile = head.fill(memory, block, columns, part)
                outputs = (states[block], results[block])
                fold(tile, *head.at(block), *outputs, *head.where(columns), with_entropy, with_statistics)
        return head.rows.back(results)


def rows_of_head(tensors: tuple, numbers: tuple, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logprobs, entropy, row_max, log_sum), a number a token each, of arguments that are checked."""
    return _folded(tensors, numbers, with_entropy, False)[:, :4].unbind(1)


def backward(*arguments):
    tensors, numbers, saved, entropy, needs = _checked(*arguments)
    hidden, weight, labels, bias, mask, temperatures = tensors
    if hidden.device.type == "cpu":
        check_values(_OP, weight.shape[0], labels, mask, temperatures)
    if hidden.is_cuda:
        inside = (labels >= 0) & (labels < weight.shape[0])
        for name in ("grad_logprobs", "grad_entropy"):
            saved[name] = None if saved[name] is None else torch.where(inside, saved[name], 0)
    return gradients_of_head(tensors, numbers, saved, entropy, needs).results(hidden, weight, bias)


def shard_backward(*arguments):
    """`backward` of some rows of a head. A label outside has no share; the gradient of hidden, a summand, is not rounded."""
    tensors, numbers, saved, entropy, needs = _checked(*arguments)
    hidden, weight, _, bias, *_ = tensors
    return gradients_of_head(tensors, numbers, saved, entropy, needs).results(hidden, weight, bias, rounded=False)


def _checked(
    hidden, weight, labels, bias, mask, temperatures, temperature, logit_scale, softcap, grad_logprobs, grad_entropy,
    entropy, row_max, log_sum, *needs,
):  # fmt: skip
    """The arguments of a backward operator: (tensors, numbers, rows by name, entropy, needs)."""
    tensors, numbers = (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)
    saved = {"grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy, "row_max": row_max, "log_sum": log_sum}
    checked = saved if grad_entropy is None else saved | {"entropy": entropy}
    dtype = arithmetic(hidden, weight)
    check_operator(_OP, tensors, {name: (x, dtype) for name, x in checked.items()})
    check_numbers(_OP, *numbers)
    return tensors, numbers, saved, entropy, needs


def gradients_of_head(
    tensors: tuple, numbers: tuple, saved: dict[str, Any], entropy: torch.Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """The gradients of hidden, weight and bias, of arguments that are checked. A label that is no column has no share."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        head = Head(tensors, numbers)
        rows: dict[str, Any] = {name: head.of_tokens(x) for name, x in saved.items()}
        if rows["grad_logprobs"] is None:
            rows["grad_logprobs"] = torch.zeros_like(rows["row_max"])
        rows["entropy"] = rows["row_max"] if rows["grad_entropy"] is None else head.of_tokens(entropy)
        needs_hidden, needs_weight, needs_bias = needs
        grads = Gradients(head, (needs_hidden, needs_weight, needs_bias and tensors[3] is not None))
        _add_tiles(head, rows, grads)
    return grads


def _add_tiles(head: Head, rows: dict[str, Any], grads: Gradients) -> None:
    memory = head.new_tile()
    for columns, part in head.parts() if head.count else ():
        for block in head.blocks():
            of_block = {name: None if x is None else x[block] for name, x in rows.items()}
            grads.add(head.fill(memory, block, columns, part), of_block, block, columns, part)
        grads.write_weight(columns)
