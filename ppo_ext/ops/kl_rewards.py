"""Per-token rewards: minus the KL penalty at every token, plus the score at the last one."""

import torch

from . import _native, check, reference

_PENALTIES = {"kl": 0, "abs": 1, "mse": 2, "full": 3, "k3": 4, "low_var_kl": 4}  # KLPenalty in csrc/kl_rewards.h

_kl_rewards, _kl_rewards_name = _native.define(
    "_kl_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, float kl_coef, int kl_penalty)"
    " -> (Tensor rewards, Tensor non_score_rewards, Tensor kls)"
)


@_native.register_fake(_kl_rewards_name)
def _(scores, logprobs, ref_logprobs, mask, kl_coef, kl_penalty):
    return tuple(logprobs.new_empty(logprobs.shape) for _ in range(3))


def kl_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    kl_penalty: str = "kl",
    kls: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token rewards: minus the KL penalty at every token, plus the score at the last one.

        d = logprobs - ref_logprobs
        kls = d ("kl"), |d| ("abs"), d^2 / 2 ("mse"), exp(-d) - 1 + d ("k3" or "low_var_kl"), or as given ("full")
        non_score_rewards = -kl_coef * kls
        rewards = non_score_rewards, plus scores[b] at the last token of row b that counts

    Args:
        scores: [B] float32, bfloat16, float16 or float64, one number a sequence, from the reward model.
        logprobs, ref_logprobs: [B, T], of the same dtypes, log-probabilities of the tokens under the policy and under
            the reference. They are ignored for "full".
        mask: [B, T] bool, int or float, nonzero where a token counts.
        kl_coef: the coefficient of the penalty (beta), finite in float32.
        kl_penalty: "kl", "abs", "mse", "k3", "low_var_kl" (another name of "k3") or "full".
        kls: [B, T], the divergences that `full_kl` returns; only for "full", where they are required.

    Returns:
        (rewards, non_score_rewards, kls), each [B, T] float32 (float64 if an input is float64), 0 where the mask is 0.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, kl_coef is not a number, or kl_penalty is
            not a str.
        ValueError: shapes or devices do not match, kl_penalty is not one of the six, kl_coef is not finite, or kls is
            missing for "full" or given for another penalty.

    Notes:
        Not differentiable: the inputs are detached. Masked inputs never influence a result. In a sequence without a
        token that counts, all three results are 0 and the score is not used. Arithmetic is in float32 (float64 for
        float64). Same bits on every run.

    Source: TRL 0.11.4, `PPOTrainer.compute_rewards`, which also fills in masked positions. "k3": Schulman 2020,
    Approximating KL Divergence (http://joschu.net/blog/kl-approx.html), without the clamps that some frameworks add.
    """
    if not isinstance(kl_penalty, str):
        check.fail("kl_rewards", "kl_penalty", "be a str", type(kl_penalty).__name__, TypeError)
    if kl_penalty not in _PENALTIES:
        check.fail("kl_rewards", "kl_penalty", f"be one of {', '.join(map(repr, _PENALTIES))}", repr(kl_penalty))
    if (kls is None) == (kl_penalty == "full"):
        check.fail(
            "kl_rewards",
            "kls",
            "be given for kl_penalty 'full' and for no other",
            f"{'none' if kls is None else 'one'} with {kl_penalty!r}",
        )
    like = "logprobs"  # the argument whose shape and device the others must have
    if kls is not None:
        logprobs, ref_logprobs, like = kls, kls, "kls"
    check.floating("kl_rewards", like, logprobs)
    if logprobs.dim() != 2:
        check.fail("kl_rewards", like, "have the shape [B, T]", list(logprobs.shape))
    for name, x in (("scores", scores), ("ref_logprobs", ref_logprobs)):
        check.floating("kl_rewards", name, x)
        check.device("kl_rewards", name, x, logprobs.device, like)
    check.shape("kl_rewards", "ref_logprobs", ref_logprobs, logprobs.shape, like)
    check.shape("kl_rewards", "scores", scores, logprobs.shape[:1], f"the first dimension of {like}")
    kl_coef = check.finite("kl_rewards", "kl_coef", kl_coef)
    mask = check.mask("kl_rewards", mask, logprobs.shape, logprobs.device, like).contiguous()
    scores, logprobs, ref_logprobs = check.same_dtype(scores.detach(), logprobs.detach(), ref_logprobs.detach())
    if not _native.available(logprobs.device.type):
        return reference.kl_rewards(
            scores,
            logprobs,
            ref_logprobs,
            mask,
            kl_coef=kl_coef,
            kl_penalty=kl_penalty,
            kls=None if kls is None else logprobs,
        )
    return _kl_rewards(
        scores.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous(), mask, kl_coef, _PENALTIES[kl_penalty]
    )
