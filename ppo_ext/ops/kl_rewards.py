"""Per-token rewards: minus the KL penalty at every token, plus the score at the last one."""

from . import _native, check, reference

_PENALTIES = {"kl": 0, "abs": 1, "mse": 2, "full": 3}  # KLPenalty in csrc/kl_rewards.h

_kl_rewards, _kl_rewards_name = _native.define(
    "_kl_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, float kl_coef, int kl_penalty)"
    " -> (Tensor rewards, Tensor non_score_rewards, Tensor kls)"
)


@_native.register_fake(_kl_rewards_name)
def _(scores, logprobs, ref_logprobs, mask, kl_coef, kl_penalty):
    return tuple(logprobs.new_empty(logprobs.shape) for _ in range(3))


def kl_rewards(scores, logprobs, ref_logprobs, mask, *, kl_coef, kl_penalty="kl", kls=None):
    """Rewards of a batch of responses from their scores and the KL penalty of each token.

        d = logprobs - ref_logprobs
        kls = d ("kl"), |d| ("abs"), d^2 / 2 ("mse"), or as given ("full")
        non_score_rewards = -kl_coef * kls
        rewards = non_score_rewards, plus scores[b] at the last counted token of row b

    Args:
        scores: [B], one number a sequence, from the reward model.
        logprobs, ref_logprobs: [B, T] log-probabilities of the tokens under the policy and the reference; not looked at
            for "full".
        mask: [B, T] bool, int or float, nonzero where a token counts.
        kl_coef: the penalty's coefficient (beta), finite in float32.
        kl_penalty: "kl", "abs", "mse" or "full".
        kls: [B, T] for "full" only: the divergences from `full_kl`.

    Returns:
        (rewards, non_score_rewards, kls), each [B, T] float32 (float64 if an input is float64), 0 where the mask is 0.

    Raises:
        TypeError: an input is not of a floating dtype, a tensor is not dense, kl_coef is no number, or kl_penalty no
        str. ValueError: shapes or devices do not match, kl_penalty is not one of the four, kl_coef is not finite, or
        kls is missing for "full" or given for another penalty.

    Notes:
        Not differentiable: inputs are detached. A row in which no token counts is all 0 and its score goes nowhere.
        Masked inputs are never read into a result. Same bits on every run.

    Source: TRL 0.11.4, `PPOTrainer.compute_rewards` (which also fills masked positions).
    """
    if not isinstance(kl_penalty, str):
        check.fail("kl_rewards", "kl_penalty", "be a str", type(kl_penalty).__name__, TypeError)
    if kl_penalty not in _PENALTIES:
        check.fail("kl_rewards", "kl_penalty", "be one of 'kl', 'abs', 'mse', 'full'", repr(kl_penalty))
    if (kls is None) == (kl_penalty == "full"):
        check.fail(
            "kl_rewards",
            "kls",
            "be given for kl_penalty 'full' and for no other",
            f"{'none' if kls is None else 'one'} with {kl_penalty!r}",
        )
    like = "logprobs"  # whose shape and device the others have
    if kl_penalty == "full":
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
