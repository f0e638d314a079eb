"""The specification of `ppo_loss` with all its options, in plain torch. `reference.py` tells the rules that hold here
too."""

import torch

from ._ppo_options import STAT_NAMES, is_plain, option_names


def _accumulate(x):
    return x if x.dtype == torch.float64 else x.float()


def _clip(x, low, high):
    """torch.clamp as up to torch 2.14. Later versions have a gradient of 0 at the bounds, where it is 1 here."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def _or_zero(numerator, denominator):
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def _with_gradient_of(value, other):
    gap = other - other.detach()  # 0, or NaN where `other` is not finite
    return value.detach() + torch.where(gap == 0, gap, 0.0)


# ---- one term each --------------------------------------------------------------------------------------------------


def _log_ratio(logprobs, old_logprobs, counts, ratio_level, log_ratio_clamp):
    log_ratio = logprobs - old_logprobs
    if ratio_level != "token":
        mean = _or_zero(log_ratio.sum(-1, keepdim=True), counts.sum(-1, keepdim=True).to(log_ratio.dtype))
        mean = mean.expand(log_ratio.shape)
        log_ratio = mean if ratio_level == "sequence" else _with_gradient_of(mean, logprobs)
    return log_ratio if log_ratio_clamp is None else _clip(log_ratio, -log_ratio_clamp, log_ratio_clamp)


def _policy_loss(ratio, logprobs, advantages, policy_loss, low, high, dual_clip):
    """(loss, clipped below, clipped above, cut off by the dual clip) of each token."""
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if policy_loss == "reinforce":
        return -advantages * logprobs, never, never, never
    clipped = _clip(ratio, low, high)
    if policy_loss == "cispo":
        return -clipped.detach() * advantages * logprobs, ratio < low, ratio > high, never
    losses1, losses2 = -advantages * ratio, -advantages * clipped
    losses, cut = torch.max(losses1, losses2), losses2 > losses1
    below, above = cut & (advantages < 0), cut & (advantages > 0)
    if dual_clip is None:
        return losses, below, above, never
    most = -advantages * dual_clip
    bounded = torch.where(advantages < 0, torch.min(losses, most), losses)
    return bounded, below, above, (advantages < 0) & (losses > most)


def _value_loss(vpreds, values, returns, value_loss, huber_delta, cliprange_value):
    """(loss, clipped) of each token."""

    def penalty(error):
        if value_loss == "mse":
            return error**2
        size = error.abs()
        return torch.where(size <= huber_delta, error**2, huber_delta * (2 * size - huber_delta))

    losses1 = penalty(vpreds - returns)
    if cliprange_value is None:
        return 0.5 * losses1, torch.zeros_like(losses1, dtype=torch.bool)
    clipped = torch.max(torch.min(vpreds, values + cliprange_value), values - cliprange_value)
    losses2 = penalty(clipped - returns)
    return 0.5 * torch.max(losses1, losses2), losses2 > losses1


def _kl(logprobs, ref_logprobs, ratio, kl_estimator, kl_gradient):
    d = logprobs - ref_logprobs
    kl = {
        "k1": lambda: d,
        "k2": lambda: 0.5 * d**2,
        "k3": lambda: torch.exp(-d) - 1 + d,
        "abs": lambda: d.abs(),
    }[kl_estimator]()
    if kl_gradient == "straight_through":
        return _with_gradient_of(kl, 0.5 * d**2)
    return ratio * kl if kl_gradient == "weighted" else kl


class _Aggregate:
    """Terms of tokens to one number: sum over tokens of row weight * term, times scale / denominator."""

    def __init__(self, counts, dtype, aggregation, norm_length, denominator, scale, row_counts):
        own = counts.sum(-1, keepdim=True).to(dtype) if counts.dim() else counts.to(dtype)
        self.counts, self.row_weights = counts, torch.ones_like(own)
        if aggregation == "seq_mean_token_mean":
            length = own if row_counts is None else row_counts.to(dtype)[..., None]
            self.row_weights = torch.where(length < own, float("nan"), _or_zero(torch.ones_like(own), length))
        if aggregation == "token_sum":
            total = torch.ones((), dtype=dtype, device=counts.device)
        elif denominator is not None:
            total = torch.as_tensor(denominator, dtype=dtype, device=counts.device).reshape(())
            total = torch.where(total > 0, total, float("nan"))
        else:
            total = (own if aggregation == "token_mean" else (own > 0).to(dtype)).sum()
        if aggregation == "seq_mean_token_sum_norm":
            total = total * (counts.shape[-1] if norm_length is None else norm_length)
        self.factor = torch.where(counts.any(), scale * _or_zero(torch.ones_like(total), total), 0.0)

    def __call__(self, terms):
        return self.factor * torch.where(self.counts, self.row_weights * terms, 0.0).sum()


# ---- the op ---------------------------------------------------------------------------------------------------------


def ppo_loss(
    logprobs,
    old_logprobs,
    advantages,
    vpreds,
    values,
    returns,
    mask,
    *,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    ratio_threshold=float("inf"),
    dual_clip=None,
    log_ratio_clamp=None,
    ratio_level="token",
    policy_loss="clip",
    weights=None,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k1",
    kl_gradient="exact",
    entropy=None,
    entropy_coef=0.0,
    value_loss="mse",
    huber_delta=10.0,
    aggregation="token_mean",
    norm_length=None,
    denominator=None,
    scale=1.0,
    row_counts=None,
):
    options = {
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
    }
    plain = is_plain(vpreds, cliprange, cliprange_value, options)
    counts = mask != 0
    inputs = (logprobs, old_logprobs, advantages, vpreds, values, returns, weights, ref_logprobs, entropy)
    inputs = [None if x is None else torch.where(counts, _accumulate(x), 0.0) for x in inputs]
    logprobs, old_logprobs, advantages, vpreds, values, returns, weights, ref_logprobs, entropy = inputs
    old_logprobs, advantages, values, returns, weights, ref_logprobs = (
        None if x is None else x.detach() for x in (old_logprobs, advantages, values, returns, weights, ref_logprobs)
    )
    count = counts.sum().to(logprobs.dtype)
    aggregate = _Aggregate(counts, logprobs.dtype, aggregation, norm_length, denominator, scale, row_counts)

    def mean(terms):
        return _or_zero(torch.where(counts, terms, 0.0).to(logprobs.dtype).sum(), count)

    log_ratio = _log_ratio(logprobs, old_logprobs, counts, ratio_level, log_ratio_clamp)
    ratio = torch.exp(log_ratio)
    bounds = (cliprange, cliprange) if isinstance(cliprange, (int, float)) else cliprange
    losses, below, above, cut = _policy_loss(
        ratio, logprobs, advantages, policy_loss, 1.0 - bounds[0], 1.0 + bounds[1], dual_clip
    )
    if weights is not None:
        losses = torch.where(weights == 0, 0.0, weights * torch.where(weights == 0, 0.0, losses))
    parts = {"loss/policy": aggregate(losses)}
    loss = parts["loss/policy"]
    token_log_ratio = _log_ratio(logprobs, old_logprobs, counts, "token", log_ratio_clamp)
    ratio_mean = mean(ratio)
    stats = {
        "policy/approxkl": 0.5 * mean((logprobs - old_logprobs) ** 2),
        "policy/policykl": mean(old_logprobs - logprobs),
        "policy/clipfrac": mean(below | above),
        "policy/advantages_mean": mean(advantages),
        "policy/ratio_mean": ratio_mean,
        "policy/advantages": advantages,
        "policy/ratio": torch.where(counts, ratio, 0.0),
        "policy/clipfrac_low": mean(below),
        "policy/clipfrac_high": mean(above),
        "policy/approxkl_k3": mean(torch.exp(token_log_ratio) - 1 - token_log_ratio),
        "policy/ratio_max": _extreme(ratio, counts, torch.amax, -float("inf")),
        "policy/ratio_min": _extreme(ratio, counts, torch.amin, float("inf")),
        "policy/clipfrac_dual": mean(cut),
    }
    if vpreds is not None:
        value_losses, value_clipped = _value_loss(vpreds, values, returns, value_loss, huber_delta, cliprange_value)
        parts["loss/value"] = aggregate(value_losses)
        loss = loss + vf_coef * parts["loss/value"]
        stats |= {
            "returns/mean": mean(returns),
            "returns/var": _variance(returns, counts, mean, count),
            "val/vpred": mean(vpreds),
            "val/error": mean((vpreds - returns) ** 2),
            "val/clipfrac": mean(value_clipped),
            "val/mean": mean(values),
            "val/var": _variance(values, counts, mean, count),
        }
    if weights is not None:
        stats |= {"policy/weights_mean": mean(weights), "policy/weights_zero": mean(weights == 0)}
    if ref_logprobs is not None:
        kl = _kl(logprobs, ref_logprobs, torch.exp(token_log_ratio), kl_estimator, kl_gradient)
        parts["loss/kl"] = aggregate(kl)
        loss = loss + (kl_coef * parts["loss/kl"] if kl_coef else 0.0)
        stats["policy/ref_kl"] = mean(kl)
    if entropy is not None:
        parts["loss/entropy"] = aggregate(entropy)
        loss = loss - (entropy_coef * parts["loss/entropy"] if entropy_coef else 0.0)
        stats["policy/entropy"] = mean(entropy)

    skipped = ratio_mean > ratio_threshold
    parts["loss/total"] = loss = torch.where(skipped, 0.0, loss)
    stats |= {name: torch.where(skipped, 0.0, part) for name, part in parts.items()}
    stats["policy/skipped"] = skipped.to(ratio.dtype)
    on = (x is not None for x in (dual_clip, weights, ref_logprobs, entropy))
    order = (*STAT_NAMES, *(() if plain else option_names(*on)), "policy/advantages", "policy/ratio")
    return loss, {name: stats[name].detach() for name in order if name in stats}


def _extreme(ratio, counts, reduce, nothing):
    if ratio.numel() == 0:
        return ratio.new_zeros(())
    return torch.where(counts.any(), reduce(torch.where(counts, ratio, nothing)), 0.0)


def _variance(x, counts, mean, count):
    biased = mean(torch.where(counts, x - mean(x), 0.0).square())
    return torch.where(count <= 1, 0.0, biased * _or_zero(count, count - 1))
