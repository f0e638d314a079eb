"""The specification: every op in plain torch, differentiable by autograd, equal to TRL 0.11.4 where TRL is defined.

Inputs may be float32, bfloat16, float16 or float64; arithmetic and results are in float32 (float64 for float64). `mask`
is nonzero where a token counts. Masked inputs are replaced by a selection, not multiplied by 0, so that a NaN among
them does not spread. Each function has the name and the arguments of the op that it specifies, without those that only
concern execution.
"""

import torch

from .reference_ppo_loss import ppo_loss as ppo_loss
from .reference_rollout_weights import rollout_weights as rollout_weights

WHITEN_EPS = 1e-8  # added to the variance under the square root, as in TRL's masked_whiten


def _accumulate(x):
    return x if x.dtype == torch.float64 else x.float()


def _as_bool(mask, like):
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0


def _log_softmax(logits, counts, temperature):
    """Log-softmax of logits / temperature over the vocabulary, with zeros for the logits of rows that do not count."""
    rows = torch.where(counts[..., None], _accumulate(logits), 0.0)
    top = rows.amax(-1, keepdim=True)
    if isinstance(temperature, torch.Tensor):
        temperature = torch.where(counts, temperature.to(rows.dtype), 1.0)[..., None]
    # An infinite maximum is subtracted too: -inf - -inf makes a row NaN in which no entry has probability. Halves, as
    # the difference of two finite logits may be too large for their dtype where its quotient is not.
    return torch.log_softmax((0.5 * rows - 0.5 * top.detach()) / (0.5 * temperature), dim=-1)


def logprobs_and_entropy(logits, labels, *, temperature=1.0, mask=None):
    counts = _as_bool(mask, labels)
    log_p = _log_softmax(logits, counts, temperature)
    index = torch.where(counts, labels, 0).long()
    picked = log_p.gather(-1, index[..., None]).squeeze(-1)
    p = log_p.exp()
    # 0 log 0 = 0: an entry of the vocabulary without probability adds nothing to the entropy.
    entropy = -torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    return torch.where(counts, picked, 0.0), torch.where(counts, entropy, 0.0)


def logprobs(logits, labels, *, temperature=1.0, mask=None):
    return logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)[0]


def full_kl(logits, ref_logits, *, temperature=1.0, mask=None):
    counts = _as_bool(mask, logits[..., 0])
    log_p = _log_softmax(logits, counts, temperature)
    log_q = _log_softmax(ref_logits.detach(), counts, temperature)
    p = log_p.exp()
    gap = torch.where(p == 0, 0.0, torch.where(p == 0, 0.0, log_p) - log_q)
    return torch.where(counts, torch.where(p == 0, 0.0, p * gap).sum(-1), 0.0)


def linear_logits(hidden, weight, counts, bias=None, logit_scale=1.0, softcap=None):
    """The logits of the head; those of rows that do not count are of hidden states of 0."""
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    logits = torch.where(counts[..., None], hidden.to(dtype), 0.0) @ weight.to(dtype).T
    logits = logit_scale * (logits if bias is None else logits + bias.to(dtype))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_statistics(
    hidden,
    weight,
    labels,
    *,
    bias=None,
    temperature=1.0,
    logit_scale=1.0,
    softcap=None,
    mask=None,
    outputs=("logprobs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
):
    counts = _as_bool(mask, labels)
    logits = linear_logits(hidden, weight, counts, bias, logit_scale, softcap)
    logprobs, entropy = logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)
    logits = logits.detach()
    log_sum_sq_probs = torch.logsumexp(2 * _log_softmax(logits, counts, temperature), dim=-1)
    tempered = logits / (
        temperature[..., None].to(logits.dtype) if isinstance(temperature, torch.Tensor) else temperature
    )
    is_top1 = ((logits == logits.amax(-1, keepdim=True)).int().argmax(-1) == labels) & ~logprobs.isnan()
    found = {
        "logprobs": logprobs,
        "entropy": entropy,
        "log_sum_sq_probs": torch.where(counts, log_sum_sq_probs, 0.0),
        "mean_logits": torch.where(counts, tempered.mean(-1), 0.0),
        "is_top1": (counts & is_top1).to(logits.dtype),
    }
    return tuple(x if name in outputs else None for name, x in found.items())


def linear_logprobs_and_entropy(
    hidden, weight, labels, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, mask=None
):
    logits = linear_logits(hidden, weight, _as_bool(mask, labels), bias, logit_scale, softcap)
    return logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)


def linear_logprobs(hidden, weight, labels, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, mask=None):
    options = {"bias": bias, "temperature": temperature, "logit_scale": logit_scale, "softcap": softcap, "mask": mask}
    return linear_logprobs_and_entropy(hidden, weight, labels, **options)[0]


_PENALTIES = "'kl', 'abs', 'mse', 'full', 'k3', 'low_var_kl'"


def token_kls(logprobs, ref_logprobs, kl_penalty):
    """The estimate of the KL divergence at each token from the two log-probabilities of the sampled token."""
    d = logprobs - ref_logprobs
    if kl_penalty == "kl":
        return d
    if kl_penalty == "abs":
        return d.abs()
    if kl_penalty == "mse":
        return 0.5 * d.square()
    if kl_penalty in ("k3", "low_var_kl"):
        return torch.expm1(-d) + d
    raise ValueError(f"kl_rewards: kl_penalty must be one of {_PENALTIES}, got {kl_penalty!r}")


@torch.no_grad()
def kl_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef, kl_penalty="kl", kls=None):
    counts = mask != 0
    if kl_penalty == "full":
        kls = _accumulate(kls)
    else:
        kls = token_kls(_accumulate(logprobs), _accumulate(ref_logprobs), kl_penalty)
    kls = torch.where(counts, kls, 0.0)
    non_score_rewards = torch.where(counts, -kl_coef * kls, 0.0)
    later = counts.flip(-1).cumsum(-1).flip(-1)
    last = counts & (later == 1)
    rewards = torch.where(last, non_score_rewards + scores[:, None].to(kls.dtype), non_score_rewards)
    return rewards, non_score_rewards, kls


@torch.no_grad()
def gae(values, rewards, mask=None, *, gamma=1.0, lam=0.95, lam_returns=None, bootstrap=None, cu_seqlens=None):
    counts = _as_bool(mask, values)
    values, rewards = _accumulate(values), _accumulate(rewards)
    lam = lam.to(values.dtype) if isinstance(lam, torch.Tensor) else lam
    if cu_seqlens is not None:
        return _packed_gae(values, rewards, counts, gamma, lam, lam_returns, bootstrap, cu_seqlens.tolist())
    none = values.new_zeros(values.shape[0])
    last = none if bootstrap is None else bootstrap.to(values.dtype)
    advantages = _advantages(values, rewards, counts, last, gamma, lam)
    of_returns = advantages if lam_returns is None else _advantages(values, rewards, counts, last, gamma, lam_returns)
    return advantages, torch.where(counts, of_returns + values, 0.0)


def _advantages(values, rewards, counts, next_value, gamma, lam):
    advantages = torch.zeros_like(values)
    last_advantage = torch.zeros_like(next_value)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * last_advantage
        last_advantage = torch.where(counts[:, t], advantage, last_advantage)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(counts[:, t], advantage, 0.0)
    return advantages


def _packed_gae(values, rewards, counts, gamma, lam, lam_returns, bootstrap, bounds):
    """Each sequence alone."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b, (start, end) in enumerate(zip(bounds, bounds[1:])):
        of_sequence = (x[None, start:end] for x in (values, rewards, counts))
        own = {"gamma": gamma, "lam": lam[b : b + 1] if isinstance(lam, torch.Tensor) else lam}
        own |= {"lam_returns": lam_returns, "bootstrap": None if bootstrap is None else bootstrap[b : b + 1]}
        advantages[start:end], returns[start:end] = (x[0] for x in gae(*of_sequence, **own))
    return advantages, returns


def _select(values, mask):
    """Values with zeros at masked entries, and the mask as weights of the shape and dtype of the values."""
    values = _accumulate(values)
    weights = mask.to(values.dtype).expand_as(values)
    return torch.where(weights != 0, values, 0.0), weights


def _ratio_or_zero(numerator, denominator):
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def masked_mean(values, mask, axis=None):
    values, weights = _select(values, mask)
    if axis is None:
        return _ratio_or_zero((values * weights).sum(), weights.sum())
    return _ratio_or_zero((values * weights).sum(axis), weights.sum(axis))


def masked_var(values, mask, unbiased=True):
    values, weights = _select(values, mask)
    mean = _ratio_or_zero((values * weights).sum(), weights.sum())
    total = weights.sum()
    var = _ratio_or_zero((weights * torch.where(weights != 0, values - mean, 0.0).square()).sum(), total)
    if not unbiased:
        return var
    return torch.where(total <= 1, 0.0, var * _ratio_or_zero(total, total - 1))


def masked_whiten(values, mask, shift_mean=True, *, mode=None, unbiased=True, eps=WHITEN_EPS):
    mode = mode or ("center" if shift_mean else "keep_mean")
    mean, var = masked_mean(values, mask), masked_var(values, mask, unbiased)
    selected, weights = _select(values, mask)
    whitened = (selected if mode == "scale" else selected - mean) * torch.rsqrt(var + eps)
    return torch.where(weights != 0, whitened + mean if mode == "keep_mean" else whitened, 0.0)


# `options` are those of ppo_loss but for the entropy.


def ppo_loss_from_logits(
    logits, labels, old_logprobs, advantages, vpreds, values, returns, mask, *, temperature=1.0, **options
):
    logprobs, entropy = logprobs_and_entropy(logits, labels, temperature=temperature, mask=mask)
    tokens = (logprobs, old_logprobs, advantages, vpreds, values, returns)
    return ppo_loss(*tokens, mask, entropy=entropy, **options)


def ppo_loss_from_hidden(
    hidden, weight, labels, old_logprobs, advantages, vpreds, values, returns, mask,
    *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, **options,
):  # fmt: skip
    logits = linear_logits(hidden, weight, mask != 0, bias, logit_scale, softcap)
    tokens = (old_logprobs, advantages, vpreds, values, returns)
    return ppo_loss_from_logits(logits, labels, *tokens, mask, temperature=temperature, **options)
