"""The operators of linear_logprobs on a CPU and on CUDA: matrix products by torch, tile by tile.

The outer loop is over the vocabulary and the inner one over all rows, so that each part of the weight's gradient is
complete when it is written, once. The sizes of the tiles follow from the shapes alone.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from . import _native, check
from .check_labels import note_labels

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
# Rows and entries of a tile. On a CPU it stays in the caches, and the products are still large enough to be fast. On
# CUDA it is as wide as keeps the sums over its columns, which are read and written for each part of the vocabulary,
# small beside the products.
_SIZES = {"cpu": (1024, 1 << 20), "cuda": (8192, 1 << 26)}
_MOST_COLUMNS = 8192


def tile_sizes(rows: int, vocabulary: int, device_type: str) -> tuple[int, int]:
    """The rows and columns of a tile."""
    most_rows, entries = _SIZES[device_type]
    tile_rows = max(1, min(rows, most_rows))
    return tile_rows, min(vocabulary, _MOST_COLUMNS, entries // tile_rows)


# ---- checks ---------------------------------------------------------------------------------------------------------


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


def _check_operator(tensors: tuple, saved: dict[str, Any]) -> None:
    """What the public functions see to, and the kernels rely on."""
    op = "linear_logprobs"
    hidden, weight, labels, bias, mask, temperatures = tensors
    check_head(op, hidden, weight, bias)
    dtype = arithmetic(hidden, weight)
    rows = {"labels": (labels, torch.int64), "mask": (mask, torch.bool), "temperatures": (temperatures, dtype)}
    for name, (x, expected) in (rows | {name: (x, dtype) for name, x in saved.items()}).items():
        if x is None:
            continue
        if x.dtype != expected:
            check.fail(op, name, f"be {str(expected).removeprefix('torch.')}", x.dtype, TypeError)
        check.shape(op, name, x, hidden.shape[:-1], "hidden without its last dimension")
        check.device(op, name, x, hidden.device, "hidden")
        if not x.is_contiguous():
            check.fail(op, name, "be contiguous", f"strides {list(x.stride())}")


def _check_note(noted: torch.Tensor | None) -> None:
    op = "linear_logprobs"
    if noted is None:
        return
    if noted.dtype != torch.int64:
        check.fail(op, "label_note", "be int64", noted.dtype, TypeError)
    if noted.numel() != 4:
        check.fail(op, "label_note", "have 4 entries", noted.numel())
    if not noted.is_contiguous():
        check.fail(op, "label_note", "be contiguous", f"strides {list(noted.stride())}")


def _check_numbers(temperature: float, logit_scale: float, softcap: float) -> None:
    check.in_range("linear_logprobs", "temperature", temperature)
    check.in_range("linear_logprobs", "logit_scale", logit_scale)
    if softcap != 0:
        check.in_range("linear_logprobs", "softcap", softcap)


# ---- the rows that count --------------------------------------------------------------------------------------------


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Rows:
    """The tokens that count, as rows.

    While a CUDA graph is captured, their number must not matter: then all tokens are rows, and zeros where none counts.
    """

    def __init__(self, mask: torch.Tensor | None, count: int) -> None:
        self.hidden_mask = self.index = None
        self.all = count
        if mask is None:
            return
        if _capturing(mask):
            self.hidden_mask = mask.flatten()
        else:
            self.index = mask.flatten().nonzero().squeeze(1)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of a dense [tokens, ...]."""
        if self.index is not None:
            return x.index_select(0, self.index)
        if self.hidden_mask is not None:
            return torch.where(self.hidden_mask.view(-1, *[1] * (x.dim() - 1)), x, 0)
        return x

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] with zeros where none counts."""
        if self.index is not None:
            return x.new_zeros(self.all, *x.shape[1:]).index_copy_(0, self.index, x)
        return self.of(x)


# ---- products -------------------------------------------------------------------------------------------------------


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """out = a b or, with `add`, out += a b. Half precision may only be multiplied on CUDA."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in this dtype, dense and at a multiple of 64 bytes: libraries of matrix products round by strides and alignment."""
    x = x.to(dtype).contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


@dataclasses.dataclass
class _Head:
    """One call: its rows and its head, in the dtype in which they are multiplied."""

    tensors: tuple
    numbers: tuple

    def __post_init__(self) -> None:
        hidden, self.weight, labels, bias, mask, temperatures = self.tensors
        self.dtype = arithmetic(hidden, self.weight)
        halves = hidden.is_cuda and hidden.dtype == self.weight.dtype == torch.bfloat16
        self.operand_dtype = torch.bfloat16 if halves else self.dtype
        self.rows = _Rows(mask, labels.numel())
        self.hidden = _operand(self.rows.of(hidden.reshape(-1, hidden.shape[-1])), self.operand_dtype)
        self.targets: torch.Tensor = self.rows.of(labels.reshape(-1)).contiguous()
        self.temperatures = self.of_tokens(temperatures)
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.count, self.vocabulary = self.hidden.shape[0], self.weight.shape[0]
        self.tile_rows, self.tile_columns = tile_sizes(self.count, self.vocabulary, hidden.device.type)

    def of_tokens(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """A number for each token as one for each row."""
        return None if x is None else self.rows.of(x.reshape(-1)).contiguous()

    def blocks(self) -> Iterator[slice]:
        """The rows of each tile."""
        for first in range(0, self.count, self.tile_rows):
            yield slice(first, min(first + self.tile_rows, self.count))

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The columns of each tile, and their part of the weight."""
        for first in range(0, self.vocabulary, self.tile_columns):
            columns = slice(first, min(first + self.tile_columns, self.vocabulary))
            yield columns, _operand(self.weight[columns], self.operand_dtype)

    def new_tile(self) -> torch.Tensor:
        return self.hidden.new_empty(self.tile_rows, -(-self.tile_columns // 4) * 4, dtype=self.dtype)

    def fill(self, memory: torch.Tensor, block: slice, columns: slice, part: torch.Tensor) -> torch.Tensor:
        """The tile of products, plus bias, in this memory."""
        tile = memory[: block.stop - block.start, : columns.stop - columns.start]
        if self.bias is not None:
            tile.copy_(self.bias[columns])
        _multiply(self.hidden[block], part.t(), tile, add=self.bias is not None)
        return tile

    def at(self, block: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.targets[block], None if self.temperatures is None else self.temperatures[block]

    def where(self, columns: slice) -> tuple:
        return *self.numbers, columns.start, self.vocabulary


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
    _check_operator(tensors, {})
    _check_note(noted)
    _check_numbers(*numbers)
    if hidden.device.type == "cpu":
        check_values("linear_logprobs", weight.shape[0], labels, mask, temperatures)
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
        head = _Head(tensors, numbers)
        results = head.hidden.new_zeros(head.count, RESULTS, dtype=head.dtype)
        states, memory = head.hidden.new_empty(head.count, STATES, dtype=torch.float64), head.new_tile()
        for columns, part in head.parts():
            for block in head.blocks():
                tile = head.fill(memory, block, columns, part)
                outputs = (states[block], results[block])
                _fold(tile, *head.at(block), *outputs, *head.where(columns), with_entropy, with_statistics)
        return head.rows.back(results)


def rows_of_head(tensors: tuple, numbers: tuple, with_entropy: bool) -> tuple[torch.Tensor, ...]:
    """(logprobs, entropy, row_max, log_sum), a number a token each, of arguments that are checked."""
    return _folded(tensors, numbers, with_entropy, False)[:, :4].unbind(1)


def backward(
    hidden, weight, labels, bias, mask, temperatures, temperature, logit_scale, softcap, grad_logprobs, grad_entropy,
    entropy, row_max, log_sum, needs_hidden, needs_weight, needs_bias,
):  # fmt: skip
    tensors, numbers = (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)
    saved = {"grad_logprobs": grad_logprobs, "grad_entropy": grad_entropy, "row_max": row_max, "log_sum": log_sum}
    _check_operator(tensors, saved if grad_entropy is None else saved | {"entropy": entropy})
    _check_numbers(*numbers)
    if hidden.device.type == "cpu":
        check_values("linear_logprobs", weight.shape[0], labels, mask, temperatures)
    if hidden.is_cuda:
        inside = (labels >= 0) & (labels < weight.shape[0])
        for name in ("grad_logprobs", "grad_entropy"):
            saved[name] = None if saved[name] is None else torch.where(inside, saved[name], 0)
    grads = gradients_of_head(tensors, numbers, saved, entropy, (needs_hidden, needs_weight, needs_bias))
    return grads.results(hidden, weight, bias)


def gradients_of_head(
    tensors: tuple, numbers: tuple, saved: dict[str, Any], entropy: torch.Tensor, needs: tuple[bool, bool, bool]
) -> "_Gradients":
    """The gradients of hidden, weight and bias, of arguments that are checked. A label that is no column has no share."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        head = _Head(tensors, numbers)
        rows: dict[str, Any] = {name: head.of_tokens(x) for name, x in saved.items()}
        if rows["grad_logprobs"] is None:
            rows["grad_logprobs"] = torch.zeros_like(rows["row_max"])
        rows["entropy"] = rows["row_max"] if rows["grad_entropy"] is None else head.of_tokens(entropy)
        needs_hidden, needs_weight, needs_bias = needs
        grads = _Gradients(head, needs_hidden, needs_weight, needs_bias and tensors[3] is not None)
        grads.add_all(rows)
    return grads


class _Gradients:
    """The gradients of a call, added up tile by tile."""

    def __init__(self, head: _Head, needs_hidden: bool, needs_weight: bool, needs_bias: bool) -> None:
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
            _multiply(grad, part, self.hidden[block], add=True)
        if grad_part is not None:
            _multiply(grad.t(), self.head.hidden[block], grad_part, add=later)

    def results(self, hidden, weight, bias):
        """In the dtypes and shapes of hidden, weight and bias; empty where none is needed."""
        none = hidden.new_empty(0)
        grad_hidden = none if self.hidden is None else self.head.rows.back(self.hidden).to(hidden.dtype)
        return (
            none if self.hidden is None else grad_hidden.reshape(hidden.shape),
            weight.new_empty(0) if self.weight is None else self.weight,
            weight.new_empty(0) if self.bias is None else self.bias.to(bias.dtype),
        )
