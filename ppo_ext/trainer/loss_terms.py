"""The fused PPO loss as TRL's two terms, each with its own gradient, and the entropy statistic."""

from typing import Any

import torch

from ..ops.logprobs import logprobs_and_entropy
from ..ops.masked import masked_mean
from ..ops.ppo_loss import ppo_loss


class _WithGradient(torch.autograd.Function):
    """`value`, a number whose gradient with respect to `x` is already known to be `grad`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_value * grad, None, None


def policy_and_value_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    vf_coef: float,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    **coefficients: Any,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(policy loss, vf_coef * value loss, stats), from one call of `ppo_loss`, whose arguments these are.

    The first includes the entropy term, if entropy is given. The policy loss depends on logprobs alone and the value loss
    on vpreds alone. So the gradient of their sum with respect to either of the two is the gradient of one term, and a
    caller may weigh the terms as it likes.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (logprobs, vpreds, entropy) if x is not None]
        total, stats = ppo_loss(
            leaves[0],
            old_logprobs,
            advantages,
            leaves[1],
            values,
            returns,
            mask,
            vf_coef=vf_coef,
            entropy=None if entropy is None else leaves[2],
            entropy_coef=entropy_coef,
            **coefficients,
        )
        grad_logprobs, grad_vpreds, *grad_entropy = torch.autograd.grad(total, leaves)
    pg_loss = _WithGradient.apply(logprobs, stats["loss/policy"], grad_logprobs)
    if entropy is not None:
        bonus = torch.where(stats["policy/skipped"] == 0, -entropy_coef * stats["loss/entropy"], 0.0)
        pg_loss = pg_loss + _WithGradient.apply(entropy, bonus, *grad_entropy)
    vf_loss = _WithGradient.apply(vpreds, vf_coef * stats["loss/value"], grad_vpreds)
    return pg_loss, vf_loss, stats


def mean_entropy(entropy: torch.Tensor | None, logits: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the tokens that count, a constant for autograd; NaN where neither entropy nor logits are known.

    entropy: [B, T] or None. logits: [B, T, V], read only if entropy is None. mask: [B, T].
    """
    if entropy is None and logits is None:
        return torch.full((), float("nan"), device=mask.device)
    if entropy is None:
        assert logits is not None
        entropy = _entropy(logits.detach(), mask)
    return masked_mean(entropy.detach(), mask)


def entropy_with_gradient(
    entropy: torch.Tensor | None, logits: torch.Tensor | None, logprobs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The entropy of each token, for the entropy term; from the logits if it is not given.

    Raises: ValueError if neither is given, or if it has no gradient where the log-probabilities have one.
    """
    if entropy is None and logits is not None:
        entropy = _entropy(logits, mask)
    if entropy is None or logprobs.requires_grad and not entropy.requires_grad and torch.is_grad_enabled():
        got = "neither" if entropy is None else "constants"
        raise ValueError(f"PPOTrainer.loss: entropy or logits must have a gradient with entropy_coef > 0, got {got}")
    return entropy


def _entropy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    no_labels = torch.zeros_like(mask, dtype=torch.int64)
    return logprobs_and_entropy(logits, no_labels, mask=mask)[1]
