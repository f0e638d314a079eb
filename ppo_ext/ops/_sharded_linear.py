"""`linear_logprobs` on a head whose rows are spread over the processes of a group; see `_sharded_vocabulary`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._sharded_vocabulary import Rows, Shard, localize, merge


class ShardedLinearLogprobs(torch.autograd.Function):
    """The gradient of hidden is the sum over the shards, by one all_reduce; those of weight and bias are the shard's.

    ops: the forward operator of linear_logprobs, and the backward one of a shard.
    """

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
        with_statistics: bool,
        op: str,
        ops: tuple,
        shard: Shard,
        validate: bool,
    ) -> Any:
        local, owned = localize(labels, shard, weight.shape[0])
        logprobs, entropy, row_max, log_sum, *others = ops[0](
            hidden, weight, local, bias, mask, temperatures, *numbers, with_entropy, with_statistics, None
        )
        others = others if with_statistics else []
        own = Rows(logprobs, entropy if with_entropy else torch.zeros_like(logprobs), row_max, log_sum, tuple(others))
        divisor = numbers[0] if temperatures is None else temperatures.double()
        rows = merge(op, own, labels, mask, divisor, shard, weight.shape[0], validate)
        # a label of another shard is none of this one's columns
        ctx.save_for_backward(hidden, weight, torch.where(owned, local, -1), bias, mask, temperatures, *rows[1:4])
        ctx.numbers, ctx.group, ctx.op, ctx.with_entropy = numbers, shard.group, ops[1], with_entropy
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*rows.others)
        return (*rows[: 1 + with_entropy], *rows.others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any = None, *_: Any) -> tuple:
        *tensors, entropy, row_max, log_sum = ctx.saved_tensors
        if not ctx.with_entropy:  # then the second result is none of the entropy's
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 13
        grads = [None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy)]
        needs = ctx.needs_input_grad[:3]
        found = ctx.op(*tensors, *ctx.numbers, *grads, entropy, row_max, log_sum, *needs)
        if needs[0]:
            torch.distributed.all_reduce(found[0], group=ctx.group)
            found = (found[0].to(tensors[0].dtype), *found[1:])
        return *(grad if need else None for grad, need in zip(found, needs, strict=True)), *(None,) * 10
