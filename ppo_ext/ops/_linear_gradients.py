"""What happens to a tile of logits: it is folded into a few numbers a row, or turned into its gradient in place, from
which two products make its parts of the gradients of hidden states and weight."""

from typing import Any

import torch

from . import _native
from ._linear_head import Head, multiply
from ._pages import new_empty

_TILE = (
    "Tensor targets, Tensor? temperatures, {}, float temperature, float logit_scale, float softcap, int first,"
    " int vocabulary"
)
fold, _fold_name = _native.define(
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


class Gradients:
    """The gradients of a call, added up tile by tile.

    whole_weight: the weight's gradient is added up as a whole, as its parts come up again for other rows.
    """

    def __init__(self, head: Head, needs: tuple[bool, bool, bool], whole_weight: bool = False) -> None:
        self.head = head
        needs_hidden, needs_weight, needs_bias = needs
        zeros, dtype = head.hidden.new_zeros, head.dtype
        self.hidden = zeros(head.hidden.shape, dtype=dtype) if needs_hidden else None
        self.weight = new_empty(head.weight, *head.weight.shape, dtype=head.weight.dtype) if needs_weight else None
        self.bias = zeros(head.vocabulary, dtype=dtype) if needs_bias else None
        if self.weight is not None and head.count == 0:
            self.weight.zero_()
        direct = self.weight is None or self.weight.dtype == dtype
        rows = head.vocabulary if whole_weight else head.tile_columns
        self.sum = None if direct else new_empty(head.weight, rows, head.weight.shape[1], dtype=dtype)
        self.whole_weight = whole_weight

    def of_weight(self, columns: slice) -> torch.Tensor | None:
        """Where the gradient of this part of the weight is added up; None if it is not needed."""
        if self.weight is None or self.sum is None:
            return None if self.weight is None else self.weight[columns]
        return self.sum[columns] if self.whole_weight else self.sum[: columns.stop - columns.start]

    def write_weight(self, columns: slice) -> None:
        """Rounds the sum of this part of the weight's gradient to the weight's dtype, if it has another."""
        total = self.of_weight(columns)
        if self.weight is not None and self.sum is not None and total is not None:
            self.weight[columns] = total

    def add(self, tile: torch.Tensor, rows: dict[str, Any], block: slice, columns: slice, part: torch.Tensor) -> None:
        """Adds what a tile of logits gives; the tile is overwritten. rows: what it needs of each of them."""
        names = ("grad_logprobs", "grad_entropy", "entropy", "row_max", "log_sum")
        _gradient(tile, *self.head.at(block), *(rows[name] for name in names), *self.head.where(columns))
        later = block.start > 0
        if self.bias is not None:
            self.bias[columns] = tile.sum(0) + (self.bias[columns] if later else 0)
        grad = tile.to(self.head.operand_dtype)
        if self.hidden is not None:
            multiply(grad, part, self.hidden[block], add=True)
        grad_part = self.of_weight(columns)
        if grad_part is not None:
            multiply(grad.t(), self.head.hidden[block], grad_part, add=later)

    def results(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rounded: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the dtypes (that of hidden if rounded) and shapes of hidden, weight and bias; empty where none is needed."""
        dtype = hidden.dtype if rounded else self.head.dtype
        none = hidden.new_empty(0, dtype=dtype)
        grad_hidden = none if self.hidden is None else self.head.rows.back(self.hidden).to(dtype)
        return (
            none if self.hidden is None else grad_hidden.reshape(hidden.shape),
            weight.new_empty(0) if self.weight is None else self.weight,
            weight.new_empty(0) if self.bias is None or bias is None else self.bias.to(bias.dtype),
        )
