"""`linear_logprobs` on a head whose rows are spread over the processes of a group; see `_sharded_vocabulary`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import _linear_tiles
from ._sharded_vocabulary import Rows, Shard, localize, merge


class ShardedLinearLogprobs(torch.autograd.Function):
    """The gradient of hidden is the sum over the shards, by one all_reduce; those of weight and bias are the shard's."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        temperatures: torch.Tensor | None,
        numbers: tuple,
        with_entropy: bool,
        op: str,
        shard: Shard,
        validate: bool,
    ) -> Any:
        local, owned = localize(labels, shard, weight.shape[0])
        found = _linear_tiles.rows_of_head((hidden, weight, local, bias, mask, temperatures), numbers, with_entropy)
        logprobs, entropy, row_max, log_sum = (x.reshape(labels.shape) for x in found)
        own = Rows(logprobs, entropy if with_entropy else torch.zeros_like(logprobs), row_max, log_sum)
        divisor = numbers[0] if temperatures is None else temperatures.double()
        rows = merge(op, own, labels, mask, divisor, shard, weight.shape[0], validate)
        # a label of another shard is none of this one's columns
        ctx.save_for_backward(hidden, weight, torch.where(owned, local, -1), bias, mask, temperatures, *rows[1:])
        ctx.numbers, ctx.group = numbers, shard.group
        ctx.set_materialize_grads(False)
        return (rows.logprobs, rows.entropy) if with_entropy else (rows.logprobs,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any = None) -> tuple:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 11
        *tensors, entropy, row_max, log_sum = ctx.saved_tensors
        saved = {
            "grad_logprobs": None if grad_logprobs is None else grad_logprobs.contiguous(),
            "grad_entropy": None if grad_entropy is None else grad_entropy.contiguous(),
            "row_max": row_max,
            "log_sum": log_sum,
        }
        needs = ctx.needs_input_grad[:3]
        grads = _linear_tiles.gradients_of_head(tuple(tensors), ctx.numbers, saved, entropy, needs)
        if grads.hidden is not None:
            torch.distributed.all_reduce(grads.hidden, group=ctx.group)
        hidden, weight, _, bias, *_ = tensors
        found = grads.results(hidden, weight, bias)
        return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *(None,) * 8
