"""The fused PPO loss as TRL's two terms, each with a gradient of its own."""

import torch

from ..ops.ppo_loss import ppo_loss


class _WithGradient(torch.autograd.Function):
    """`value`, a number whose gradient with respect to `x` is already known to be `grad`."""

    @staticmethod
    def forward(ctx, x, value, grad):
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx, grad_value):
        (grad,) = ctx.saved_tensors
        return grad_value * grad, None, None


def policy_and_value_loss(
    logprobs, old_logprobs, advantages, vpreds, values, returns, mask, *, vf_coef, **coefficients
):
    """(policy loss, vf_coef * value loss, stats), from one call of `ppo_loss`, whose arguments these are.

    The policy loss depends on logprobs alone and the value loss on vpreds alone, so the gradient of the sum with
    respect to each is that term's own; a caller may then weigh the two terms as it likes.
    """
    with torch.enable_grad():
        leaves = logprobs.detach().requires_grad_(), vpreds.detach().requires_grad_()
        total, stats = ppo_loss(
            leaves[0], old_logprobs, advantages, leaves[1], values, returns, mask, vf_coef=vf_coef, **coefficients
        )
        grad_logprobs, grad_vpreds = torch.autograd.grad(total, leaves)
    pg_loss = _WithGradient.apply(logprobs, stats["loss/policy"], grad_logprobs)
    vf_loss = _WithGradient.apply(vpreds, vf_coef * stats["loss/value"], grad_vpreds)
    return pg_loss, vf_loss, stats
