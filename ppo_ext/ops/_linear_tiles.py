"""The operators of linear_logprobs on a CPU and on CUDA: matrix products by torch, tile by tile.

The outer loop is over the vocabulary and the inner one over all rows, so that each part of the weight's gradient is
complete when it is written, once. The sizes of the tiles follow from the shapes alone.
"""

from typing import Any

import torch

from . import _native
from ._linear_checks import arithmetic, check_note, check_numbers, check_operator, check_values
from ._linear_head import Head, multiply
from .check_labels import note_labels

_OP = "linear_logprobs"
_TILE = (
    "Tensor targets, Tensor? temperatures, {}, float temperature, float logit_scale, float softcap, int first,"
    " int vocabulary"
)
_fold, _fold_name = _native.define(
    f"_linear_logprobs_fold(Tensor(a!) tile, {_TILE.format('Tensor(b!) states, Tensor(c!) results')},"
    " bool with_entropy, bool with_statistics) -> ()"
)
_SAVED = "Tensor grad_logprobs, Tensor? grad_entropy, Tensor entropy, Tensor row_max, Tensor log_sum"
_gradient, _gradient_name = _native.define(f"_linear_logprobs_gradient(Tensor(a!) tile, {_TILE.format(_SAVED)}) -> ()")


@_native.register_fake(_fold_name)
def _(tile, *_):
    return None


@_native.register_fake(_gradient_name)
def _(tile, *_):
    return None


STATES, RESULTS = 8, 7  # numbers a row, see LinearState and LinearResult in csrc/linear_logprobs.h


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
    with torch.autocast(hidden.device.type, enabled=False):
        results = _folded(Head(tensors, numbers), with_entropy, with_statistics)
    wanted = (True, with_entropy, True, True, *[with_statistics] * 3)
    return tuple(
        results[:, i].clone().view(labels.shape) if want else results.new_empty(0) for i, want in enumerate(wanted)
    )


def _folded(head, with_entropy, with_statistics):
    """[tokens, RESULTS]."""
    results = head.hidden.new_zeros(head.count, RESULTS, dtype=head.dtype)
    states, memory = head.hidden.new_empty(head.count, STATES, dtype=torch.float64), head.new_tile()
    for columns, part in head.parts():
        for block in head.blocks():
            tile = head.fill(memory, block, columns, part)
            outputs = (states[block], results[block])
            _fold(tile, *head.at(block), *outputs, *head.where(columns), with_entropy, with_statistics)
    return head.rows.back(results)


def backward(
    hidden, weight, labels, bias, mask, temperatures, temperature, logit_scale, softcap, grad_logprobs, grad_entropy,
    entropy, row_max, log_sum, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    tensors, numbers = (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)
    saved = {"grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy, "row_max": row_max, "log_sum": log_sum}
    checked = saved if grad_entropy is None else saved | {"entropy": entropy}
    dtype = arithmetic(hidden, weight)
    check_operator(_OP, tensors, {name: (x, dtype) for name, x in checked.items()})
    check_numbers(_OP, *numbers)
    if hidden.device.type == "cpu":
        check_values(_OP, weight.shape[0], labels, mask, temperatures)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(tensors, numbers)
        inside = (head.targets >= 0) & (head.targets < head.vocabulary)
        rows = {name: head.of_tokens(x) for name, x in saved.items()}
        for name in ("grad_logprobs", "grad_entropy"):
            if rows[name] is not None and hidden.is_cuda:
                rows[name] = torch.where(inside, rows[name], 0)
        if grad_logprobs is None:
            rows["grad_logprobs"] = torch.zeros_like(rows["row_max"])
        rows["entropy"] = rows["row_max"] if grad_entropy is None else head.of_tokens(entropy)
        grads = _Gradients(head, needs_hidden, needs_weight, needs_bias and bias is not None)
        grads.add_all(rows)
    return grads.results(hidden, weight, bias)


class _Gradients:
    """The gradients of a call, added up tile by tile."""

    def __init__(self, head: Head, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
        self.head = head
        empty, zeros, dtype = head.hidden.new_empty, head.hidden.new_zeros, head.dtype
        new = empty if head.count else zeros
        self.hidden = zeros(head.hidden.shape, dtype=dtype) if needs_hidden else None
        self.weight = new(head.weight.shape, dtype=head.weight.dtype) if needs_weight else None
        self.bias = new(head.vocabulary, dtype=dtype) if needs_bias else None
        direct = self.weight is None or self.weight.dtype == dtype
        self.part = None if direct else empty(head.tile_columns, head.weight.shape[1], dtype=dtype)

    def add_all(self, rows: dict[str, Any]) -> None:
        memory = self.head.new_tile()
        for columns, part in self.head.parts() if self.head.count else ():
            grad_part = self._of_weight(columns)
            for block in self.head.blocks():
                self._add(self.head.fill(memory, block, columns, part), rows, block, columns, part, grad_part)
            if self.weight is not None and self.part is not None:
                self.weight[columns] = grad_part

    def _of_weight(self, columns):
        """Where the gradient of this part of the weight is added up; None if it is not needed."""
        if self.weight is None:
            return None
        return self.weight[columns] if self.part is None else self.part[: columns.stop - columns.start]

    def _add(self, tile, rows, block, columns, part, grad_part):
        names = ("grad_logprobs", "grad_entropy", "entropy", "row_max", "log_sum")
        saved = (None if rows[name] is None else rows[name][block] for name in names)
        _gradient(tile, *self.head.at(block), *saved, *self.head.where(columns))
        later = block.start > 0
        if self.bias is not None:
            self.bias[columns] = tile.sum(0) + (self.bias[columns] if later else 0)
        grad = tile.to(self.head.operand_dtype)
        if self.hidden is not None:
            multiply(grad, part, self.hidden[block], add=True)
        if grad_part is not None:
            multiply(grad.t(), self.head.hidden[block], grad_part, add=later)

    def results(self, hidden, weight, bias):
        """In the dtypes and shapes of hidden, weight and bias; empty where none is needed."""
        none = hidden.new_empty(0)
        grad_hidden = none if self.hidden is None else self.head.rows.back(self.hidden).to(hidden.dtype)
        return (
            none if self.hidden is None else grad_hidden.reshape(hidden.shape),
            weight.new_empty(0) if self.weight is None else self.weight,
            weight.new_empty(0) if self.bias is None else self.bias.to(bias.dtype),
        )
