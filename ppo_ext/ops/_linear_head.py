"""The rows that count and the head of one call, and the matrix products by torch that make a tile of their logits."""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from ._linear_checks import arithmetic
from ._pages import new_empty

# Rows and entries of a tile. On a CPU it stays in the caches, and the products are still large enough to be fast. On
# CUDA it is as wide as keeps the sums over its columns, which are read and written for each part of the vocabulary,
# small beside the products.
_SIZES = {"cpu": (1024, 1 << 20), "cuda": (8192, 1 << 26)}
_MOST_COLUMNS = 8192
_CHUNK_ROWS = {"cpu": 256, "cuda": 2048}  # rows whose logits are all held at a time, where gradients are made at once


def tile_sizes(rows: int, vocabulary: int, device_type: str) -> tuple[int, int]:
    """The rows and columns of a tile."""
    most_rows, entries = _SIZES[device_type]
    tile_rows = max(1, min(rows, most_rows))
    return tile_rows, min(vocabulary, _MOST_COLUMNS, entries // tile_rows)


def chunk_sizes(rows: int, vocabulary: int, device_type: str) -> tuple[int, int]:
    """The rows of a chunk, of which all are nearly equal, and the columns of its tiles, which are parts of its logits."""
    chunks = max(1, -(-rows // _CHUNK_ROWS[device_type]))
    chunk_rows, columns = tile_sizes(-(-rows // chunks), vocabulary, device_type)
    return chunk_rows, columns if columns == vocabulary else max(16, columns // 16 * 16)


# ---- the rows that count --------------------------------------------------------------------------------------------


def capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Rows:
    """The tokens that count, as rows.

    While a CUDA graph is captured, their number must not matter: then all tokens are rows, and zeros where none counts.
    """

    def __init__(self, mask: torch.Tensor | None, count: int) -> None:
        self.hidden_mask = self.index = None
        self.all = count
        if mask is None:
            return
        if capturing(mask):
            self.hidden_mask = mask.flatten()
        else:
            self.index = mask.flatten().nonzero().squeeze(1)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of a dense [tokens, ...]."""
        if self.index is not None:
            return x.index_select(0, self.index)
        if self.hidden_mask is not None:
            return torch.where(self.hidden_mask.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))
        return x

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] with zeros where none counts."""
        if self.index is not None:
            return x.new_zeros(self.all, *x.shape[1:]).index_copy_(0, self.index, x)
        return self.of(x)


# ---- products -------------------------------------------------------------------------------------------------------


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
    """out = a b or, with `add`, out += a b. Half precision may only be multiplied on CUDA."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
    elif add:
        out += torch.mm(a, b, out_dtype=out.dtype)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _is_operand(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """In this dtype, dense and at a multiple of 64 bytes: libraries of matrix products round by strides and alignment."""
    return x.dtype == dtype and x.is_contiguous() and x.data_ptr() % 64 == 0


def _copy(x: torch.Tensor, dtype: torch.dtype, memory: torch.Tensor | None = None) -> torch.Tensor:
    """Memory whose first rows are x: this, which an earlier copy as long as x or longer has left, or new one."""
    memory = x.new_empty(x.shape, dtype=dtype) if memory is None else memory
    memory[: len(x)].copy_(x)
    return memory


@dataclasses.dataclass
class Head:
    """One call: its rows and its head, in the dtype in which they are multiplied."""

    tensors: tuple
    numbers: tuple
    sizes: Callable[[int, int, str], tuple[int, int]] = tile_sizes

    def __post_init__(self) -> None:
        hidden, self.weight, labels, bias, mask, temperatures = self.tensors
        self.dtype = arithmetic(hidden, self.weight)
        halves = hidden.is_cuda and hidden.dtype == self.weight.dtype == torch.bfloat16
        self.operand_dtype = torch.bfloat16 if halves else self.dtype
        self.rows = Rows(mask, labels.numel())
        rows = self.rows.of(hidden.reshape(-1, hidden.shape[-1]))
        self.hidden = rows if _is_operand(rows, self.operand_dtype) else _copy(rows, self.operand_dtype)
        self.targets: torch.Tensor = self.rows.of(labels.reshape(-1)).contiguous()
        self.temperatures = self.of_tokens(temperatures)
        self.bias = None if bias is None else bias.to(self.dtype).contiguous()
        self.count, self.vocabulary = self.hidden.shape[0], self.weight.shape[0]
        self.tile_rows, self.tile_columns = self.sizes(self.count, self.vocabulary, hidden.device.type)

    def of_tokens(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """A number for each token as one for each row."""
        return None if x is None else self.rows.of(x.reshape(-1)).contiguous()

    def blocks(self) -> Iterator[slice]:
        """The rows of each tile."""
        for first in range(0, self.count, self.tile_rows):
            yield slice(first, min(first + self.tile_rows, self.count))

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The columns of each tile, and their part of the weight, until the next one is asked for."""
        copy = None
        for first in range(0, self.vocabulary, self.tile_columns):
            columns = slice(first, min(first + self.tile_columns, self.vocabulary))
            part = self.weight[columns]
            if not _is_operand(part, self.operand_dtype):
                copy = _copy(part, self.operand_dtype, copy)  # one memory for all: new pages cost more than the copy
                part = copy[: len(part)]
            yield columns, part

    def new_tile(self, columns: int | None = None) -> torch.Tensor:
        """Memory for a tile or, if `columns` is the size of the vocabulary, for the tiles of a chunk side by side."""
        return new_empty(self.hidden, self.tile_rows, -(-(columns or self.tile_columns) // 4) * 4, dtype=self.dtype)

    def fill(self, memory: torch.Tensor, block: slice, columns: slice, part: torch.Tensor) -> torch.Tensor:
        """The tile of products, plus bias, in this memory."""
        tile = memory[: block.stop - block.start, : columns.stop - columns.start]
        if self.bias is not None:
            tile.copy_(self.bias[columns])
        multiply(self.hidden[block], part.t(), tile, add=self.bias is not None)
        return tile

    def at(self, block: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.targets[block], None if self.temperatures is None else self.temperatures[block]

    def where(self, columns: slice) -> tuple:
        return *self.numbers, columns.start, self.vocabulary
