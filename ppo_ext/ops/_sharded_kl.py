"""`full_kl` over a vocabulary that is spread over the processes of a group; see `_sharded_vocabulary`."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import check
from ._groups import gather
from ._sharded_vocabulary import masses


class ShardedKL(torch.autograd.Function):
    """ops: the operators of full_kl (forward, backward, backward in place) and the forward one of logprobs."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        ref_logits: torch.Tensor,
        mask: torch.Tensor | None,
        temperatures: torch.Tensor | None,
        temperature: float,
        inplace_backward: bool,
        ops: tuple,
        group: Any,
    ) -> torch.Tensor:
        inputs = (mask, temperatures, temperature)
        own = ops[0](logits, ref_logits, *inputs)  # kl, x_t, s, x'_t, mean gap; see csrc/full_kl.h
        no_labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        _, _, ref_max, ref_log_sum = ops[3](ref_logits, no_labels, *inputs, False, None)
        numbers = torch.stack([x.flatten() for x in (*own, ref_max, ref_log_sum)], dim=-1)
        kl, pivot, total, ref_pivot, mean_gap, ref_max, ref_log_sum = gather(numbers, group).double().unbind(-1)
        divisor = temperature if temperatures is None else temperatures.double().flatten()
        log_mass, whole_max, whole_log_sum = masses(pivot, total.log(), divisor)
        ref_log_mass, _, _ = masses(ref_max, ref_log_sum, divisor)
        mass = log_mass.exp()
        whole_kl = torch.where(mass == 0, 0.0, mass * (kl + log_mass - ref_log_mass)).sum(0)
        # a pivot is a logit of the policy and the reference's beside it: those of the shard with the largest
        owner = pivot.argmax(dim=0, keepdim=True)
        whole_ref_pivot = ref_pivot.gather(0, owner)[0]
        shift = ((pivot - whole_max) - (ref_pivot - whole_ref_pivot)) / divisor
        whole_gap = torch.where(mass == 0, 0.0, mass * (mean_gap + shift)).sum(0)
        saved = (whole_max, whole_log_sum.exp(), whole_ref_pivot, whole_gap)
        ctx.save_for_backward(
            logits, ref_logits, mask, temperatures, *(x.to(own[0].dtype).reshape(own[0].shape) for x in saved)
        )
        ctx.temperature, ctx.inplace_backward, ctx.ops = temperature, inplace_backward, ops
        if mask is not None:
            whole_kl = torch.where(mask.flatten(), whole_kl, 0.0)
        return whole_kl.to(own[0].dtype).reshape(own[0].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: torch.Tensor) -> tuple:
        logits, ref_logits, mask, temperatures, *saved = ctx.saved_tensors
        arguments = (ref_logits, grad_kl.contiguous(), mask, *saved, temperatures, ctx.temperature)
        if not ctx.inplace_backward or not check.overwritable(logits, ref_logits):
            return ctx.ops[1](logits, *arguments), *(None,) * 7
        ctx.ops[2](logits, *arguments)
        torch.autograd.graph.increment_version(logits)
        return logits, *(None,) * 7
