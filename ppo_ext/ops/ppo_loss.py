"""PPO's clipped policy loss and clipped value loss with their statistics, in one pass; `_ppo_options_run` has the
options."""

from typing import Any

import torch

from . import _native, _ppo_options_run, check, reference
from ._ppo_options import STAT_NAMES, Aggregation, KLEstimator, KLGradient, PolicyLoss, RatioLevel, ValueLoss

# One more than the names. The forward pass computes the gradients without the division by the number of tokens, which
# it knows only at the end. That factor is the last entry, or 0 if the update is skipped; the backward pass applies it.
_STATS = len(STAT_NAMES) + 1

_forward, _forward_name = _native.define(
    "_ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor vpreds, Tensor values, Tensor returns,"
    " Tensor mask, float cliprange, float cliprange_value, float vf_coef, float ratio_threshold)"
    " -> (Tensor loss, Tensor stats, Tensor ratio, Tensor counted_advantages, Tensor grad_logprobs, Tensor grad_vpreds)"
)
_backward, _backward_name = _native.define(
    "_ppo_loss_backward(Tensor grad_loss, Tensor stats, Tensor grad_logprobs, Tensor grad_vpreds) -> (Tensor, Tensor)"
)


@_native.register_fake(_forward_name)
def _(logprobs, *_):
    token = [logprobs.new_empty(logprobs.shape) for _ in range(4)]
    return logprobs.new_empty(()), logprobs.new_empty(_STATS), *token


@_native.register_fake(_backward_name)
def _(grad_loss, stats, grad_logprobs, grad_vpreds):
    return torch.empty_like(grad_logprobs), torch.empty_like(grad_vpreds)


class _PPOLoss(torch.autograd.Function):
    """The loss. The forward pass has computed its gradients but for a factor, which the backward pass applies."""

    @staticmethod
    def forward(ctx, logprobs, vpreds, entropy, outputs):
        # Only inputs and outputs of this function need save_for_backward; an attribute is faster.
        loss, *ctx.saved = outputs
        # torch 2.10 cannot trace a function that returns a tensor of its caller's as it is
        return loss.view_as(loss) if torch.compiler.is_compiling() else loss

    @staticmethod
    def backward(ctx, grad_loss):
        check.no_gradient_of_gradient("ppo_loss", grad_loss)
        return *_backward(grad_loss, *ctx.saved), None, None


def _run(tensors, mask, denominator, row_counts, plan):
    if plan.plain:
        return _forward(*tensors, mask, *plan.numbers)
    return _ppo_options_run.run_operator(tensors, mask, denominator, row_counts, plan)


def _run_unprepared(tensors, mask, denominator, row_counts, plan):
    """The operator's outputs for inputs that need no conversion; None for others, which `_prepare` converts or refuses.

    The operator checks shapes and devices itself. Doing so here too takes a tenth of the time of a small minibatch.
    """
    if torch.compiler.is_compiling():
        return None
    try:
        first = tensors[0]
        dtype = first.dtype
        device_type = "cpu" if first.is_cpu else first.device.type  # torch makes a str of each type that is asked for
        if not (dtype is torch.float32 or dtype is torch.float64) or not _native.available(device_type):
            return None
        for x in tensors:
            if x is not None and (x.dtype is not dtype or not x.is_contiguous()):
                return None
        if mask.dtype is not torch.bool or not mask.is_contiguous():
            check.weights("ppo_loss", mask)
            mask = mask.bool().contiguous()
        if not torch.is_grad_enabled():
            return _run(tensors, mask, denominator, row_counts, plan)
        torch._C._set_grad_enabled(False)  # in less time than detaching the tensors takes, or torch.no_grad
        try:
            return _run(tensors, mask, denominator, row_counts, plan)
        finally:
            torch._C._set_grad_enabled(True)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _results(outputs, logprobs, vpreds, entropy, plan):
    """The loss, connected to what it depends on, and the dict of statistics."""
    if plan.plain:
        loss, vector, ratio, counted_advantages, *grads = outputs
        of_tokens = counted_advantages, ratio
    else:
        loss, vector, of_tokens, *grads = outputs
    if torch.is_grad_enabled() and (
        logprobs.requires_grad
        or (vpreds is not None and vpreds.requires_grad)
        or (entropy is not None and entropy.requires_grad)
    ):
        function = _PPOLoss if plan.plain else _ppo_options_run.PPOLossOptions
        loss = function.apply(logprobs, vpreds, entropy, (loss, vector, *grads))
    else:
        for name, x in (("logprobs", logprobs), ("vpreds", vpreds), ("entropy", entropy)):
            if x is not None:
                check.no_tangent("ppo_loss", name, x)
    return loss, _ppo_options_run.named_stats(plan.names, vector, of_tokens)


def ppo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor | None,
    values: torch.Tensor | None,
    returns: torch.Tensor | None,
    mask: torch.Tensor,
    *,
    cliprange: float | tuple[float, float] = 0.2,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    ratio_threshold: float = float("inf"),
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ratio_level: RatioLevel = "token",
    policy_loss: PolicyLoss = "clip",
    weights: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    kl_gradient: KLGradient = "exact",
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    value_loss: ValueLoss = "mse",
    huber_delta: float = 10.0,
    aggregation: Aggregation = "token_mean",
    norm_length: float | None = None,
    denominator: float | torch.Tensor | None = None,
    scale: float = 1.0,
    row_counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped policy loss and clipped value loss of a minibatch, with TRL's statistics.

        ratio = exp(logprobs - old_logprobs)
        pg_loss = mean max(-advantages * ratio, -advantages * clip(ratio, 1 - cliprange, 1 + cliprange))
        clipped = max(min(vpreds, values + cliprange_value), values - cliprange_value)
        vf_loss = 0.5 * mean max((vpreds - returns)^2, (clipped - returns)^2)
        loss = pg_loss + vf_coef * vf_loss

    where every mean is over the tokens that count. That is the loss without options; docs/losses.md has the formulas of
    all options.

    Args:
        logprobs: [B, T] (or any shape) float32, bfloat16, float16 or float64, log-probabilities of the tokens under the
            current policy; differentiable.
        old_logprobs: same shape, log-probabilities under the policy of the rollout.
        advantages, values, returns: same shape, of the rollout, see `gae`.
        vpreds: same shape, the current values; differentiable. Without a critic vpreds, values and returns are None.
        mask: same shape, bool, int or float, nonzero where a token counts.
        cliprange: how far the ratio may go from 1, finite in float32 and not negative; a pair (low, high) for below and
            above.
        cliprange_value: how far vpreds may go from values, likewise; None for an unclipped value loss.
        vf_coef: weight of the value loss, finite in float32. Its product with a value loss, or with the difference of vpred
            and return, is infinite in the loss or the gradient if it is beyond the results' dtype.
        ratio_threshold: if the mean ratio is larger, loss and gradients are exactly 0 and policy/skipped is 1. Infinity
            means never.
        dual_clip: for a negative advantage the loss is at most -advantages * dual_clip; larger than 1.
        log_ratio_clamp: bound of the log-ratio on both sides, beyond which it has no gradient.
        ratio_level: "token"; "sequence", the ratio of the mean log-ratio of the row, with the gradient through the mean;
            "sequence_token", the same value with each token's own gradient. A row is the last dimension.
        policy_loss: "clip", as above; "cispo", the clipped ratio as a constant weight of -advantages * logprobs;
            "reinforce", -advantages * logprobs.
        weights: same shape, constant factors of the policy terms, see `rollout_weights`; 0 drops a token.
        ref_logprobs: same shape, log-probabilities under a reference. kl_coef times the mean KL estimate is added.
        kl_estimator, kl_gradient: with D = logprobs - ref_logprobs, "k1" is D, "k2" D^2 / 2, "k3" exp(-D) - 1 + D, "abs"
            |D|; "exact" is its derivative, "straight_through" the gradient D, "weighted" multiplies value and gradient by
            the ratio.
        entropy: same shape, differentiable. entropy_coef times its mean is subtracted.
        value_loss: "mse", or "huber" with the bound huber_delta.
        aggregation: "token_mean"; "seq_mean_token_mean", the mean over rows of their means; "seq_mean_token_sum", of their
            sums; "seq_mean_token_sum_norm", of their sums divided by norm_length (default: the last dimension);
            "token_sum". A row in which no token counts is no row. All terms are aggregated alike.
        denominator: a number or a tensor of one number in the place of the number of tokens or rows that count here: that
            of the whole batch, of which these tokens are a part.
        scale: factor of the loss, finite in float32.
        row_counts: [B], the tokens of each whole row, where rows are split ("seq_mean_token_mean").

    Returns:
        (loss, stats): a tensor of shape [] that is differentiable once, and a dict of detached tensors under TRL's keys
        without their "ppo/" prefix. Of shape []: loss/{policy, value, total}, policy/{approxkl, policykl, clipfrac,
        advantages_mean, ratio_mean, skipped}, returns/{mean, var}, val/{vpred, error, clipfrac, mean, var}. Of the
        shape of the input, and 0 where the mask is 0: policy/{advantages, ratio}. All are float32 (float64 if an input
        is float64).
        With options also policy/{approxkl_k3, clipfrac_low, clipfrac_high, ratio_max, ratio_min} and, where they are
        given, policy/{clipfrac_dual, weights_mean, weights_zero, ref_kl, entropy} and loss/{kl, entropy}; without a
        critic none of loss/value, returns/ and val/. loss/ are what the loss is the sum of, all others means over tokens.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, or a coefficient is not a number.
        ValueError: shapes or devices do not match, a clip range is negative or not finite, vf_coef is not finite, or
            ratio_threshold is NaN; an option is out of its range; two options mean nothing together, such as dual_clip with
            "cispo" or kl_coef without ref_logprobs; or denominator is the number 0 and a token counts. A denominator on the
            device that is not positive makes the loss NaN.
        NotImplementedError: logprobs, vpreds or entropy carry a forward-mode tangent.

    Notes:
        Masked inputs never influence a result, and their gradients are 0. If no token counts, loss, gradients and
        statistics are 0. Variances are unbiased, and 0 for one token. If the two terms of a max or min are equal, each
        receives half of the gradient; at the bounds of the clip the gradient passes, as in torch.
        Loss, statistics and gradients come from one pass, with sums in float64 in a fixed order: same bits on every run
        and for any number of threads.

    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 9; TRL 0.11.4, `PPOTrainer.loss`. The sign of the value
    term is TRL's (a loss to minimise), where the paper's objective subtracts it.
    """
    plan = _ppo_options_run.plan(
        "ppo_loss",
        cliprange,
        cliprange_value,
        vf_coef,
        ratio_threshold,
        dual_clip,
        log_ratio_clamp,
        ratio_level,
        policy_loss,
        kl_coef,
        kl_estimator,
        kl_gradient,
        entropy_coef,
        value_loss,
        huber_delta,
        aggregation,
        norm_length,
        scale,
        vpreds is not None,
        weights is not None,
        ref_logprobs is not None,
        entropy is not None,
        denominator is not None,
        row_counts is not None,
    )
    tensors: Any = logprobs, old_logprobs, advantages, vpreds, values, returns
    if not plan.plain:
        tensors += (weights, ref_logprobs, entropy)
    outputs = _run_unprepared(tensors, mask, denominator, row_counts, plan)
    if outputs is None:
        given: dict[str, Any] = {
            "logprobs": logprobs,
            "old_logprobs": old_logprobs,
            "advantages": advantages,
            "vpreds": vpreds,
            "values": values,
            "returns": returns,
            "mask": mask,
            "cliprange_value": cliprange_value,
            "vf_coef": vf_coef,
            "ratio_threshold": ratio_threshold,
            "dual_clip": dual_clip,
            "log_ratio_clamp": log_ratio_clamp,
            "ratio_level": ratio_level,
            "policy_loss": policy_loss,
            "weights": weights,
            "ref_logprobs": ref_logprobs,
            "kl_coef": kl_coef,
            "kl_estimator": kl_estimator,
            "kl_gradient": kl_gradient,
            "entropy": entropy,
            "entropy_coef": entropy_coef,
            "value_loss": value_loss,
            "huber_delta": huber_delta,
            "aggregation": aggregation,
            "norm_length": norm_length,
            "denominator": denominator,
            "scale": scale,
            "row_counts": row_counts,
            "cliprange": plan.numbers[0] if plan.plain else tuple(plan.numbers[:2]),
        }
        given |= _ppo_options_run.prepare("ppo_loss", given, _ppo_options_run.FLOATS, "logprobs")
        if not _native.available(given["logprobs"].device.type):
            of_tokens = given["logprobs"], given["mask"]
            _ppo_options_run.denominators("ppo_loss", given, "logprobs", *of_tokens, plan.numbers)
            return reference.ppo_loss(**given)
        logprobs, vpreds, entropy = (given[name] for name in ("logprobs", "vpreds", "entropy"))
        tensors = [given[name] for name in _ppo_options_run.FLOATS[: len(tensors)]]
        tensors = [x.detach() if x is not None and x.requires_grad else x for x in tensors]
        outputs = _run(tensors, given["mask"], denominator, row_counts, plan)
    return _results(outputs, logprobs, vpreds, entropy, plan)
