"""PPO's clipped policy loss and clipped value loss, with every statistic of theirs, in one pass."""

import torch
from torch.autograd.function import once_differentiable

from . import _native, check, reference

# The order of PPOStat in csrc/ppo_loss.h.
STAT_NAMES = ("loss/policy", "loss/value", "loss/total", "policy/approxkl", "policy/policykl", "policy/clipfrac",
              "policy/advantages_mean", "policy/ratio_mean", "policy/skipped", "returns/mean", "returns/var",
              "val/vpred", "val/error", "val/clipfrac", "val/mean", "val/var")
_STATS = len(STAT_NAMES) + 1  # the last one is the factor that the saved gradients still lack

_forward, _forward_name = _native.define(
    "_ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor vpreds, Tensor values, Tensor returns,"
    " Tensor mask, float cliprange, float cliprange_value, float vf_coef, float ratio_threshold)"
    " -> (Tensor loss, Tensor stats, Tensor ratio, Tensor grad_logprobs, Tensor grad_vpreds)")
_backward, _backward_name = _native.define(
    "_ppo_loss_backward(Tensor grad_loss, Tensor stats, Tensor grad_logprobs, Tensor grad_vpreds)"
    " -> (Tensor, Tensor)")


@torch.library.register_fake(_forward_name)
def _(logprobs, *_):
    token = [logprobs.new_empty(logprobs.shape) for _ in range(3)]
    return logprobs.new_empty(()), logprobs.new_empty(_STATS), *token


@torch.library.register_fake(_backward_name)
def _(grad_loss, stats, grad_logprobs, grad_vpreds):
    return torch.empty_like(grad_logprobs), torch.empty_like(grad_vpreds)


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, vpreds, old_logprobs, advantages, values, returns, mask, *coefficients):
        loss, stats, ratio, grad_logprobs, grad_vpreds = _forward(
            logprobs, old_logprobs, advantages, vpreds, values, returns, mask, *coefficients)
        ctx.save_for_backward(stats, grad_logprobs, grad_vpreds)
        ctx.mark_non_differentiable(stats, ratio)
        ctx.set_materialize_grads(False)
        return loss, stats, ratio

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _stats, _ratio):
        if grad_loss is None:
            return (None,) * 11
        return *_backward(grad_loss, *ctx.saved_tensors), *(None,) * 9


def _prepare(logprobs, others, mask):
    check.floating("ppo_loss", "logprobs", logprobs)
    for name, x in others:
        check.floating("ppo_loss", name, x)
        check.shape("ppo_loss", name, x, logprobs.shape, "logprobs")
        check.device("ppo_loss", name, x, logprobs.device, "logprobs")
    mask = check.mask("ppo_loss", mask, logprobs.shape, logprobs.device, "logprobs").contiguous()
    return [x.contiguous() for x in check.same_dtype(logprobs, *(x for _, x in others))], mask


def ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, *,
             cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, ratio_threshold=float("inf")):
    """PPO's loss on a minibatch, and TRL's statistics of it.

        ratio = exp(logprobs - old_logprobs)
        pg_loss = mean max(-advantages * ratio, -advantages * clip(ratio, 1 - cliprange, 1 + cliprange))
        clipped = max(min(vpreds, values + cliprange_value), values - cliprange_value)
        vf_loss = 0.5 * mean max((vpreds - returns)^2, (clipped - returns)^2)
        loss = pg_loss + vf_coef * vf_loss

    with every mean over the tokens that count.

    Args:
        logprobs: [B, T] (or any shape) log-probabilities under the current policy; differentiable.
        old_logprobs: same shape, those of the rollout.
        advantages, values, returns: same shape, from the rollout (`gae`).
        vpreds: same shape, the current values; differentiable.
        mask: same shape, bool, int or float, nonzero where a token counts.
        cliprange, cliprange_value: half widths of the two clips, finite and not negative.
        vf_coef: weight of the value loss, finite.
        ratio_threshold: if the mean ratio exceeds it, loss and gradients are exactly 0 and policy/skipped is 1.

    Returns:
        (loss, stats): a 0-d tensor, and a dict of detached tensors under TRL's keys without their "ppo/" prefix:
        loss/{policy, value, total}, policy/{approxkl, policykl, clipfrac, advantages_mean, ratio_mean, skipped},
        returns/{mean, var}, val/{vpred, error, clipfrac, mean, var}, all 0-d, and policy/advantages and policy/ratio
        in the shape of the input, 0 where the mask is 0. float32 throughout (float64 if an input is float64).

    Raises:
        TypeError: an input is not of a floating dtype. ValueError: shapes or devices do not match, a clip range is
        negative or not finite, or vf_coef is not finite.

    Notes:
        Where two terms of a max or min tie, the gradient goes half to each, and the clip passes it at its bounds, as in
        torch. If no token counts, loss, gradients and statistics are 0. Variances are unbiased, 0 for one token.
        Loss, statistics and gradients come from one pass, with float64 sums in a fixed order: same bits on every run.
        Differentiable once.

    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 9; TRL 0.11.4, `PPOTrainer.loss`. The sign of the value
    term is TRL's (a loss to minimise), where the paper's objective subtracts it.
    """
    for name, x in (("cliprange", cliprange), ("cliprange_value", cliprange_value)):
        if not 0 <= x < float("inf"):
            check.fail("ppo_loss", name, "be finite and not negative", x)
    check.finite("ppo_loss", "vf_coef", vf_coef)
    others = (("old_logprobs", old_logprobs), ("advantages", advantages), ("vpreds", vpreds), ("values", values),
              ("returns", returns))
    tensors, mask = _prepare(logprobs, others, mask)
    logprobs, old_logprobs, advantages, vpreds, values, returns = tensors
    coefficients = (cliprange, cliprange_value, vf_coef, ratio_threshold)
    if not _native.available(logprobs.device.type):
        return reference.ppo_loss(*tensors, mask, cliprange=cliprange, cliprange_value=cliprange_value,
                                  vf_coef=vf_coef, ratio_threshold=ratio_threshold)
    loss, vector, ratio = _PPOLoss.apply(logprobs, vpreds, old_logprobs, advantages, values, returns, mask,
                                         *coefficients)
    stats = dict(zip(STAT_NAMES, vector.unbind(0)))
    stats["policy/advantages"] = torch.where(mask, advantages, 0.0)
    stats["policy/ratio"] = ratio
    return loss, stats
